"""What hfkit does on one GPU, in parts that each end in minutes and are resumed.

    python benchmarks/gpu.py                                # again and again, until it ends with 0
    python benchmarks/gpu.py --out /tmp/toy --toy           # every part at toy size, also on a CPU

The parts stand in the order of their worth, and each is made of pieces. A part runs in a process of its own, and keeps
`<part>.json`: of each piece the card, the seconds and the numbers, or why it was left out, or the traceback of what
failed. What may not fit into the rest of `--budget` is left to the next call, which goes on with the first piece that
is not there. Only a piece that takes longer than a whole call counts as failed. `--retry` runs again what failed.
"""

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # of the scripts beside this one
import gpu_parts as parts  # noqa: E402

from hfkit.runtime import resources  # noqa: E402

Part = Callable[[parts.Size | None], parts.Pieces]
# In the order of their worth, each with the seconds that one piece may take on a GPU.
PARTS: dict[str, tuple[Part, int]] = {
    "main_job": (parts.main_job, 400),
    "gpu_tests": (parts.gpu_tests, 400),
    "pretrain_124m": (parts.pretrain("124m"), 150),
    "pretrain_350m": (parts.pretrain("350m"), 250),
    "lora": (parts.adapters(None), 250),
    "qlora": (parts.adapters(parts.NF4), 250),
    "distillation": (parts.distillation, 200),
    "loss_memory": (parts.loss_memory, 60),
    "quantized": (parts.quantized, 150),
    "generation": (parts.generation, 200),
}
AGAIN = 75  # the exit code where a further call is needed
PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "liger_kernel", "flash_attn")


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else str(resources.hardware()["processor"])


def machine() -> dict[str, Any]:
    """The card, its memory and driver, and the versions of what runs on it."""
    found = {"card": card(), **resources.hardware()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        found |= {"gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory, "cuda": torch.version.cuda}
    return found


# ---- what is kept


class Record:
    """The JSON of a part: `result` holds its pieces, `running` the one that is measured now or was cut."""

    def __init__(self, out: Path, part: str):
        self.path = out / f"{part}.json"
        content = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.content: dict[str, Any] = {"part": part, "is_done": False, "result": {}, **content}

    @property
    def pieces(self) -> dict[str, dict[str, Any]]:
        return self.content["result"]

    def keep(self, **more: Any) -> None:
        self.content |= more
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path)

    def forget_failed(self) -> None:
        kept = {name: piece for name, piece in self.pieces.items() if "failed" not in piece}
        if len(kept) < len(self.pieces):
            self.keep(is_done=False, result=kept)

    def give_up(self, why: str) -> None:
        """Count the piece that is running as failed; where none is, the whole part."""
        name = self.content.get("running") or "part"
        self.pieces[name] = {"failed": why}
        self.keep(running=None, is_done=name == "part")


def measure(part: str, out: Path, size: parts.Size | None, end: float) -> bool:
    """Measure the pieces of a part that are not there yet, here, and keep each at once.

    Args:
        end: by the clock; a piece that may not be ready then is not begun, unless it is the first.

    Returns:
        Whether all are there.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of each product in int8
    (pieces_of, seconds), record, is_begun = PARTS[part], Record(out, part), False
    try:
        for name, work in pieces_of(size):
            if name in record.pieces:
                continue
            if is_begun and time.time() + (seconds if size is None else 10) > end:
                return False
            is_begun, begun = True, time.time()
            record.keep(running=name, machine=machine())
            found = parts.attempted(work)
            record.pieces[name] = {**found, "card": card(), "seconds": round(time.time() - begun, 1)}
            record.keep(running=None)
            how = next((f": {word}" for word in ("failed", "skipped") if word in found), "")
            print(f"{part}: {name}: {time.time() - begun:.0f} s{how}", flush=True)
    except Exception:  # before a piece
        record.give_up(parts.traceback.format_exc())
    record.keep(is_done=True)
    return True


# ---- running them


def child(command: list[str], seconds: float) -> int | None:
    """The exit code of a command; None where it took too long and was ended, with all that it had started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except BaseException as error:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


def main(arguments: list[str] | None = None) -> int:
    """Run what is not there yet, as far as the budget goes.

    Returns:
        0 once all is there, 75 where a further call is needed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", type=float, default=540, help="seconds of a call")
    parser.add_argument("--toy", action="store_true", help="every part at toy size")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--here", action="store_true", help="in this process, where nothing is cut off")
    options = parser.parse_args(arguments)
    end, is_first = time.time() + options.budget, True
    options.out.mkdir(parents=True, exist_ok=True)
    if options.retry:
        for part in options.parts:
            Record(options.out, part).forget_failed()
    waiting = [part for part in options.parts if not Record(options.out, part).content["is_done"]]
    while waiting:
        part, before = waiting[0], len(Record(options.out, waiting[0]).pieces)
        left = end - time.time()
        if not is_first and left < (10 if options.toy else PARTS[part][1]):
            break
        if options.here:
            code: int | None = 0 if measure(part, options.out, parts.TOY if options.toy else None, end) else AGAIN
        else:
            toy = ["--toy"] if options.toy else []
            command = [sys.executable, __file__, "--here", "--parts", part, "--out", str(options.out), *toy]
            code = child([*command, "--budget", str(left)], left)
        record = Record(options.out, part)
        if code is None and is_first and len(record.pieces) == before:
            record.give_up(f"took more than the {options.budget:.0f} s of a whole call")
        elif code not in (None, 0, AGAIN):
            record.give_up(f"its process ended with {code}")
        if record.content["is_done"]:
            waiting.pop(0)
        if code in (None, AGAIN):
            break
        is_first = False
    if waiting:
        print(f"{', '.join(waiting)}: left to the next call", flush=True)
    return AGAIN if waiting else 0


if __name__ == "__main__":
    raise SystemExit(main())
