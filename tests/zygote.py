"""A process that has loaded the libraries, and forks for each command that a test asks for (`tests.kit`).

It reads a request a line, JSON: `argv` (of hfkit, or a script with its arguments), `cwd`, `environment`, and two files
as `outputs`. It answers with the id of the child; and to `wait` for one, with its exit code, or null while it runs.
Nothing runs in it but imports, so that a child begins as a new process does.
"""

import gc
import json
import os
import runpy
import sys
import traceback

import datasets  # noqa: F401
import peft  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

from hfkit import cli
from hfkit.distillation import trainer  # noqa: F401
from hfkit.evaluation import measuring  # noqa: F401
from hfkit.training import classification, saving, task_metrics  # noqa: F401


def run(request: dict) -> int:
    """The child: becomes the process that was asked for."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor, path in zip((1, 2), request["outputs"], strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    program, *arguments = request["argv"]
    sys.argv = [program, *arguments]
    if not program.endswith(".py"):
        return cli.main([program, *arguments])
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def main() -> None:
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            ended, status = os.waitpid(request["wait"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), flush=True)
        else:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = run(request)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            print(json.dumps(child), flush=True)


if __name__ == "__main__":
    main()
