"""The result of a training for a person, on the screen."""

import sys
from pathlib import Path

from hfkit.artifacts.manifest import Metrics
from hfkit.metrics.catalogue import scores_of_training
from hfkit.training.callbacks import speed_lines


def summary(metrics: Metrics, samples: list[tuple[str, str]], folder: Path) -> str:
    """Return the result for a person: quality beside its peer, speed beside its roof, and where everything is."""
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
    lines += speed_lines(metrics)
    lines += [
        f"  {metrics['parameters']:,} parameters, {metrics['size_bytes'] / 1e6:,.1f} MB on disk",
        f"  model, tokenizer, README.md, metrics.json, metrics.jsonl and loss.png are in {folder}/",
    ]
    return "\n".join(lines)


def task_summary(metrics: Metrics, folder: Path) -> str:
    """Return the result of a fine-tuning for a person."""
    shown = dict.fromkeys([*scores_of_training(("texts", "likelihood")), *scores_of_training(("classes",), None)])
    lines = ["", "  test", *(f"    {name:<12} {metrics[name]:10.4g}" for name in shown if name in metrics), ""]
    lines += speed_lines(metrics)
    return "\n".join([*lines, f"  {metrics['size_bytes'] / 1e6:,.1f} MB; everything is in {folder}/"])
