"""MB/s of preparing text: ftfy on whole texts or around what is not ASCII, and one process or one for each core.

    python benchmarks/prepare_speed.py [FILES]      # writes benchmarks/results/prepare_speed.json

FILES is a file, folder or glob that `files:` of a recipe takes. By default it is the standard library with the quotes
and dashes that printers use, over and over, in documents of about 4 kB that differ by a number, as JSON lines. The
ways run in turn, and all must write the same files. MB of text that is kept, by the seconds of the clock (`wall`) and
by those of all processors together (`cpu`), which other work beside it disturbs less. Start-up is left out.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from ftfy.badness import is_bad

from hfkit.artifacts import manifest
from hfkit.data import cleaning
from hfkit.data.sources import stdlib
from hfkit.runtime.cores import usable_cores
from hfkit.stages import prepare

ROUNDS = 3
CORES = usable_cores()


def write_corpus(path: Path, size: int) -> None:
    library = "".join(content.decode("utf-8", "replace") for _, content in stdlib.documents())
    library = library.replace("'", "\u2019").replace(" - ", " \u2014 ").replace("...", "\u2026")
    texts = [library[start : start + 4000] for start in range(0, len(library), 4000)]
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            file.write(json.dumps({"text": f"{number}\n{texts[number % len(texts)]}"}, ensure_ascii=False) + "\n")
            written, number = written + len(texts[number % len(texts)]), number + 1


@contextlib.contextmanager
def way(processes: int, on_whole_texts: bool) -> Iterator[None]:
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(prepare, "usable_cores", lambda: processes))
        if on_whole_texts:
            patches.enter_context(mock.patch.object(cleaning, "may_be_mojibake", is_bad))
        yield


def measure(recipe: prepare.Recipe) -> tuple[dict[str, float], str]:
    """MB/s and the digest of the files."""
    with tempfile.TemporaryDirectory() as folder:
        begun, cpu = time.perf_counter(), sum(os.times()[:4])
        size = prepare.run(recipe, {}, Path(folder))["bytes"] / 1e6
        speeds = {"wall": size / (time.perf_counter() - begun), "cpu": size / (sum(os.times()[:4]) - cpu)}
        return speeds, manifest.digest_of(manifest.describe_files(Path(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="?")
    parser.add_argument("--bytes", type=int, default=10**8)
    options = parser.parse_args()
    ways = {"whole_texts": (1, True), "one_process": (1, False), "all_cores": (CORES, False)}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        files = options.files or f"{folder}/texts.jsonl"
        if options.files is None:
            write_corpus(Path(files), options.bytes)
        recipe = prepare.Recipe.model_validate({"stage": "prepare", "sources": [{"files": files}]})
        for _ in range(ROUNDS):
            for name, (processes, on_whole_texts) in ways.items():
                with way(processes, on_whole_texts):
                    speeds, digest = measure(recipe)
                rounds[name].append(speeds)
                digests.add(digest)
    assert len(digests) == 1, "all ways write the same files"
    medians = {
        name: {unit: statistics.median(each[unit] for each in speeds) for unit in ("wall", "cpu")}
        for name, speeds in rounds.items()
    }
    result: dict[str, Any] = {
        "megabytes_per_second": medians,
        "one_process_over_whole_texts": medians["one_process"]["cpu"] / medians["whole_texts"]["cpu"],
        "all_cores_over_one_process": medians["all_cores"]["wall"] / medians["one_process"]["wall"],
        "cores": CORES,
        "rounds": rounds,
        "load": os.getloadavg(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
    }
    path = Path(__file__).parent / "results" / "prepare_speed.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
