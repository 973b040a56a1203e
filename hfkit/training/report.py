"""The end of a language-model training: numbers on text never trained on, continuations, the folder, the summary."""

import contextlib
import itertools
import lzma
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, set_seed

from hfkit import manifest
from hfkit.data import corpus
from hfkit.model.heads import causal_of
from hfkit.ranks import on_main
from hfkit.training import checkpoints
from hfkit.training.callbacks import draw_loss, read_log
from hfkit.training.trainer import HfkitTrainer

XZ_LIMIT_BYTES = 4_000_000
TRAINING_ONLY = "distillation_projections."  # weights that a distillation learns beside the student
PROMPT_TOKENS, NEW_TOKENS = 12, 60


def evaluate(trainer: Any, validation: Any, test: Any) -> dict[str, float]:
    """What `trainer.evaluate` gives for the test split by its bare name, such as `loss`, and for validation."""
    on_validation = trainer.evaluate(validation, metric_key_prefix="validation")
    on_test = trainer.evaluate(test, metric_key_prefix="test")
    return {name.removeprefix("test_"): value for name, value in on_test.items()} | on_validation


def xz_bits_per_byte(data: str) -> float | None:
    """What `xz -9e` needs for the test split: a peer that everyone has. None for a text that would take it minutes."""
    text = "".join(corpus.texts(data, "test")).encode()
    if len(text) > XZ_LIMIT_BYTES:
        return None
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def continuations(folder: Path, device: torch.device, prompts: list[str] | None, data: str) -> list[tuple[str, str]]:
    """Prompts, by default the beginnings of three test documents, and how the saved model goes on, with a fixed seed.

    The model is loaded from the folder as its users will load it.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    if prompts is None:
        beginnings = [tokenizer.tokenize(text[:500]) for text in itertools.islice(corpus.texts(data, "test"), 3)]
        prompts = [tokenizer.convert_tokens_to_string(tokens[:PROMPT_TOKENS]) for tokens in beginnings]
    set_seed(0)
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        length = inputs["input_ids"].shape[1]
        room = model.config.max_position_embeddings - length
        output = model.generate(
            **inputs, max_new_tokens=min(NEW_TOKENS, room), do_sample=True, temperature=0.8, top_k=50
        )
        found.append((prompt, tokenizer.decode(output[0, length:], skip_special_tokens=True)))
    return found


def save(trainer: HfkitTrainer, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Put the model, its code and its tokenizer into the folder, each file whole. Returns their size in bytes."""
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every process has its part in it
    with checkpoints.disk_errors(folder):
        return on_main("save", lambda: _save_files(trainer, state_dict, tokenizer, folder))


def _save_files(
    trainer: HfkitTrainer, state_dict: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast, folder: Path
) -> int:
    work = folder / f".result{manifest.PARTIAL}"
    shutil.rmtree(work, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(TRAINING_ONLY)}
    for tied in model.all_tied_weights_keys:  # gathered from several processes it is a copy, no longer the same tensor
        weights.pop(tied, None)
    with _unsharded_class(causal_of(model)):
        model.save_pretrained(work, state_dict=weights)
    if isinstance(model, PeftModel) and model.active_peft_config.task_type == TaskType.SEQ_CLS:
        model.config.save_pretrained(work)  # with the names of the classes, which the base does not have
    elif isinstance(model, PeftModel):
        model.generation_config.save_pretrained(work)  # with the end of a turn, which the base does not have
    tokenizer.save_pretrained(work)
    manifest.sync_tree(work)
    size = 0
    for path in sorted(work.iterdir()):
        size += path.stat().st_size
        path.replace(folder / path.name)
    work.rmdir()
    draw_loss(read_log(folder / "metrics.jsonl"), folder / "loss.png")
    return size


@contextlib.contextmanager
def _unsharded_class(model: Any) -> Iterator[None]:
    """FSDP2 gives a model a class of its own, beside whose code that of the model would not be saved."""
    kind = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = kind.__bases__[1]
    try:
        yield
    finally:
        model.__class__ = kind


def summary(metrics: dict[str, Any], samples: list[tuple[str, str]], folder: Path) -> str:
    """The result for a person: quality beside its peer, speed beside its roof, and where everything is."""
    lines = [
        "",
        f"               {'loss':>8} {'perplexity':>11} {'bits per byte':>14}",
        f"  validation   {metrics['validation_loss']:8.3f} {metrics['validation_perplexity']:11.2f} "
        f"{metrics['validation_bits_per_byte']:14.3f}",
        f"  test         {metrics['loss']:8.3f} {metrics['perplexity']:11.2f} {metrics['bits_per_byte']:14.3f}",
    ]
    if metrics["xz_bits_per_byte"]:
        lines.append(f"  xz -9e, test {'':20} {metrics['xz_bits_per_byte']:14.3f}")
    lines.append("")
    for prompt, text in samples:
        both = f"{prompt}\033[1m{text}\033[0m" if sys.stdout.isatty() else f"{prompt} >>> {text}"
        shown = "\n    | ".join(both.splitlines())
        lines += [f"    | {shown}", ""]
    if metrics["tokens_per_second"]:
        lines.append(
            f"  trained at {metrics['tokens_per_second']:,.0f} tokens/s, "
            f"{metrics['roof_share']:.0%} of the measured matmul peak, in {metrics['train_seconds']:,.0f} s"
        )
    lines += [
        f"  {metrics['parameters']:,} parameters, {metrics['size_bytes'] / 1e6:,.1f} MB on disk",
        f"  model, tokenizer, README.md, metrics.json, metrics.jsonl and loss.png are in {folder}/",
    ]
    return "\n".join(lines)


def task_summary(metrics: dict[str, Any], folder: Path) -> str:
    """The result of a fine-tuning for a person."""
    shown = ("loss", "perplexity", "rouge1", "rouge2", "rougeL", "bleu", "exact_match", "accuracy", "f1", "f1_micro")
    lines = ["", "  test", *(f"    {name:<12} {metrics[name]:10.4g}" for name in shown if name in metrics), ""]
    if metrics["tokens_per_second"]:
        lines.append(
            f"  trained at {metrics['tokens_per_second']:,.0f} tokens/s, "
            f"{metrics['roof_share']:.0%} of the measured matmul peak, in {metrics['train_seconds']:,.0f} s"
        )
    return "\n".join([*lines, f"  {metrics['size_bytes'] / 1e6:,.1f} MB; everything is in {folder}/"])
