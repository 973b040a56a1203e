"""Which channels, heads and layers do least on some rows."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import PreTrainedModel

from hfkit.compression.importance import activation_importance, layers_to_drop
from hfkit.errors import HfkitError
from hfkit.model import HfkitConfig, HfkitForSequenceClassification
from hfkit.model.slicing import Importance, sliced

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
CONFIGS = {
    "hfkit": lambda: HfkitConfig(**SIZES),
    "llama": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NEOX),
}
WIDE = ("hfkit", "llama", "qwen3")
ROWS = torch.randint(3, 61, (7, 12), generator=torch.Generator().manual_seed(0))
each_wide = pytest.mark.parametrize("kind", WIDE)
each_deep = pytest.mark.parametrize("kind", CONFIGS)
each_measure = pytest.mark.parametrize("by", ["block_influence", "angular_distance"])


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return copy.deepcopy(model).eval()(ROWS, use_cache=False).logits


def lowest(scores: torch.Tensor, count: int) -> set[int]:
    return set(scores.argsort()[:count].tolist())


def tensors(importance: Importance) -> list[torch.Tensor]:
    return [importance.hidden, *importance.intermediate, *importance.heads]


# ---- channels and heads


@each_wide
@torch.no_grad()
def test_what_is_silent_counts_nothing(kind: str) -> None:
    """Silent on the data, that is: the weights of a silent channel of the MLP are as large as others."""
    model = model_of(kind)
    for layer in model.base_model.layers:
        layer.mlp.up_proj.weight[5:20] = 0
        layer.self_attn.v_proj.weight[8:] = 0  # the second of two groups, each 8 wide
        if layer.self_attn.v_proj.bias is not None:
            layer.self_attn.v_proj.bias[8:] = 0
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[[3, 9]] = 0
    model.base_model.norm.weight[[3, 9]] = 0
    found = activation_importance(model, ROWS, batch_size=3)
    assert set(torch.where(found.hidden == 0)[0].tolist()) == {3, 9}
    for intermediate, heads in zip(found.intermediate, found.heads, strict=True):
        assert torch.equal(intermediate == 0, (torch.arange(48) >= 5) & (torch.arange(48) < 20))
        assert torch.equal(heads == 0, torch.tensor([False, False, True, True]))
    smaller = sliced(model, intermediate_size=33, num_key_value_heads=1, importance=found)
    assert_close(logits_of(smaller), logits_of(model), atol=1e-4, rtol=1e-4)


@each_wide
def test_activations_are_those_that_the_matrices_read(kind: str) -> None:
    model = model_of(kind)
    found = activation_importance(model, ROWS, batch_size=3)
    read: dict[str, torch.Tensor] = {}
    hooks = [
        each.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
        for name, each in model.named_modules()
        if isinstance(each, torch.nn.Linear)
    ]
    logits_before = logits_of(model)
    with torch.no_grad():
        model.eval()(ROWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    of_stream = [read["lm_head"]]
    for index in range(5):
        place = f"model.layers.{index}"
        of_stream += [read[f"{place}.self_attn.q_proj"], read[f"{place}.mlp.up_proj"]]
        assert_close(found.intermediate[index], read[f"{place}.mlp.down_proj"].flatten(0, 1).norm(dim=0))
        by_head = read[f"{place}.self_attn.o_proj"].view(7, 12, 4, 8)
        assert_close(found.heads[index], by_head.transpose(0, 2).flatten(1).norm(dim=1))
    assert_close(found.hidden, torch.cat(of_stream).flatten(0, 1).norm(dim=0))
    assert torch.equal(logits_of(model), logits_before)


def test_importance_does_not_depend_on_batches_or_training() -> None:
    model = model_of("hfkit")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    together, apart = (activation_importance(model.train(), ROWS, size) for size in (7, 2))
    assert model.training
    for one, other in zip(tensors(together), tensors(apart), strict=True):
        assert_close(one, other)
    half = activation_importance(model.to(torch.bfloat16), ROWS)
    for one, other in zip(tensors(together), tensors(half), strict=True):
        assert other.dtype == torch.float32
        assert_close(one, other, rtol=0.1, atol=0.1)


def test_a_classifier_has_importance_too() -> None:
    torch.manual_seed(0)
    model = HfkitForSequenceClassification(HfkitConfig(**SIZES, num_labels=3))
    found = activation_importance(model, ROWS)
    assert sliced(model, hidden_size=16, importance=found).score.weight.shape == (3, 16)


def test_models_that_cannot_be_made_narrower_are_refused() -> None:
    with pytest.raises(HfkitError, match="importance: a model of type gpt_neox cannot be made narrower, only hfkit"):
        activation_importance(model_of("gpt_neox"), ROWS)


# ---- layers


@torch.no_grad()
def silence(model: PreTrainedModel, layers: list[int], scale: float = 0.0) -> None:
    """Let these layers write nothing, or little, into the residual stream."""
    for index in layers:
        layer = model.base_model.layers[index]
        for name, module in layer.named_modules():
            if name.split(".")[-1] in ("o_proj", "down_proj", "dense", "dense_4h_to_h"):
                for weight in module.parameters():
                    weight.mul_(scale)


@each_deep
@each_measure
@pytest.mark.parametrize("silent", [[0], [2], [1, 2], [2, 3, 4]])
def test_layers_that_do_nothing_are_dropped(kind: str, by: Any, silent: list[int]) -> None:
    model = model_of(kind)
    silence(model, silent)
    found = layers_to_drop(model, ROWS, len(silent), by, batch_size=3)
    assert found == silent
    kept = [layer for layer in range(5) if layer not in found]
    assert_close(logits_of(sliced(model, layers=kept)), logits_of(model))


def test_only_block_influence_drops_layers_that_stand_apart() -> None:
    model = model_of("hfkit")
    silence(model, [0, 3])
    silence(model, [2], scale=0.3)
    assert layers_to_drop(model, ROWS, 2, "block_influence") == [0, 3]
    assert layers_to_drop(model, ROWS, 2, "angular_distance") == [2, 3]


@torch.no_grad()
def test_angular_distance_finds_layers_that_undo_each_other() -> None:
    """Each of the two turns the stream far; together they do nothing."""
    model = model_of("hfkit")
    for index, sign in ((2, 1.0), (3, -1.0)):
        layer = model.model.layers[index]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.register_forward_hook(lambda _, args, output, sign=sign: torch.full_like(output, 50 * sign))
    assert layers_to_drop(model, ROWS, 2, "angular_distance") == [2, 3]
    assert not {2, 3} & set(layers_to_drop(model, ROWS, 2, "block_influence"))


@each_measure
def test_measures_by_hand(by: Any) -> None:
    model = model_of("llama").eval()
    with torch.no_grad():
        states = [model.model.embed_tokens(ROWS)]
        hooks = [
            layer.register_forward_hook(lambda _, args, output: states.append(output)) for layer in model.model.layers
        ]
        model(ROWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    for count in (1, 2, 3, 4):
        if by == "block_influence":
            cosines = [torch.cosine_similarity(*pair, dim=-1).mean() for pair in zip(states, states[1:], strict=False)]
            expected = sorted(lowest(1 - torch.stack(cosines), count))
        else:
            pairs = [(states[start], states[start + count]) for start in range(6 - count)]
            angles = [torch.cosine_similarity(*pair, dim=-1).arccos().mean() for pair in pairs]
            start = int(torch.stack(angles).argmin())
            expected = list(range(start, start + count))
        assert layers_to_drop(model, ROWS, count, by, batch_size=3) == expected


@each_measure
def test_of_equal_layers_the_first_are_dropped(by: Any) -> None:
    model = model_of("hfkit").train().to(torch.bfloat16)
    silence(model, [0, 1, 2, 3, 4])
    assert layers_to_drop(model, ROWS, 3, by) == [0, 1, 2]
    assert model.training and not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@each_measure
@pytest.mark.parametrize("count", [-1, 0, 5, 6])
def test_some_layers_must_stay(by: Any, count: int) -> None:
    with pytest.raises(HfkitError, match=f"layers: from 1 to 4 of the model's 5 can be dropped, got {count}"):
        layers_to_drop(model_of("hfkit"), ROWS, count, by)
