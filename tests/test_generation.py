"""Generation for evaluation: what `model.generate` gives each prompt alone, from a batch that stays full."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hfkit import cli
from hfkit.data.tasks.generate import Generate
from hfkit.errors import HfkitError
from hfkit.inference.generation import generate, plain_decoder, rules_of
from hfkit.model import HfkitConfig, HfkitForCausalLM
from hfkit.model.loading import load_model
from hfkit.training.task_metrics import TaskMetrics
from tests.kit import on_two
from tests.test_evaluate import EVALUATE, RECIPE
from tests.test_sharded import FSDP

WORDS = 200
SHAPE = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 1,
         "pad_token_id": 0, "bos_token_id": 2, "max_position_embeddings": 128, "initializer_range": 0.3}  # fmt: skip
ENDS = [1, *range(3, 20)]  # so that rows of a model that learned nothing end at unlike lengths
OPTIONS = {"max_new_tokens": 24, "eos_token_id": ENDS}


def hfkit_model(**keys: Any) -> HfkitForCausalLM:
    return HfkitForCausalLM(HfkitConfig(**SHAPE, **keys))


MODELS: dict[str, Callable[[], Any]] = {
    "rope": hfkit_model,
    "learned": lambda: hfkit_model(position_embedding_type="learned"),
    "sinusoidal": lambda: hfkit_model(position_embedding_type="sinusoidal"),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=64, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, intermediate_size=64, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SHAPE)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, intermediate_size=64)),
}


def toy(name: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token: texts are the same where tokens are."""
    special = ["<pad>", "<eos>", "<bos>"]
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate([*special, *map(str, range(3, WORDS))])})
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    chance = random.Random(0)
    return [[chance.randrange(20, WORDS) for _ in range(chance.choice([1, 2, 5, 9, 30]))] for _ in range(23)]


def tokens_alone(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """What `model.generate` gives to each prompt by itself."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "pad_token_id": 0, **options}
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        found.append(output[0, 0 if model.config.is_encoder_decoder else len(prompt) :].tolist())
    return found


def alone(model: Any, tokenizer: Any, prompts: list[list[int]], **options: Any) -> list[str]:
    return tokenizer.batch_decode(tokens_alone(model, prompts, **options), skip_special_tokens=True)


# ---- the same texts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_each_prompt_alone(
    name: str, attention: str, tokenizer: Any, prompts: list[list[int]]
) -> None:
    model = toy(name, attention)
    assert plain_decoder(model) is model and rules_of(model, OPTIONS) is not None
    expected = alone(model, tokenizer, prompts, **OPTIONS)
    lengths = {len(text.split()) for text in expected}
    assert len(lengths) > 4 and max(lengths) == 24  # rows end early, late and at the limit
    assert generate(model, tokenizer, prompts, 5, OPTIONS) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 22, 23, 64])
def test_the_batch_size_changes_nothing(batch_size: int, tokenizer: Any, prompts: list[list[int]]) -> None:
    model = toy("rope").train()
    expected = alone(model.eval(), tokenizer, prompts, **OPTIONS)
    assert generate(model.train(), tokenizer, prompts, batch_size, OPTIONS) == expected
    assert model.training  # as it was
    assert generate(model, tokenizer, [], batch_size, OPTIONS) == []


@pytest.mark.parametrize("name", ["rope", "llama", "gpt2"])
def test_in_mixed_precision_as_in_training(name: str, tokenizer: Any, prompts: list[list[int]]) -> None:
    """Under autocast a model's keys and values may be of different dtypes."""
    model = toy(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, tokenizer, prompts, 1, OPTIONS) == alone(model, tokenizer, prompts, **OPTIONS)
        assert all(generate(model, tokenizer, prompts, 5, OPTIONS))


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 9, "eos_token_id": None},
        {"max_new_tokens": 12, "min_new_tokens": 5, "eos_token_id": ENDS},
        {"max_length": 34, "eos_token_id": ENDS},
        {"max_new_tokens": 6, "max_length": 8, "eos_token_id": ENDS},
        {"max_new_tokens": 8, "do_sample": False, "temperature": 0.7, "top_k": 5},
        {"max_new_tokens": 8, "do_sample": True, "top_k": 1},
    ],
)
def test_options_of_the_loop(options: dict[str, Any], tokenizer: Any, prompts: list[list[int]]) -> None:
    model = toy("rope")
    assert rules_of(model, options) is not None
    assert generate(model, tokenizer, prompts, 4, options) == alone(model, tokenizer, prompts, **options)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [21, 22, 23]}],
)
def test_options_that_the_loop_does_not_know(
    options: dict[str, Any], tokenizer: Any, prompts: list[list[int]]
) -> None:
    model = toy("rope")
    options = {**OPTIONS, **options}
    assert rules_of(model, options) is None
    assert generate(model, tokenizer, prompts, 4, options) == alone(model, tokenizer, prompts, **options)


def test_the_models_own_generation_config_counts(tokenizer: Any, prompts: list[list[int]]) -> None:
    model = toy("rope")
    plain = generate(model, tokenizer, prompts, 4, {"max_new_tokens": 24})
    model.generation_config.update(eos_token_id=ENDS, min_new_tokens=3, do_sample=True, top_k=9)
    found = generate(model, tokenizer, prompts, 4, {"max_new_tokens": 24})
    assert found == alone(model, tokenizer, prompts, max_new_tokens=24) != plain
    model.generation_config.repetition_penalty = 1.3
    assert rules_of(model, {"max_new_tokens": 24}) is None
    assert rules_of(model, {"max_new_tokens": 24, "repetition_penalty": 1.0}) is not None


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 7, "top_p": 0.8}, {"min_new_tokens": 6, "top_k": 0}]
)
def test_one_at_a_time_the_draws_are_those_of_generate(options: dict[str, Any], tokenizer: Any) -> None:
    """Same distribution, so the same tokens where torch's generator begins at the same place."""
    model = toy("rope")
    options = {**OPTIONS, "do_sample": True, **options}
    prompts = [[30 + length] * (9 - length) for length in range(8)]  # the longest first, as they are taken
    torch.manual_seed(1)
    expected = alone(model, tokenizer, prompts, **options)
    torch.manual_seed(1)
    assert generate(model, tokenizer, prompts, 1, options) == expected
    torch.manual_seed(2)
    assert generate(model, tokenizer, prompts, 1, options) != expected


def test_rows_may_run_past_the_positions_as_with_generate(tokenizer: Any, prompts: list[list[int]]) -> None:
    model, learned = toy("rope"), toy("learned")
    options = {"max_new_tokens": 110, "eos_token_id": None}
    longest = [prompt for prompt in prompts if len(prompt) == 30][:3]
    assert generate(model, tokenizer, longest, 2, options) == alone(model, tokenizer, longest, **options)
    for way in (
        lambda: alone(learned, tokenizer, longest, **options),
        lambda: generate(learned, tokenizer, longest, 2, options),
    ):
        with pytest.raises(IndexError):
            way()


def test_a_prompt_that_leaves_no_room_is_told(tokenizer: Any, prompts: list[list[int]]) -> None:
    with pytest.raises(HfkitError, match="max_length=30: must be more than the 30 tokens of a prompt; raise it"):
        generate(toy("rope"), tokenizer, prompts, 4, {"max_length": 30})


# ---- models


def test_an_adapter_is_called_without_its_wrapper(tokenizer: Any, prompts: list[list[int]]) -> None:
    import peft

    base = toy("rope")
    without = generate(base, tokenizer, prompts, 5, OPTIONS)
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    assert plain_decoder(model) is model.get_base_model()
    found = generate(model, tokenizer, prompts, 5, OPTIONS)
    assert found == alone(model.eval(), tokenizer, prompts, **OPTIONS) != without
    with model.disable_adapter():
        assert generate(model, tokenizer, prompts, 5, OPTIONS) == without


def test_a_learned_prompt_is_left_to_generate(tokenizer: Any, prompts: list[list[int]]) -> None:
    import peft

    config = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=3)
    model: Any = peft.get_peft_model(toy("llama"), config).eval()
    assert plain_decoder(model) is None
    found = generate(model, tokenizer, prompts, 1, OPTIONS)  # PEFT leaves out the positions that padding asks for
    assert found == alone(model, tokenizer, prompts, **OPTIONS)
    assert found != generate(toy("llama"), tokenizer, prompts, 5, OPTIONS)


@pytest.mark.parametrize("name", ["mistral", "mamba", "t5"])
def test_other_caches_are_left_to_generate(name: str, tokenizer: Any, prompts: list[list[int]]) -> None:
    torch.manual_seed(0)
    if name == "mistral":
        config = MistralConfig(**SHAPE, intermediate_size=64, num_key_value_heads=2, sliding_window=4)
        model: Any = MistralForCausalLM(config)
    elif name == "mamba":
        model = MambaForCausalLM(MambaConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, state_size=4))
    else:
        shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, initializer_factor=3.0, **shape))
    assert plain_decoder(model) is None
    # Mamba reads the padding of a batch like any token.
    batch_size = 1 if name == "mamba" else 5
    expected = alone(model.eval(), tokenizer, prompts, **OPTIONS)
    assert generate(model, tokenizer, prompts, batch_size, OPTIONS) == expected and len(set(expected)) > 3


# ---- work


def test_no_row_is_computed_after_it_ended_and_no_slot_waits(tokenizer: Any, prompts: list[list[int]]) -> None:
    """A token costs a row of one forward pass, and a row of logits; the batch is full as long as there are prompts."""
    model = toy("llama")
    prompts = [prompt for prompt in prompts if len(prompt) > 1]
    tokens = tokens_alone(model, prompts, **OPTIONS)
    passes: list[tuple[int, int]] = []

    def count(module: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
        rows, width = inputs["input_ids"].shape
        passes.append((rows, width))
        assert output.logits.shape == (rows, 1, WORDS)

    model.register_forward_hook(count, with_kwargs=True)
    generate(model, tokenizer, prompts, 6, OPTIONS)
    reads, steps = ([rows for rows, width in passes if (width > 1) == is_read] for is_read in (True, False))
    assert sum(reads) == len(prompts) and min(reads[:-1]) == 3
    assert sum(steps) == sum(len(row) - 1 for row in tokens)
    last_read = max(place for place, (_, width) in enumerate(passes) if width > 1)
    while_prompts_wait = [rows for rows, width in passes[:last_read] if width == 1]
    assert 6 < steps[0] <= 9 and sum(while_prompts_wait) >= 6 * len(while_prompts_wait)


# ---- processes


def test_two_processes_give_each_row_one_result(there: Path) -> None:
    """Rows that do not divide among them: predictions and scores are those of one process."""
    (there / RECIPE).write_text(EVALUATE, encoding="utf-8")
    model = load_model("runs/pretrain")
    torch.manual_seed(0)
    for parameter in model.parameters():  # so that answers are unlike
        parameter.data.normal_(std=0.3)
    model.save_pretrained("runs/wild")
    AutoTokenizer.from_pretrained("runs/pretrain").save_pretrained("runs/wild")
    options = ["model=runs/wild", "limit=13", "generation.max_new_tokens=12"]
    assert cli.main(["run", RECIPE, *options, "output_dir=runs/one"]) == 0
    done = on_two("run", RECIPE, *options, "output_dir=runs/two", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    found = []
    for name in ("one", "two"):
        lines = Path(f"runs/{name}/predictions.jsonl").read_text(encoding="utf-8").splitlines()
        found.append((list(map(json.loads, lines)), json.loads(Path(f"runs/{name}/metrics.json").read_text())))
    (rows, scores), (rows_of_two, scores_of_two) = found
    assert len(rows) == 13 == scores["rows"] and len({row["prediction"] for row in rows}) > 9
    assert rows_of_two == rows
    numbers = {key for key, value in scores.items() if isinstance(value, float)}
    assert len(numbers) > 10 and scores_of_two.keys() == scores.keys()
    for key in numbers:
        assert scores_of_two[key] == pytest.approx(scores[key], rel=1e-6), key


@pytest.mark.faults
def test_processes_that_share_a_sharded_model_generate_together(there: Path) -> None:
    """Rows that do not divide among them would leave one process waiting for a forward pass of the other."""
    script = Path(__file__).with_name("fsdp_on_cpu.py")
    keys = ["train.use_cpu=true", "train.max_steps=150", "train.learning_rate=5e-3", "train.save_strategy=no",
            "train.per_device_train_batch_size=2", "lora=null", "evaluation_rows=13"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    done = subprocess.run([*command, "recipes/finetune.yaml", *keys], env={**os.environ, **FSDP}, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(Path("runs/finetune/metrics.json").read_text())
    model, tokenizer = load_model("runs/finetune"), AutoTokenizer.from_pretrained("runs/finetune")
    task = Generate("{question} ->", " {answer}")
    expected = TaskMetrics(task, "runs/tasks", tokenizer, 2, {}, 32, 13)(model, "test")
    assert expected["rouge1"] > 0.1 and expected == pytest.approx({name: found[name] for name in expected})
