"""What holds of every hfkit model: arithmetic, saving and loading, other libraries, training, configuration."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from transformers import BitsAndBytesConfig, PreTrainedModel, Trainer, TrainingArguments

import hfkit
from hfkit.model import HfkitConfig, HfkitForCausalLM, HfkitForSequenceClassification
from hfkit.model.modeling_hfkit import CACHE

TASKS = ("", "ForCausalLM", "ForSequenceClassification")
Batch = dict[str, Any]
each_position = pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
each_class = pytest.mark.parametrize("model_class", [HfkitForCausalLM, HfkitForSequenceClassification])


def tiny_config(**overrides: Any) -> HfkitConfig:
    sizes = {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return HfkitConfig(**{**sizes, **heads, "pad_token_id": 0, "num_labels": 3, **overrides})


def tiny_model(model_class: type[PreTrainedModel] = HfkitForCausalLM, **overrides: Any) -> PreTrainedModel:
    """A small model with no parameter at its initial value, so that none can be lost unseen."""
    torch.manual_seed(0)
    model = model_class(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 101, (rows, length), generator=torch.Generator().manual_seed(seed))


ROWS = [random_ids(1, length)[0] for length in (3, 9, 6)]


def padded(rows: list[torch.Tensor], side: str) -> Batch:
    input_ids = pad_sequence(rows, batch_first=True, padding_side=side)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def supervised_batch() -> Batch:
    """Eleven rows with 10 to 0 supervised tokens, so that a mean of means is not the mean."""
    input_ids = random_ids(11, 11)
    ignored = torch.arange(11) < torch.arange(1, 12)[:, None]
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(ignored, -100)}


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return model(input_ids, **inputs).logits


def loss_and_gradients(model: PreTrainedModel, batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    sum(losses).backward()
    return sum(losses).detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@each_position
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_later_token_does_not_change_earlier_logits(positions: str, attention: str) -> None:
    model, input_ids = tiny_model(position_embedding_type=positions), random_ids(2, 12)
    model.set_attn_implementation(attention)
    before = logits_of(model, input_ids)
    input_ids[:, 7] = input_ids[:, 7] % 100 + 1
    after = logits_of(model, input_ids)
    assert_close(after[:, :7], before[:, :7])
    assert ((after - before)[:, 7:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_added_positions_tell_equal_tokens_apart(positions: str) -> None:
    logits = logits_of(tiny_model(position_embedding_type=positions), torch.full((1, 12), 7))[0]
    assert (torch.cdist(logits, logits) + torch.eye(12) > 1e-2).all()


@each_position
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_text_read_in_two_pieces_gives_the_same_logits(name: str, positions: str) -> None:
    """By the name that transformers gives the cache since 5.24, and by the older one."""
    model, input_ids = tiny_model(position_embedding_type=positions), random_ids(2, 12)
    whole, cache = logits_of(model, input_ids), model(input_ids[:, :7])[CACHE]
    assert_close(logits_of(model, input_ids[:, 7:], **{name: cache}, logits_to_keep=3), whole[:, -3:])


@each_position
@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampling", "beams"])
@pytest.mark.parametrize("cache", [{"use_cache": True}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_cached_generation_equals_uncached(positions: str, mode: dict, cache: dict) -> None:
    model, outputs = tiny_model(position_embedding_type=positions), []
    wanted = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    for how in (cache, {"use_cache": False}):
        torch.manual_seed(0)
        output = model.generate(random_ids(2, 6), **wanted, **how, **mode)
        outputs.append((output.sequences, torch.stack(output.logits)))
    assert_close(outputs[0], outputs[1])


@each_position
@pytest.mark.parametrize("attention", ["sdpa", "eager", "paged|sdpa", "paged|eager"])
def test_continuous_batching_generates_what_generate_does(positions: str, attention: str) -> None:
    model = tiny_model(position_embedding_type=positions)
    alone = [model.generate(row[None], max_new_tokens=6, do_sample=False)[0, len(row) :].tolist() for row in ROWS]
    model.set_attn_implementation(attention)
    assert continuous_batch(model) == alone


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qwen3", "llama"])
def test_continuous_batching_gives_the_tokens_of_the_stock_class(qk_norm: bool, tmp_path: Path) -> None:
    tiny_model(qk_norm=qk_norm).save_pretrained(tmp_path)
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    config = own.config.stock_config()
    (tmp_path / "config.json").write_text(json.dumps(config))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(own) is HfkitForCausalLM
    assert type(stock).__name__ == config["architectures"][0] != "HfkitForCausalLM"
    assert continuous_batch(own) == continuous_batch(stock)


def continuous_batch(model: PreTrainedModel) -> list[list[int]]:
    """The new tokens of each of `ROWS`, written in one batch with a paged cache."""
    generation = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    options = transformers.ContinuousBatchingConfig(num_blocks=16, page_size=4, max_batch_tokens=32)
    outputs = model.generate_batch(
        [row.tolist() for row in ROWS], generation_config=generation, continuous_batching_config=options
    )
    assert not any(output.error for output in outputs.values())
    return [outputs[name].generated_tokens for name in sorted(outputs, key=lambda name: int(name.split("_")[-1]))]


@each_position
def test_left_padded_batch_generates_as_unpadded(positions: str) -> None:
    model = tiny_model(position_embedding_type=positions)
    alone = [model.generate(row[None], max_new_tokens=6)[:, len(row) :] for row in ROWS]
    together = model.generate(**padded(ROWS, "left"), max_new_tokens=6)[:, 9:]
    assert torch.equal(together, torch.cat(alone))


@each_position
@each_class
@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_loads_whole(model_class: type, positions: str, tied: bool, tmp_path: Path) -> None:
    shape = {"position_embedding_type": positions, "tie_word_embeddings": tied, "residual_initialization": "zero"}
    model, input_ids = tiny_model(model_class, **shape), random_ids(2, 12)
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", *(f"AutoModel{task}" for task in TASKS)}
    for device_map in (None, "cpu", "auto"):
        loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True, device_map=device_map)
        assert not any(info.values()), info
        if model_class is HfkitForCausalLM:
            assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert torch.equal(logits_of(loaded, input_ids), logits_of(model, input_ids))


LOAD_WITHOUT_HFKIT = """
import sys, torch, transformers
sys.modules.update({name: None for name in ["hfkit", *sys.modules] if name.split(".")[0] == "hfkit"})
for task in sys.argv[1:]:
    model = getattr(transformers, f"AutoModel{task}").from_pretrained(task or "ForCausalLM", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    torch.save(model(torch.load("input_ids"))[0], f"output{task}")
assert sys.modules["hfkit"] is None
"""


def test_loads_where_hfkit_is_not_installed(tmp_path: Path) -> None:
    decoder = tiny_model(residual_initialization="zero")
    classifier = tiny_model(HfkitForSequenceClassification, position_embedding_type="learned")
    decoder.save_pretrained(tmp_path / "ForCausalLM")
    classifier.save_pretrained(tmp_path / "ForSequenceClassification")
    input_ids = random_ids(2, 12)
    torch.save(input_ids, tmp_path / "input_ids")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD_WITHOUT_HFKIT, *TASKS]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for task, model in zip(TASKS, (decoder.model, decoder, classifier), strict=True):
        assert torch.equal(torch.load(tmp_path / f"output{task}"), model(input_ids)[0]), task


@each_class
@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
@pytest.mark.parametrize(
    ("tied", "rope"), [(True, "default"), (False, "default"), (False, "yarn"), (False, "dynamic")]
)
def test_opens_as_stock_class(model_class: type, family: str, tied: bool, rope: str, tmp_path: Path) -> None:
    scaling = {"rope_type": rope, "rope_theta": 1e4, **({} if rope == "default" else {"factor": 4.0})}
    shape = {"tie_word_embeddings": tied, "head_dim": 32, "max_position_embeddings": 8, "rope_parameters": scaling}
    model = tiny_model(model_class, qk_norm=family == "Qwen3", **shape)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config.stock_config()))
    stock_class = getattr(transformers, model_class.__name__.replace("Hfkit", family))
    stock, info = stock_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert stock.config.architectures == [stock_class.__name__]
    assert_close(logits_of(stock, random_ids(2, 12)), logits_of(model, random_ids(2, 12)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_only_rotary_positions_open_as_stock_class(positions: str) -> None:
    with pytest.raises(ValueError, match=f"position_embedding_type={positions}: only rope"):
        tiny_config(position_embedding_type=positions).stock_config()


@each_position
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [None, False])
def test_packed_documents_do_not_see_each_other(positions: str, attention: str, use_cache: bool | None) -> None:
    model, document = tiny_model(position_embedding_type=positions), random_ids(1, 7)
    model.set_attn_implementation(attention)
    position_ids = torch.cat((torch.arange(5), torch.arange(7)))[None]
    for other in (random_ids(1, 5, seed=1), random_ids(1, 5, seed=2)):
        logits = logits_of(model, torch.cat((other, document), 1), position_ids=position_ids, use_cache=use_cache)
        assert_close(logits[:, 5:], logits_of(model, document))


@pytest.mark.parametrize("is_packed", [False, True])
def test_compiled_rows_have_a_mask_only_where_documents_are_packed(is_packed: bool) -> None:
    """With a mask sdpa has no flash kernel on a GPU."""
    torch._dynamo.reset()
    model, input_ids, masks = tiny_model(), random_ids(2, 12), list[bool]()
    position_ids = {"position_ids": (torch.arange(12) % 5).expand(2, 12)} if is_packed else {}

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        attention = torch.nn.functional.scaled_dot_product_attention
        calls = [node for node in module.graph.nodes if node.target is attention]
        masks.extend(node.kwargs["attn_mask"] is not None for node in calls)
        return module.forward

    expected = logits_of(model, input_ids, use_cache=False, **position_ids)
    compiled = torch.compile(model, backend=backend)
    assert_close(logits_of(compiled, input_ids, use_cache=False, **position_ids), expected)
    assert masks == [is_packed] * 2


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_implementations_agree(attention: str) -> None:
    model, batch = tiny_model(), padded(ROWS, "left")
    is_token, expected = batch["attention_mask"].bool(), logits_of(model, **batch)
    model.set_attn_implementation(attention)
    with torch.compiler.set_stance("force_eager"):  # flex without its compiler: the same sums, in seconds less
        assert_close(logits_of(model, **batch)[is_token], expected[is_token])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_dropout_acts_in_training_alone(attention: str) -> None:
    model, expected = tiny_model(attention_dropout=0.5), logits_of(tiny_model(), random_ids(2, 12))
    model.set_attn_implementation(attention)
    assert_close(logits_of(model, random_ids(2, 12)), expected)
    assert not torch.allclose(logits_of(model.train(), random_ids(2, 12)), expected, atol=0.1)


def test_loss_is_the_mean_over_supervised_tokens() -> None:
    model, batch = tiny_model(), supervised_batch()
    targets = batch["labels"][:, 1:, None]
    log_probabilities = logits_of(model, batch["input_ids"])[:, :-1].log_softmax(-1)
    expected = -log_probabilities.gather(-1, targets.clamp(min=0))[targets != -100].mean()
    assert_close(loss_and_gradients(model, [batch])[0], expected)


CLASSIFIER_LABELS = {
    "single_label_classification": torch.arange(8) % 3,
    "single_label_classification, one ignored": torch.tensor([0, 1, 2, -100, 1, 0, 2, 1]),
    "regression": torch.linspace(-1, 1, 24).view(8, 3),
    "multi_label_classification": torch.arange(24).view(8, 3).remainder(2).float(),
}


@pytest.mark.parametrize("task", ["causal_lm", *CLASSIFIER_LABELS])
def test_one_large_batch_equals_many_of_one_row(task: str) -> None:
    model, batch = tiny_model(), supervised_batch()
    if task in CLASSIFIER_LABELS:
        model = tiny_model(HfkitForSequenceClassification, problem_type=task.split(",")[0])
        batch = {"input_ids": random_ids(8, 12), "labels": CLASSIFIER_LABELS[task]}
    count = (batch["labels"] != -100).sum()
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["labels"]))]
    whole = loss_and_gradients(model, [batch])
    assert_close(loss_and_gradients(model, [{**batch, "num_items_in_batch": count}]), whole)
    assert_close(loss_and_gradients(model, [{**row, "num_items_in_batch": count} for row in rows]), whole)


def test_accumulating_eight_rows_equals_one_batch_of_eight(tmp_path: Path) -> None:
    batch, results = supervised_batch(), []
    rows = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    for size in (1, 8):
        model = tiny_model()
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 2}
        plain = {"optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.5, "use_cpu": True, "report_to": "none"}
        arguments = TrainingArguments(str(tmp_path), **sizes, **plain, save_strategy="no", disable_tqdm=True)
        Trainer(model, arguments, train_dataset=rows).train()
        results.append(model.state_dict())
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[0]["lm_head.weight"], tiny_model().lm_head.weight, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, runs = tiny_model().train(), []
    expected = loss_and_gradients(model, [supervised_batch()])
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(loss_and_gradients(model, [supervised_batch()]), expected)
    assert len(runs) == 2  # once forward, once more for the backward pass


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_model_gives_the_same_loss_and_gradients() -> None:
    model, batch = tiny_model(num_hidden_layers=1, use_cache=False), supervised_batch()
    expected = loss_and_gradients(model, [batch])
    model.compile(fullgraph=True, backend="aot_eager")
    assert_close(loss_and_gradients(model, [batch]), expected)
    model.compile(fullgraph=True)
    with torch.no_grad():  # forward alone, as the backward kernels take ten seconds more to build
        assert_close(model(**batch).loss, expected[0])


@each_class
@pytest.mark.parametrize(("scheme", "factor"), [("normal", 1.0), ("scaled", 0.5), ("zero", 0.0)])
def test_initial_parameters(model_class: type, scheme: str, factor: float) -> None:
    model = model_class(tiny_config(initializer_range=0.05, residual_initialization=scheme, num_labels=64))
    for name, weight in model.state_dict().items():
        is_norm, is_residual = "norm" in name, name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.0 if is_norm else 0.05 * factor if is_residual else 0.05
        assert weight.std().item() == pytest.approx(std, rel=0.06), name
        assert weight.mean().item() == pytest.approx(1.0 if is_norm else 0.0, abs=0.005), name


def test_embedding_and_head_may_start_otherwise(tmp_path: Path) -> None:
    ranges = {"embedding_initializer_range": 0.3, "head_initializer_range": 0.001}
    model = HfkitForCausalLM(tiny_config(tie_word_embeddings=False, pad_token_id=3, **ranges))
    assert model.model.embed_tokens.weight[3].eq(0).all(), "padding starts at zero"
    for name, std in (("model.embed_tokens", 0.3), ("lm_head", 0.001), ("model.layers.0.mlp.up_proj", 0.02)):
        assert model.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.06), name
    model.save_pretrained(tmp_path)
    again = HfkitForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    assert not any(name in model.config.stock_config() for name in ranges)


def test_lora_trains_the_adapter_alone_and_reloads(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = get_peft_model(HfkitForCausalLM.from_pretrained(tmp_path), lora)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(**supervised_batch()).loss.backward()
        optimizer.step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert len(moved) == 8 and moved == {name for name in before if "lora_" in name}  # A and B, q and v, two layers
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(HfkitForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter")
    assert torch.equal(logits_of(again, random_ids(2, 12)), logits_of(model.eval(), random_ids(2, 12)))


@each_class
@pytest.mark.parametrize(("bits", "error"), [(8, 0.1), (4, 0.5)])
def test_quantized_logits_are_near(model_class: type, bits: int, error: float, tmp_path: Path) -> None:
    model, input_ids = tiny_model(model_class), random_ids(8, 12)
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4")
    quantized = model_class.from_pretrained(tmp_path, quantization_config=config)
    linear = {name: type(module) for name, module in quantized.named_modules() if isinstance(module, torch.nn.Linear)}
    assert [name for name, kind in linear.items() if kind is torch.nn.Linear] in (["lm_head"], ["score"])
    assert len(linear) == 15  # seven a layer and the head
    expected = logits_of(model, input_ids)
    assert 0 < (logits_of(quantized, input_ids) - expected).norm() / expected.norm() < error


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "head_dim")
REFUSED = {
    **dict.fromkeys(SIZES, (0, -2, "64", 64.0)),
    "num_attention_heads": (0, 5),
    "num_key_value_heads": (0, 3),
    "head_dim": (0, -2, 15),
    "attention_dropout": (-0.1, 1.0, "0.1"),
    "position_embedding_type": ("alibi", None),
    "residual_initialization": ("none", None),
    "qk_norm": ("yes", 1),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_refused_configuration_names_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(StrictDataclassError, match=f"{key}(={value}: must|' expected .* got .*{value})"):
        tiny_config(**{key: value})


@each_position
@pytest.mark.parametrize("side", ["left", "right"])
def test_classifier_does_not_see_padding(positions: str, side: str) -> None:
    model = tiny_model(HfkitForSequenceClassification, position_embedding_type=positions)
    alone = torch.cat([logits_of(model, row[None]) for row in ROWS])
    assert_close(logits_of(model, **padded(ROWS, side)), alone)
    assert_close(logits_of(model, padded(ROWS, "right")["input_ids"]), alone)  # by pad_token_id


def test_auto_classes_and_package_give_the_model() -> None:
    for task in TASKS[1:]:
        model = getattr(transformers, f"AutoModel{task}").from_config(tiny_config())
        assert type(model) is getattr(hfkit, f"Hfkit{task}")


def test_importing_the_package_loads_no_library() -> None:
    check = "import sys, hfkit; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
