"""What several test files do: work in a folder, and a command on two processes without the time to load libraries."""

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 300.0  # seconds


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Let a folder be the working directory, for fixtures that outlive a test."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Zygote:
    """`tests/zygote.py`, one for a test worker."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.zygote"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, cwd=ROOT, env=dict(os.environ), **pipes)
        atexit.register(self.process.kill)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def ask(self, **request: object) -> int | None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@functools.cache
def _zygote() -> Zygote:
    return Zygote()


def on_two(*argv: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `hfkit ARGV` or a script on two processes that know each other as torchrun's do, on CPUs.

    What torchrun itself does is tested in test_launch.py. Where one of them fails, the other is ended.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives them, as a launcher's does
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/{name}" for name in ("stdout", "stderr")]
        of_launcher = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
        }
        of_launcher |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
        children = []
        for rank in ("0", "1"):
            known = {**os.environ, **environment, **of_launcher, "RANK": rank, "LOCAL_RANK": rank}
            child = _zygote().ask(argv=argv, cwd=os.getcwd(), environment=known, outputs=outputs)
            assert child is not None
            children.append(child)
        codes = _codes(children)
        stdout, stderr = (Path(path).read_text(encoding="utf-8", errors="replace") for path in outputs)
    return subprocess.CompletedProcess(list(argv), next((code for code in codes if code), 0), stdout, stderr)


def _codes(children: list[int]) -> list[int]:
    """The exit codes, in the order in which they came."""
    codes: list[int] = []
    end = time.monotonic() + PATIENCE
    while children:
        for child in list(children):
            code = _zygote().ask(wait=child)
            if code is not None:
                children.remove(child)
                codes.append(code)
        if children and (time.monotonic() > end or any(code not in (0, 75) for code in codes)):
            time.sleep(2)  # to say what it has to say
            for child in children:
                os.killpg(child, 9)
        time.sleep(0.05)
    return codes
