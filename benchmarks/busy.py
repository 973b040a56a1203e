"""Tokens per second of the main job's training step by how its threads wait, alone and beside a busy process.

    python benchmarks/busy.py                         # writes benchmarks/results/busy.json, in under five minutes
    python benchmarks/busy.py --spins 300 1000 5000   # other counts to compare

Each setting of the OpenMP runtime trains in a process of its own, as it is read once, when torch loads it. The
processes are all there from the beginning and take turns of a few seconds, several times over, so that what else runs
on the machine meets all of them; who has no turn sleeps. The busy process is a loop that never waits.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfkit.runtime.cores import SPIN_COUNT, usable_cores

RESULT = Path(__file__).parent / "results" / "busy.json"
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
TOKENS, ROWS, VOCABULARY = 256, 16, 4096


def train() -> None:
    """The training of one setting: a line of input is a turn of so many seconds, a line of output its tokens/s."""
    import torch
    from transformers import TrainerCallback

    from hfkit.model import HfkitConfig, HfkitForCausalLM
    from hfkit.training.settings import Optimizer
    from hfkit.training.trainer import HfkitTrainer, training_arguments

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10_000_000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(TOKENS) % (TOKENS // 2)}

    class Turns(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.left = 3  # steps until everything is compiled

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.left -= 1
            now = time.perf_counter()
            if self.left > 0 or (self.left < 0 and now < self.end):
                return
            if self.left < 0:
                print((state.global_step - self.step) * ROWS * TOKENS / (now - self.begun), flush=True)
            else:
                print("ready", flush=True)
            turn = sys.stdin.readline()
            control.should_training_stop = not turn
            self.step, self.begun, self.left = state.global_step, time.perf_counter(), 0
            self.end = self.begun + float(turn or 0)

    torch.manual_seed(0)
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4}
    model = HfkitForCausalLM(
        HfkitConfig(vocab_size=VOCABULARY, hidden_size=128, max_position_embeddings=TOKENS, **heads)
    )
    options = json.loads(os.environ["BUSY_OPTIONS"])
    with tempfile.TemporaryDirectory() as folder:
        values = {"max_steps": 10**6, "per_device_train_batch_size": ROWS, "save_strategy": "no", "report_to": "none"}
        values |= {"logging_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": options["bf16"]}
        trainer = HfkitTrainer(
            model,
            training_arguments(values, Path(folder)),
            train_dataset=Rows(),
            optimizer=Optimizer(name="muon"),
            decided={"torch_compile": "layers" if options["compiled"] else False, "muon_precision": "fp32"},
        )
        trainer.add_callback(Turns())
        trainer.train()


def started(setting: dict[str, str], options: dict[str, Any]) -> "subprocess.Popen[str]":
    """A training that is compiled and waits for its turn."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= setting | {"OMP_NUM_THREADS": str(usable_cores()), "BUSY_OPTIONS": json.dumps(options)}
    command = [sys.executable, __file__, "--train"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process: subprocess.Popen[str] = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "ready":
            return process
    raise SystemExit(f"{setting}: the training failed")


def turn(process: "subprocess.Popen[str]", seconds: float) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--spins", type=int, nargs="*", default=[], help=f"counts beside hfkit's, {SPIN_COUNT:,}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="by default the one that is faster here")
    parser.add_argument("--not-compiled", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.train:
        train()
        return
    import torch

    from hfkit.runtime.devices import fastest_precision

    precision = options.precision or fastest_precision(torch.device("cpu"))[0]
    settings: dict[str, dict[str, str]] = {"default": {}, "hfkit": {"GOMP_SPINCOUNT": str(SPIN_COUNT)}}
    settings["OMP_WAIT_POLICY=PASSIVE"] = {"OMP_WAIT_POLICY": "PASSIVE"}
    settings |= {f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in options.spins}
    worker = {"bf16": precision == "bf16", "compiled": not options.not_compiled}
    processes = {name: started(setting, worker) for name, setting in settings.items()}
    speeds: dict[str, dict[str, list[float]]] = {name: {} for name in settings}
    try:
        for label, others in (("alone", 0), ("beside one busy process", 1)):
            with busy(others):
                for _ in range(options.rounds):
                    for name, process in processes.items():
                        speeds[name].setdefault(label, []).append(turn(process, options.seconds))
                        print(f"{label}: {name}: {speeds[name][label][-1]:,.0f} tokens/s", flush=True)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    rows: dict[str, Any] = {}
    for name, of_label in speeds.items():
        rows[name] = {label: statistics.median(values) for label, values in of_label.items()}
        # of the turns of one round, which lie beside each other in time
        for label, values in of_label.items():
            pairs = zip(values, speeds["default"][label], strict=True)
            rows[name][f"{label}, times the default"] = statistics.median(ours / default for ours, default in pairs)
    result = {
        "device": f"CPU, {usable_cores()} threads",
        "precision": precision,
        "compiled": not options.not_compiled,
        "spin_count": SPIN_COUNT,
        "tokens_per_second": rows,
        "rounds": speeds,
        "torch": torch.__version__,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
