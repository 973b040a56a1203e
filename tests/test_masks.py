"""Which weights become zero, in one matrix and in a whole model."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from hfkit.compression.calibration import calibration_rows, prune_weights, sparsity_of
from hfkit.compression.masks import Sparsity, magnitude, parse_sparsity, sparsegpt, wanda
from hfkit.errors import HfkitError
from hfkit.model import HfkitConfig, HfkitForSequenceClassification

HALF, TWO_OF_FOUR = parse_sparsity(0.5), parse_sparsity("2:4")
METHODS = ("magnitude", "wanda", "sparsegpt")
each_method = pytest.mark.parametrize("method", METHODS)


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(tokens: int = 400, inputs: int = 32) -> Tensor:
    """Inputs that can stand in for each other, some of them twenty times as large as others."""
    heavy = 1 + 20 * (torch.arange(inputs) % 8 == 3)
    return normal(tokens, inputs) @ normal(inputs, inputs, seed=1) * heavy


def pruned(method: str, weight: Tensor, inputs: Tensor, sparsity: Sparsity, **more: Any) -> tuple[Tensor, Tensor]:
    if method == "sparsegpt":
        return sparsegpt(weight, inputs.T @ inputs, sparsity, **more)
    kept = magnitude(weight, sparsity) if method == "magnitude" else wanda(weight, inputs.norm(dim=0), sparsity)
    return weight * kept, kept


# ---- what can be asked for


def test_sparsity_is_a_share_or_a_pattern() -> None:
    assert parse_sparsity(0.29).zeros(100) == 29  # floor(0.29 * 100) is 28
    assert parse_sparsity("0.7") == parse_sparsity(0.7)
    assert [parse_sparsity(0.7).zeros(size) for size in (1, 2, 3, 10)] == [0, 1, 2, 7]
    assert TWO_OF_FOUR.zeros(4) == 2 and TWO_OF_FOUR.group == 4
    assert parse_sparsity("1:4").zeros(4) == 3  # one weight of four stays
    assert all(parse_sparsity(f"{n}:49").zeros(49) == 49 - n for n in range(1, 49))


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.5, "0:4", "4:4", "4:2", "half", "2:", float("nan"), True])
def test_what_is_no_sparsity_is_refused(value: Any) -> None:
    with pytest.raises(HfkitError, match=r"^sparsity: must be a share between 0 and 1, or N:M.*write 0.5 or 2:4"):
        parse_sparsity(value)


# ---- one matrix


@each_method
@pytest.mark.parametrize("share", [0.001, 0.29, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_is_exact(method: str, share: float, dtype: torch.dtype) -> None:
    weight = normal(20, 100).to(dtype)
    before = weight.clone()
    new, kept = pruned(method, weight, correlated_inputs(inputs=100), parse_sparsity(share), block_size=24)
    assert new.dtype == dtype and new.shape == weight.shape and torch.equal(weight, before)
    assert torch.equal(new != 0, kept) and kept.dtype == torch.bool
    if method == "wanda":
        assert set((~kept).sum(1).tolist()) == {int(round(share * 1000) * 100 // 1000)}
    else:
        assert int((~kept).sum()) == round(share * 1000) * 2


@each_method
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "5:8"])
def test_every_group_has_its_zeros(method: str, pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    new, kept = pruned(method, normal(6, 48), correlated_inputs(inputs=48), parse_sparsity(pattern), block_size=20)
    assert set(kept.view(-1, m).sum(1).tolist()) == {n}
    assert torch.equal(new != 0, kept)


@each_method
def test_of_equal_weights_the_first_are_kept(method: str) -> None:
    weight, inputs = torch.ones(2, 8), torch.eye(8)
    kept = pruned(method, weight, inputs, parse_sparsity(0.625))[1]
    in_rows = [[1, 1, 1, 0, 0, 0, 0, 0]] * 2
    in_the_matrix = [[1, 1, 1, 1, 1, 1, 0, 0], [0] * 8]
    assert kept.int().tolist() == (in_rows if method == "wanda" else in_the_matrix)
    assert pruned(method, weight, inputs, TWO_OF_FOUR)[1].int().tolist() == [[1, 1, 0, 0] * 2] * 2


@each_method
def test_a_pattern_that_does_not_fit_is_refused(method: str) -> None:
    with pytest.raises(
        HfkitError, match="sparsity: 2:4 needs matrices whose inputs are a multiple of 4, and one has 30"
    ):
        pruned(method, normal(6, 30), correlated_inputs(inputs=30), TWO_OF_FOUR)


def test_magnitude_by_hand() -> None:
    weight = torch.tensor([[0.1, -5, 3, 0.2], [-0.3, 4, 2, -6]])
    assert magnitude(weight, HALF).int().tolist() == [[0, 1, 1, 0], [0, 1, 0, 1]]
    assert magnitude(weight, parse_sparsity("1:2")).int().tolist() == [[0, 1, 1, 0], [0, 1, 0, 1]]
    assert magnitude(weight.T, HALF).int().tolist() == [[0, 0], [1, 1], [1, 0], [0, 1]]


def test_wanda_is_its_loop() -> None:
    weight, norms = normal(7, 12), normal(12, seed=1).abs()
    for sparsity, size in ((parse_sparsity(0.3), 12), (TWO_OF_FOUR, 4)):
        expected = torch.zeros(7, 12, dtype=torch.bool)
        for row in range(7):
            for start in range(0, 12, size):
                scores = {j: abs(float(weight[row, j])) * float(norms[j]) for j in range(start, start + size)}
                for j in sorted(scores, key=scores.__getitem__)[sparsity.zeros(size) :]:
                    expected[row, j] = True
        assert torch.equal(wanda(weight, norms, sparsity), expected)


def test_sparsegpt_of_independent_inputs_only_chooses() -> None:
    """With a diagonal H the cost of a weight is w^2 h, and no other weight can make up for it."""
    weight, squares = normal(10, 16), 1 + 9 * normal(16, seed=1).square()
    new, kept = sparsegpt(weight, squares.diag(), HALF, damping=0.1)
    costs = weight.square() * (squares + 0.1 * squares.mean())
    assert torch.equal(kept, magnitude(costs, HALF))
    assert torch.equal(new, weight * kept)
    by_groups = sparsegpt(weight, squares.diag(), TWO_OF_FOUR, damping=0.1)[1]
    assert torch.equal(by_groups, magnitude(costs, TWO_OF_FOUR))


@pytest.mark.parametrize("block_size", [4, 10, 128])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(block_size: int) -> None:
    weight, inputs = normal(5, 24), correlated_inputs(inputs=24)
    gram = inputs.T @ inputs
    hessian = (gram + 0.01 * gram.diagonal().mean() * torch.eye(24)).double()
    expected, kept = weight.double(), torch.ones(5, 24, dtype=torch.bool)
    for column in range(24):
        inverse = hessian[column:, column:].inverse()
        if column % 4 == 0:
            variances = torch.stack([hessian[j:, j:].inverse()[0, 0] for j in range(column, column + 4)])
            costs = expected[:, column : column + 4].square() / variances
            kept[:, column : column + 4] = costs.argsort(1).argsort(1) >= 2
        lost = expected[:, column] * ~kept[:, column] / inverse[0, 0]
        expected[:, column:] -= lost[:, None] * inverse[0]
    new, found = sparsegpt(weight, gram, TWO_OF_FOUR, block_size)
    assert torch.equal(found, kept)
    assert_close(new, (expected * kept).float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR, parse_sparsity(0.7)], ids=str)
def test_the_more_a_method_knows_the_nearer_its_outputs(sparsity: Sparsity) -> None:
    weight, inputs = normal(24, 32), correlated_inputs()
    errors = [(inputs @ (weight - pruned(method, weight, inputs, sparsity)[0]).T).norm() for method in METHODS]
    assert errors[0] > errors[1] > errors[2], errors


def test_dead_inputs_go_first() -> None:
    weight, inputs = normal(6, 16), correlated_inputs(inputs=16)
    inputs[:, 5], weight[:, 5] = 0, 100
    for method in ("wanda", "sparsegpt"):
        new, kept = pruned(method, weight, inputs, HALF)
        assert not kept[:, 5].any() and new.isfinite().all()
    new, kept = sparsegpt(weight, torch.zeros(16, 16), HALF)
    assert torch.equal(new, weight * kept) and int(kept.sum()) == 48


def test_damping_grows_where_it_must() -> None:
    inputs = correlated_inputs(inputs=16)
    gram = inputs.T @ inputs
    indefinite = gram - 0.5 * gram.diagonal().mean() * torch.eye(16)
    once = sparsegpt(normal(6, 16), indefinite, HALF, damping=0.1)
    assert all(
        torch.equal(*pair) for pair in zip(once, sparsegpt(normal(6, 16), indefinite, HALF, damping=1.0), strict=True)
    )
    with pytest.raises(HfkitError, match="method: sparsegpt finds no Cholesky factor.*damping=100;.*use wanda"):
        sparsegpt(normal(6, 16), gram * float("nan"), HALF)


# ---- a model

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
CONFIGS: dict[str, Callable[[], Any]] = {
    "hfkit": lambda: HfkitConfig(**SIZES),
    "llama": lambda: transformers.LlamaConfig(**SIZES, attn_implementation="eager"),
    "sliding": lambda: transformers.Qwen3Config(**SIZES, **SLIDING, head_dim=8),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64),
}
each_model = pytest.mark.parametrize("kind", CONFIGS)
ROWS = torch.randint(3, 61, (7, 12), generator=torch.Generator().manual_seed(0))


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


@each_model
@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_matrices_of_the_layers_and_nothing_else(kind: str, method: str, dtype: torch.dtype) -> None:
    model = model_of(kind).to(dtype)
    before = copy.deepcopy(model.state_dict())
    prune_weights(model, None if method == "magnitude" else ROWS, method, TWO_OF_FOUR, batch_size=3)
    shares = sparsity_of(model)
    in_layers = {f"{name}.weight" for name in shares}
    assert set(shares.values()) == {0.5} and len(shares) == 3 * (4 if kind.startswith("gpt") else 7)
    for name, weight in model.state_dict().items():
        assert weight.dtype == before[name].dtype
        assert torch.equal(weight, before[name]) != (name in in_layers), name
        if name in in_layers:
            groups = (weight.T if kind == "gpt2" else weight).reshape(-1, 4)  # of inputs, which are rows in a Conv1D
            assert set((groups != 0).sum(1).tolist()) == {2}
    assert model.training and not model.base_model._forward_pre_hooks
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def wanda_by_whole_passes(kind: str, is_pruned_before: bool) -> dict[str, Tensor]:
    """What wanda makes of a model whose whole forward pass is run anew for each layer."""
    model = model_of(kind).eval()
    looked_at = model if is_pruned_before else copy.deepcopy(model)
    layers, all_seen = (getattr(each.base_model, "h" if kind == "gpt2" else "layers") for each in (model, looked_at))
    for layer, seen in zip(layers, all_seen, strict=True):
        inputs: dict[str, Tensor] = {}

        def note(name: str, _: nn.Module, args: tuple[Tensor], inputs: dict[str, Tensor] = inputs) -> None:
            inputs[name] = args[0].flatten(0, 1)

        linears = {name: each for name, each in seen.named_modules() if isinstance(each, (nn.Linear, Conv1D))}
        hooks = [each.register_forward_pre_hook(partial(note, name)) for name, each in linears.items()]
        looked_at(ROWS, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, seen_inputs in inputs.items():
            weight = layer.get_submodule(name).weight
            weight = weight.T if kind == "gpt2" else weight
            weight.mul_(wanda(weight, seen_inputs.norm(dim=0), HALF))
    return model.state_dict()


@each_model
def test_a_layer_sees_what_its_pruned_predecessors_give(kind: str) -> None:
    """With two sizes of batches, masks made by the model, and masks that differ from layer to layer."""
    model = model_of(kind).eval()
    expected, other = (wanda_by_whole_passes(kind, is_pruned_before) for is_pruned_before in (True, False))
    prune_weights(model, ROWS, "wanda", HALF, batch_size=4)
    found = model.state_dict()
    for name in sparsity_of(model):
        assert torch.equal(found[f"{name}.weight"] != 0, expected[f"{name}.weight"] != 0), name
    assert any(not torch.equal(other[name], expected[name]) for name in expected)
    assert not model.training


def test_a_classifier_keeps_its_head() -> None:
    torch.manual_seed(0)
    model = HfkitForSequenceClassification(HfkitConfig(**SIZES, num_labels=3))
    prune_weights(model, ROWS, "sparsegpt", HALF)
    assert len(sparsity_of(model)) == 21 and set(sparsity_of(model).values()) == {0.5}
    assert (model.score.weight != 0).all()


def test_models_that_cannot_be_pruned_are_refused() -> None:
    model = model_of("gpt2")
    model.transformer.h = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(HfkitError, match="type gpt2 has no linear maps in its layers"):
        prune_weights(model, ROWS, "wanda", HALF)
    model = model_of("hfkit")
    model.model.layers[1].input_layernorm.weight.data[3] = float("inf")
    with pytest.raises(HfkitError, match="the inputs of self_attn.q_proj are not finite"):
        prune_weights(model, ROWS, "sparsegpt", HALF)


# ---- rows


def tokenizer_of(**special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}, unk_token="c"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_rows_run_on_through_the_texts() -> None:
    both = tokenizer_of(bos_token="<s>", eos_token="</s>")
    assert calibration_rows(["a b", "b"], both, 3, 9).tolist() == [[0, 2, 3], [1, 0, 3]]
    assert calibration_rows(["a b", "b"], tokenizer_of(eos_token="</s>"), 5, 9).tolist() == [[2, 3, 1, 3, 1]]
    assert calibration_rows(["a b", "b"], tokenizer_of(), 3, 9).tolist() == [[2, 3, 3]]
    endless = iter(lambda: "a b a", None)
    rows = calibration_rows(endless, both, 4, 5)
    assert rows.shape == (5, 4) and rows.dtype == torch.int64


def test_too_little_text_is_told() -> None:
    with pytest.raises(
        HfkitError, match="calibration: the texts have 3 tokens, less than one row of 4; give more text"
    ):
        calibration_rows(["a"], tokenizer_of(bos_token="<s>", eos_token="</s>"), 4, 2)
