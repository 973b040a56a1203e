"""Peak memory and speed of preparing and tokenizing a gigabyte of text.

    python benchmarks/prepare_memory.py            # writes benchmarks/results/prepare_memory.json

The text is the standard library over and over, in documents of about 4 kB that differ by a number, as JSON lines. The
peak is that of the resident memory of a process that runs nothing else.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hfkit.data.sources import stdlib

TOKENIZE = """
from pathlib import Path
from hfkit.data.packing import token_rows
from hfkit.data.tokenizer import load_tokenizer
token_rows("runs/data", load_tokenizer("runs/tokenizer"), 1024, "documents", Path("runs"))
"""


def write_corpus(path: Path, size: int) -> None:
    library = "".join(content.decode("utf-8", "replace") for _, content in stdlib.documents())
    pieces = [library[start : start + 4000] for start in range(0, len(library), 4000)]
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            text = f"{number}\n{pieces[number % len(pieces)]}"
            file.write(json.dumps({"text": text}) + "\n")
            written, number = written + len(text), number + 1


def measure(command: list[str], folder: Path) -> dict[str, float]:
    """Seconds and peak resident memory of a command."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return {"seconds": time.perf_counter() - begun, "peak_gb": usage.ru_maxrss / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=10**9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "texts.jsonl", options.bytes)
        data = {"stage": "prepare", "sources": [{"files": "texts.jsonl"}]}
        (folder / "data.yaml").write_text(json.dumps(data), encoding="utf-8")
        (folder / "tokenizer.yaml").write_text(
            json.dumps({"stage": "tokenizer", "data": "data.yaml", "sample_bytes": 20_000_000}), encoding="utf-8"
        )
        hfkit = [sys.executable, "-m", "hfkit", "run"]
        result = {
            "bytes": options.bytes,
            "prepare": measure([*hfkit, "data.yaml"], folder),
            "tokenizer": measure([*hfkit, "tokenizer.yaml"], folder),
            "tokenize": measure([sys.executable, "-c", TOKENIZE], folder),
            "python_itself_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        }
    path = Path(__file__).parent / "results" / "prepare_memory.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
