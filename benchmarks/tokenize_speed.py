"""Tokenizing in bulk: fastokens, as hfkit takes it, beside the tokenizer itself, on the same texts.

    python benchmarks/tokenize_speed.py DATA TOKENIZER   # writes benchmarks/results/tokenize_speed.json

DATA is a prepared folder, TOKENIZER a folder, such as runs/data and runs/tokenizer. The ids are compared over all of
the training split; each way is a process of its own, so that its peak memory is its own, and is timed three times.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hfkit.runtime.cores import usable_cores

RESULTS = Path(__file__).parent / "results" / "tokenize_speed.json"
PIECE = 50_000  # characters of a text, so that the cores share long ones


def measure(data: str, place: str, way: str) -> dict[str, Any]:
    """MB/s and the digest of all ids; called in a process of its own."""
    import resource

    if way == "tokenizers":
        sys.modules["fastokens"] = None  # type: ignore[assignment]  as if it were not installed
    from hfkit.data import corpus
    from hfkit.data.encoding import bulk_encoder
    from hfkit.data.tokenizer import load_tokenizer

    whole = list(corpus.texts(data, "train"))
    texts = [text[start : start + PIECE] for text in whole for start in range(0, len(text), PIECE)]
    encode, name = bulk_encoder(load_tokenizer(place), [text[:10_000] for text in texts[:200]])
    assert name == way, f"{name} was taken"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    digest, seconds = hashlib.sha256(), 0.0
    for start in range(0, len(texts), 64):
        begun = time.perf_counter()
        found = encode(texts[start : start + 64])
        seconds += time.perf_counter() - begun
        for ids in found:
            digest.update(ids.astype("<u4").tobytes())
    size = sum(len(text.encode()) for text in texts)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"mb_per_second": size / 1e6 / seconds, "ids": digest.hexdigest(), "memory_mb": grown / 1024, "bytes": size}


def in_process(data: str, place: str, way: str, threads: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, data, place, "--way", way],
        env={**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("tokenizer")
    parser.add_argument("--way", choices=("fastokens", "tokenizers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.data, options.tokenizer, options.way)))
        return
    result: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": usable_cores()}
    for threads in dict.fromkeys((1, usable_cores())):
        found = {
            way: [in_process(options.data, options.tokenizer, way, threads) for _ in range(3)]
            for way in ("tokenizers", "fastokens")
        }
        assert len({run["ids"] for runs in found.values() for run in runs}) == 1, "the ids differ"
        row = {
            way: {
                "mb_per_second": statistics.median(run["mb_per_second"] for run in runs),
                "memory_mb": statistics.median(run["memory_mb"] for run in runs),
            }
            for way, runs in found.items()
        }
        ratio = row["fastokens"]["mb_per_second"] / row["tokenizers"]["mb_per_second"]
        result[f"{threads} threads"] = {**row, "ratio": ratio}
        print(f"{threads} threads: {ratio:.1f}x", {way: round(each["mb_per_second"], 1) for way, each in row.items()})
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
