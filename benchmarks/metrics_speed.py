"""Seconds that ROUGE takes over 5,000 pairs, against `evaluate`'s; and what the other metrics and intervals take.

    python benchmarks/metrics_speed.py      # writes benchmarks/results/metrics_speed.json

`evaluate`'s rouge is rouge_score's RougeScorer and BootstrapAggregator, which are timed here without its download. The
texts are of three or so sentences a line, so that both split them alike; the values of all rows must be equal.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator

from hfkit.metrics.catalogue import load_metric

ROOT = Path(__file__).parent.parent
PAIRS = 5000
ROUNDS = 3
TYPES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def texts(seed: int = 0) -> tuple[list[str], list[str]]:
    """Summaries of 2 to 4 sentences of 8 to 25 words, as frequent as Zipf's law has it; half the words are kept."""
    generator = random.Random(seed)
    vocabulary = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(vocabulary) + 1)]
    words = iter(generator.choices(vocabulary, weights, k=PAIRS * 4 * 25 * 2))
    predictions, references = [], []
    for _ in range(PAIRS):
        lines = [[next(words) for _ in range(generator.randint(8, 25))] for _ in range(generator.randint(2, 4))]
        other = [[word if generator.random() < 0.5 else next(words) for word in line] for line in lines]
        generator.shuffle(other)
        references.append("\n".join(" ".join(line).capitalize() + "." for line in lines))
        predictions.append("\n".join(" ".join(line).capitalize() + "." for line in other))
    return predictions, references


def with_rouge_score(predictions: list[str], references: list[str]) -> list[dict[str, Any]]:
    """What `evaluate`'s rouge does."""
    scorer, aggregator = RougeScorer(TYPES), BootstrapAggregator()
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    for score in scores:
        aggregator.add_scores(score)
    aggregator.aggregate()
    return scores


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def main() -> None:
    predictions, references = texts()
    rouge = load_metric("rouge")
    rouge.compute(predictions=predictions[:10], references=references[:10])  # imports what it needs
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(seconds(lambda: rouge.compute(predictions=predictions, references=references))[0])
        spent, scores = seconds(lambda: with_rouge_score(predictions, references))
        theirs.append(spent)
    found = rouge.statistics(predictions, references)
    expected = np.array([[score[name].fmeasure for name in TYPES] for score in scores])
    error = float(np.abs(found.values[:, 1:] - expected).max())
    if error > 1e-9:
        raise SystemExit(f"the values differ by up to {error}")
    others = {}
    for name in ("sacrebleu", "bleu", "chrf", "exact_match", "distinct", "length"):
        metric = load_metric(name)
        others[name] = seconds(lambda metric=metric: metric.compute(predictions=predictions, references=references))[0]
    result = {
        "pairs": PAIRS,
        "rouge": statistics.median(ours),
        "rouge_score": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "largest_difference": error,
        "rouge_interval": seconds(found.intervals)[0],
        "rouge_paired_test": seconds(lambda: found.against(found))[0],
        "others": others,
        "rounds": {"rouge": ours, "rouge_score": theirs},
        "python": sys.version.split()[0],
    }
    path = ROOT / "benchmarks" / "results" / "metrics_speed.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
