"""What hfkit does on one GPU, in parts that each end in minutes and are resumed.

    python benchmarks/gpu.py --out benchmarks/results/gpu      # again and again, until it says that all parts are done
    python benchmarks/gpu.py --out /tmp/toy --toy              # every part at toy size, also on a CPU

The parts stand in the order of their worth. Each runs in a process of its own and leaves `<part>.json` with the card,
the versions and its numbers, or the traceback of what failed. A part that is there is skipped (`--retry` runs failed
ones again), and one that may not fit into what is left of `--budget` is left to the next call.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import gpu_parts as parts  # noqa: E402 after the path that it is on

Part = Callable[[parts.Size | None], dict[str, Any]]
# In the order of their worth, each with the seconds that it may take on a GPU.
PARTS: dict[str, tuple[Part, int]] = {
    "main_job": (parts.main_job, 420),
    "gpu_tests": (parts.gpu_tests, 520),
    "pretrain_124m": (parts.pretrain("124m"), 420),
    "pretrain_350m": (parts.pretrain("350m"), 500),
    "lora": (parts.adapters(None), 400),
    "qlora": (parts.adapters("nf4"), 400),
    "distillation": (parts.distillation, 400),
    "loss_memory": (parts.loss_memory, 60),
    "quantized": (parts.quantized, 240),
    "generation": (parts.generation, 240),
}


def machine() -> dict[str, Any]:
    """The card, its driver, and the versions of what runs on it."""
    found: dict[str, Any] = {"device": platform.processor() or "CPU", "torch": torch.__version__}
    for name in ("transformers", "accelerate", "peft", "bitsandbytes", "trl", "liger_kernel", "flash_attn"):
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory
        found |= {"device": properties.name, "memory_bytes": memory, "driver": driver, "cuda": torch.version.cuda}
    return found


def record(part: str, out: Path, size: parts.Size | None) -> None:
    """Run a part in this process and write its JSON."""
    begun = time.perf_counter()
    result = parts.attempted(lambda: PARTS[part][0](size))
    told = {"part": part, "machine": machine(), "seconds": time.perf_counter() - begun, "result": result}
    write(out / f"{part}.json", told)


def write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are not there yet, as far as the budget goes.

    Returns:
        0 once all parts are done, 75 where a further call is needed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", type=float, default=540, help="seconds after which the call ends")
    parser.add_argument("--toy", action="store_true", help="every part at toy size")
    parser.add_argument("--retry", action="store_true", help="run parts again that failed")
    parser.add_argument("--here", action="store_true", help="in this process, without a limit of time")
    options = parser.parse_args(arguments)
    size, begun = parts.TOY if options.toy else None, time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    waiting = [part for part in options.parts if not is_done(options.out / f"{part}.json", options.retry)]
    for number, part in enumerate(waiting):
        if options.here:
            record(part, options.out, size)
            continue
        left = options.budget - (time.perf_counter() - begun)
        if number and left < (60 if options.toy else PARTS[part][1]):
            print(f"{', '.join(waiting[number:])}: left to the next call", flush=True)
            return 75
        command = [sys.executable, __file__, "--here", "--parts", part, "--out", str(options.out)]
        try:
            subprocess.run([*command, *(["--toy"] if options.toy else []), "--retry"], timeout=left, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            if number and isinstance(error, subprocess.TimeoutExpired):  # the next call gives it the whole budget
                print(f"{', '.join(waiting[number:])}: left to the next call", flush=True)
                return 75
            write(options.out / f"{part}.json", {"part": part, "machine": machine(), "result": {"failed": str(error)}})
        print(f"{part}: {time.perf_counter() - begun:.0f} s", flush=True)
    return 0


def is_done(path: Path, is_retry: bool) -> bool:
    if not path.is_file():
        return False
    return not (is_retry and "failed" in json.dumps(json.loads(path.read_text(encoding="utf-8"))["result"]))


if __name__ == "__main__":
    raise SystemExit(main())
