"""Smaller models made of a larger one's layers, heads and channels."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from hfkit.errors import HfkitError
from hfkit.model import HfkitConfig, HfkitForCausalLM, HfkitForSequenceClassification
from hfkit.model.slicing import Importance, check_slice, sliced, weight_importance

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {
    "hfkit": lambda **more: HfkitConfig(**{**SIZES, "head_dim": 6, **more}),
    "learned": lambda **more: HfkitConfig(**{**SIZES, "position_embedding_type": "learned", "qk_norm": False, **more}),
    "untied": lambda **more: HfkitConfig(**{**SIZES, "tie_word_embeddings": False, **more}),
    "llama": lambda **more: transformers.LlamaConfig(**{**SIZES, "attention_bias": True, "mlp_bias": True, **more}),
    "mistral": lambda **more: transformers.MistralConfig(**{**SIZES, "sliding_window": None, **more}),
    "qwen2": lambda **more: transformers.Qwen2Config(**{**SIZES, **more}),
    "qwen3": lambda **more: transformers.Qwen3Config(**{**SIZES, "head_dim": 8, **more}),
}
DEEP = {
    **WIDE,
    "gpt2": lambda: transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, eos_token_id=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    ),
}
each_wide = pytest.mark.parametrize("kind", WIDE)
each_deep = pytest.mark.parametrize("kind", DEEP)
IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))


def model_of(kind: str, **more: Any) -> PreTrainedModel:
    """A model in which no weight has its initial value, so that none can be lost unseen."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(DEEP[kind](**more)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def random_importance(seed: int = 0) -> Importance:
    source = torch.Generator().manual_seed(seed)
    drawn = [[torch.rand(size, generator=source) for _ in range(3)] for size in (48, 8)]
    return Importance(torch.rand(32, generator=source), *drawn)


# ---- layers


@each_deep
def test_all_kept_is_the_same_model(kind: str) -> None:
    model = model_of(kind)
    before = copy.deepcopy(model.state_dict())
    for same in (sliced(model), sliced(model, layers=[0, 1, 2])):
        assert type(same) is type(model) and same is not model
        assert torch.equal(logits_of(same), logits_of(model))
        with torch.no_grad():
            for weight in same.parameters():
                weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@each_deep
def test_kept_layers_are_the_model_with_one_taken_out(kind: str) -> None:
    model = model_of(kind)
    by_hand = copy.deepcopy(model)
    base = by_hand.base_model
    layers = base.h if kind == "gpt2" else base.layers
    del layers[1]
    by_hand.config.num_hidden_layers = 2
    smaller = sliced(model, layers=[0, 2])
    assert torch.equal(logits_of(smaller), logits_of(by_hand))
    assert not torch.equal(logits_of(smaller), logits_of(model))
    assert smaller.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 3


@each_deep
def test_the_result_is_a_plain_model(kind: str, tmp_path: Path) -> None:
    """It is saved, loaded and generates, with and without a cache, whose places are counted by layer."""
    narrower = {"hidden_size": 24, "intermediate_size": 20, "num_key_value_heads": 2} if kind in WIDE else {}
    model = model_of(kind)
    model.config._name_or_path = "the/larger"
    smaller = sliced(model, [1, 2], **narrower)
    assert smaller.name_or_path == "" and not smaller.training
    smaller.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(loaded), logits_of(smaller))
    assert loaded.num_parameters() < model.num_parameters()
    wanted = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, plain = (loaded.generate(IDS, use_cache=use_cache, **wanted) for use_cache in (True, False))
    assert torch.equal(cached, plain) and cached.shape[1] > IDS.shape[1]


def test_a_value_for_each_layer_goes_with_its_layer() -> None:
    types = ["full_attention", "sliding_attention", "full_attention"]
    model = model_of("qwen3", layer_types=types, use_sliding_window=True, sliding_window=4)
    smaller = sliced(model, layers=[1, 2])
    assert smaller.config.layer_types == types[1:] and model.config.layer_types == types
    assert [layer.self_attn.sliding_window for layer in smaller.model.layers] == [4, None]


def test_layers_of_different_kinds_are_not_exchanged() -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0]}
    config = transformers.Qwen3MoeConfig(**{**SIZES, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert sliced(model, layers=[0, 2]).num_parameters() < model.num_parameters()
    with pytest.raises(HfkitError, match=r"layers: \[1, 2\] cannot stand behind one another.*model.layers.1.mlp"):
        sliced(model, layers=[1, 2])


# ---- widths


@each_wide
def test_all_channels_kept_is_the_same_model(kind: str) -> None:
    model = model_of(kind)
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    assert torch.equal(logits_of(sliced(model, **sizes)), logits_of(model))


@torch.no_grad()
def without_channels(model: PreTrainedModel, importance: Importance, sizes: dict[str, int]) -> PreTrainedModel:
    """The same large model, in which all that is to be dropped writes nothing into the residual stream."""

    def dropped(scores: torch.Tensor, count: int) -> torch.Tensor:
        return torch.tensor([i for i in range(len(scores)) if (scores > scores[i]).sum() >= count], dtype=torch.long)

    model = copy.deepcopy(model)
    base, config = model.base_model, model.config
    hidden = dropped(importance.hidden, sizes.get("hidden_size", 32))
    if not config.tie_word_embeddings:
        model.lm_head.weight[:, hidden] = 9  # read, but never written
    for module in base.children():
        if isinstance(module, nn.Embedding):
            module.weight[:, hidden] = 0
    for index, layer in enumerate(base.layers):
        layer.mlp.down_proj.weight[:, dropped(importance.intermediate[index], sizes.get("intermediate_size", 48))] = 0
        groups = sizes.get("num_key_value_heads", 4)
        per_group = sizes.get("num_attention_heads", 2 * groups) // groups
        outputs = layer.self_attn.o_proj.weight.unflatten(1, (4, 2, -1))  # (hidden, groups, heads of it, head_dim)
        scores = importance.heads[index].view(4, 2)
        best = scores.sort(descending=True).values[:, :per_group].square().sum(1)
        outputs[:, dropped(best, groups)] = 0
        for group in range(4):
            outputs[:, group, dropped(scores[group], per_group)] = 0
        for writer in (layer.mlp.down_proj, layer.self_attn.o_proj):
            writer.weight[hidden] = 0
            if writer.bias is not None:
                writer.bias[hidden] = 0
    return model


NARROWER = {
    "intermediate": {"intermediate_size": 31},
    "groups": {"num_key_value_heads": 2},
    "heads": {"num_attention_heads": 4},
    "both": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "hidden": {"hidden_size": 16},
    "all": {"hidden_size": 24, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
}


@each_wide
@pytest.mark.parametrize("sizes", NARROWER.values(), ids=NARROWER)
def test_a_narrower_model_is_the_model_without_its_channels(kind: str, sizes: dict[str, int]) -> None:
    if kind == "llama" and sizes.get("hidden_size", 32) % sizes.get("num_attention_heads", 8):
        pytest.skip("refused by Llama's own configuration")
    model, importance = model_of(kind, rms_norm_eps=1e-12), random_importance()
    smaller = sliced(model, importance=importance, **sizes)
    assert_close(logits_of(smaller), logits_of(without_channels(model, importance, sizes)), atol=2e-4, rtol=2e-4)
    assert (logits_of(smaller) - logits_of(model)).abs().max() > 0.1
    assert {key: getattr(smaller.config, key) for key in sizes} == sizes
    head_dim = model.base_model.layers[0].self_attn.head_dim
    assert smaller.base_model.layers[0].self_attn.head_dim == smaller.config.head_dim == head_dim


@each_wide
@pytest.mark.parametrize("sizes", [NARROWER["intermediate"], NARROWER["heads"], NARROWER["hidden"]])
def test_the_weights_tell_which_channels_write_nothing(kind: str, sizes: dict[str, int]) -> None:
    model = without_channels(model_of(kind, rms_norm_eps=1e-12), random_importance(1), sizes)
    assert_close(logits_of(sliced(model, **sizes)), logits_of(model), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("silenced", ["gate_proj", "up_proj"])
def test_an_mlp_channel_without_gate_or_input_counts_nothing(silenced: str) -> None:
    model = model_of("hfkit")
    with torch.no_grad():
        for layer in model.model.layers:
            getattr(layer.mlp, silenced).weight[::3] = 0
    importance = weight_importance(model)
    assert all(torch.equal(scores == 0, torch.arange(48) % 3 == 0) for scores in importance.intermediate)
    assert_close(logits_of(sliced(model, intermediate_size=32)), logits_of(model))


def test_importance_by_hand() -> None:
    model = model_of("untied")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0)
        model.model.layers[1].mlp.up_proj.weight[5] = 3
        model.model.layers[2].self_attn.o_proj.weight[:, 4:8] = 3  # the second of the heads, each 4 wide
        model.model.layers[2].self_attn.v_proj.weight[4:8] = 2  # the second group: the third and fourth head
        model.model.layers[0].input_layernorm.weight[7] = 2
    found = weight_importance(model)
    assert_close(found.intermediate[1], 32**1.5 * torch.where(torch.arange(48) == 5, 3.0, 1.0))
    assert_close(found.heads[2], 128 * torch.tensor([1.0, 3, 2, 2, 1, 1, 1, 1]))
    # Embedding, o_proj and down_proj of each layer; 4 columns of one o_proj hold 3.
    written = torch.full((32,), 1.0 + 3 * (32 + 48) + 4 * 8)
    # lm_head, and q, k, v, gate and up of each layer; one row of an up_proj holds 3, and 4 of a v_proj 2.
    read = torch.full((32,), 61.0 + 3 * (32 + 16 + 16 + 48 + 48) + 8 + 4 * 3)
    read[7] += 3 * (32 + 16 + 16)
    assert_close(found.hidden, (written * read).sqrt())


def test_equal_channels_are_kept_from_the_first() -> None:
    even = Importance(torch.ones(32), [torch.ones(48)] * 3, [torch.ones(8)] * 3)
    model = model_of("hfkit")
    smaller = sliced(
        model, hidden_size=10, intermediate_size=7, num_attention_heads=2, num_key_value_heads=2, importance=even
    )
    large, small = model.model.layers[1], smaller.model.layers[1]
    assert torch.equal(small.mlp.down_proj.weight, large.mlp.down_proj.weight[:10, :7])
    assert torch.equal(small.self_attn.k_proj.weight, large.self_attn.k_proj.weight[:12, :10])
    of_first_and_third = torch.cat([torch.arange(6), torch.arange(12, 18)])
    assert torch.equal(small.self_attn.q_proj.weight, large.self_attn.q_proj.weight[of_first_and_third, :10])


def test_heads_without_groups_are_kept_one_by_one() -> None:
    model = model_of("hfkit", num_key_value_heads=8)
    smaller = sliced(model, num_attention_heads=3)
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads) == (3, 3)
    smaller = sliced(model_of("hfkit"), num_key_value_heads=3)
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads) == (6, 3)


@pytest.mark.parametrize("kind", ["hfkit", "llama"])
def test_the_kind_of_number_is_kept(kind: str, tmp_path: Path) -> None:
    model = model_of(kind).to(torch.bfloat16)
    smaller = sliced(model, [0, 1], hidden_size=16, intermediate_size=24)
    assert {weight.dtype for weight in smaller.parameters()} == {torch.bfloat16}
    smaller.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).dtype == torch.bfloat16
    if kind == "llama":  # a buffer that is no weight must not be rounded
        assert smaller.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_classifier_is_narrowed_with_its_head() -> None:
    torch.manual_seed(0)
    model = HfkitForSequenceClassification(HfkitConfig(**SIZES, num_labels=3)).eval()
    smaller = sliced(model, [0, 2], hidden_size=16)
    kept = weight_importance(model).hidden.argsort(descending=True, stable=True)[:16].sort().values
    assert torch.equal(smaller.score.weight, model.score.weight[:, kept])
    assert logits_of(smaller).shape == (2, 3)


def test_an_adapter_learns_on_it() -> None:
    smaller = sliced(model_of("hfkit"), [0, 2], hidden_size=16, num_key_value_heads=2)
    adapted = get_peft_model(smaller, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted(IDS, labels=IDS).loss.backward()
    gradients = [weight.grad for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert len(gradients) == 14 and all(gradient.abs().sum() > 0 for gradient in gradients)
    assert isinstance(smaller, HfkitForCausalLM)


# ---- what cannot be had

REFUSED = [
    ("hfkit", {"layers": []}, "layers", r"\[\] keeps nothing; name at least one of the layers 0 to 2"),
    ("hfkit", {"layers": [0, 3]}, "layers", "3 is not a layer of the model, which has the layers 0 to 2"),
    ("hfkit", {"layers": [-1]}, "layers", "-1 is not a layer"),
    ("gpt2", {"layers": [2, 0]}, "layers", r"must be ascending, each layer once, got \[2, 0\]; write \[0, 2\]"),
    ("gpt2", {"layers": [1, 1]}, "layers", r"got \[1, 1\]; write \[1\]"),
    ("gpt2", {"hidden_size": 16}, "hidden_size", "type gpt2 cannot be made narrower, only hfkit.*with `layers`"),
    ("gpt_neox", {"intermediate_size": 16}, "intermediate_size", "type gpt_neox cannot be made narrower"),
    ("hfkit", {"hidden_size": 33}, "hidden_size", "must be from 1 to the model's 32, got 33"),
    ("hfkit", {"intermediate_size": 0}, "intermediate_size", "must be from 1 to the model's 48, got 0"),
    ("hfkit", {"num_key_value_heads": 5}, "num_key_value_heads", "must be from 1 to the model's 4, got 5"),
    ("hfkit", {"num_attention_heads": 6}, "num_attention_heads", "a multiple of the 4 key and value heads.*got 6"),
    ("hfkit", {"num_attention_heads": 8, "num_key_value_heads": 2}, "num_attention_heads", "at most their 4 query"),
    ("llama", {"hidden_size": 30}, "hidden_size", "type llama cannot have these sizes: .*multiple"),
]


@pytest.mark.parametrize(("kind", "wanted", "key", "problem"), REFUSED)
def test_a_slice_that_cannot_be_is_refused(kind: str, wanted: dict[str, Any], key: str, problem: str) -> None:
    found = list(check_slice(DEEP[kind](), **wanted))
    assert [name for name, _ in found] == [key]
    with pytest.raises(HfkitError, match=f"^{key}: .*{problem}"):
        sliced(model_of(kind), **wanted)


def test_every_problem_is_told() -> None:
    found = dict(check_slice(DEEP["hfkit"](), layers=[7], hidden_size=64, intermediate_size=64))
    assert set(found) == {"layers", "hidden_size", "intermediate_size"}


def test_models_of_another_build_are_refused_by_their_configuration() -> None:
    (key, problem), *none = check_slice(transformers.T5Config(), layers=[0])
    assert key == "layers" and "has several parts" in problem and not none
    neo = transformers.GPTNeoConfig(attention_types=[[["global", "local"], 2]], num_layers=4)
    (key, problem), *none = check_slice(neo, layers=[0, 1])
    assert key == "layers" and "gpt_neo cannot have these sizes" in problem and not none
    quantized = HfkitConfig(**SIZES, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert "quantized weights cannot be sliced" in dict(check_slice(quantized, layers=[0]))["layers"]
    sinusoidal = HfkitConfig(**SIZES, position_embedding_type="sinusoidal")
    assert "sinusoidal positions" in dict(check_slice(sinusoidal, hidden_size=16))["hidden_size"]
    assert not list(check_slice(sinusoidal, layers=[0], hidden_size=32, intermediate_size=8))
