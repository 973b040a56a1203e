"""Makes the fault that the environment variable HFKIT_FAULT describes, in a process that knows nothing of it.

Python imports this module at start-up where its folder stands first on PYTHONPATH. HFKIT_FAULT is JSON:

    do      kill | fill | wait | list | loss | gradient
    save    a step: each write to the folder of its checkpoint counts, and to others until the next one begins
    scope   or `hfkit.module:function`: each write inside it counts
    write   the number of the write at which to do it; kill: before it is made, or in the middle of it
    forward, evaluation   or instead: the step in whose forward pass or evaluation to do it
    steps   of loss and gradient: where `value` (nan, inf) is put; at the step `die`, if any, the process is killed
    file    list: where the writes are listed. wait: made with the process id in it, until somebody removes it.
            fill: grows until the disk is full
    after   a path that must be there first; it is waited for
    rank    the process that has the fault, 0 by default
"""

import contextlib
import functools
import importlib.abc
import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

_fault: dict[str, Any] = json.loads(os.environ.get("HFKIT_FAULT", "{}"))
_seen = {"writes": 0, "inside": 0, "over": 0, "acting": 0, "waits": 0, "step": 0}
_PATIENCE = 60.0


# ---- what is done


def _act(what: str, half: str | None = None) -> None:
    file = _fault.get("file", "")
    if "after" in _fault:
        _wait_while(lambda: not os.path.exists(_fault["after"]))
    if _fault["do"] == "list":
        with open(os.open(file, os.O_APPEND | os.O_CREAT | os.O_WRONLY), "a") as listed:
            listed.write(what + "\n")
    elif _fault["do"] == "kill":
        if half is not None:
            os.truncate(half, os.path.getsize(half) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    elif _fault["do"] == "fill" and not os.path.exists(file):
        with open(file, "wb", buffering=0) as filler:
            for block in (1 << 16, 1 << 10, 1):
                with contextlib.suppress(OSError):
                    while filler.write(b"x" * block):
                        pass
    elif _fault["do"] == "wait" and not _seen["waits"]:
        _seen["waits"] = 1
        with open(file + ".new", "w") as marker:
            marker.write(str(os.getpid()))
        os.rename(file + ".new", file)
        _wait_while(lambda: os.path.exists(file))


def _wait_while(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE
    while condition() and time.monotonic() < end:
        time.sleep(0.01)


# ---- writes


def _is_counted(path: str) -> bool:
    if "scope" in _fault:
        return _seen["inside"] > 0
    found = re.search(r"checkpoint-(\d+)", path)
    if found and int(found[1]) > _fault["save"]:
        _seen["over"] = 1
    elif found and int(found[1]) == _fault["save"]:
        _seen["inside"] = 1
    return not _seen["over"] and bool(_seen["inside"] and (found or "hfkit.started.json" in path))


def _write(what: str, path: str, half: bool = False) -> None:
    """A write is about to be made."""
    if _seen["acting"] or not _is_counted(path):
        return
    _seen["writes"] += 1
    if _fault["do"] == "list" or _seen["writes"] == _fault.get("write"):
        _seen["acting"] = 1
        try:
            _act(f"{what} {path}", path if half else None)
        finally:
            _seen["acting"] = 0


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        path = os.fsdecode(args[0])
        if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.startswith("/dev/"):
            _write("open", path)
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        path = os.fsdecode(args[0])
        if event in ("os.remove", "os.rmdir") and args[1] >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
        _write(event, path)


def _counts_its_writes(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if not _seen["writes"]:
            sys.addaudithook(_audit)
        _seen["inside"] += 1
        try:
            return function(*args, **kwargs)
        finally:
            _seen["inside"] -= 1

    return counted


def _tells_of_its_write(function: Callable[..., Any]) -> Callable[..., Any]:
    """C++ and Rust open files without telling Python."""

    @functools.wraps(function)
    def told(content: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        _write("write", os.fspath(path))
        result = function(content, path, *args, **kwargs)
        _write("half of", os.fspath(path), half=True)
        return result

    return told


# ---- numbers and places of a training


def _in_training_step(trainer_class: type) -> None:
    original = trainer_class.training_step

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        _seen["step"] = self.state.global_step + 1
        loss = original(self, model, *args, **kwargs)
        if _fault["do"] == "gradient" and _seen["step"] in _fault["steps"]:
            next(each.grad for each in model.parameters() if each.grad is not None).view(-1)[0] = float(
                _fault["value"]
            )
        return loss

    trainer_class.training_step = training_step


def _in_forward(model_class: type) -> None:
    original = model_class.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training and _seen["step"] and _fault.get("evaluation") == _seen["step"]:
            _act("evaluation")
        return original(self, *args, **kwargs)

    functools.update_wrapper(forward, original)
    model_class.forward = forward


def _in_loss(loss_class: type) -> None:
    """The loss of training, which is computed inside of its forward pass."""
    original = loss_class.__call__

    def call(*args: Any, **kwargs: Any) -> Any:
        if _seen["step"] and _fault.get("forward") == _seen["step"]:
            _act("forward")
        if _fault.get("die") == _seen["step"]:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = original(*args, **kwargs)
        return loss * float(_fault["value"]) if _fault["do"] == "loss" and _seen["step"] in _fault["steps"] else loss

    loss_class.__call__ = call


# ---- getting in


class _After(importlib.abc.MetaPathFinder):
    """Changes a module as soon as it has been imported."""

    def __init__(self, changes: dict[str, Callable[[ModuleType], None]]):
        self.changes = changes
        self.looking: set[str] = set()

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        change = self.changes.get(name)
        if change is None or name in self.looking:
            return None
        self.looking.add(name)
        spec = importlib.util.find_spec(name)
        self.looking.remove(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


def _wrap(name: str, wrapper: Callable[..., Any]) -> Callable[[ModuleType], None]:
    return lambda module: setattr(module, name, wrapper(getattr(module, name)))


if _fault and os.environ.get("RANK", "0") == str(_fault.get("rank", 0)):
    _changes: dict[str, Callable[[ModuleType], None]] = {}
    if "save" in _fault or "scope" in _fault:
        _changes["torch"] = _wrap("save", _tells_of_its_write)
        _changes["safetensors.torch"] = _wrap("save_file", _tells_of_its_write)
    if "save" in _fault:
        _changes["hfkit.training.checkpoints"] = lambda module: sys.addaudithook(_audit)
    elif "scope" in _fault:
        _module, _, _function = _fault["scope"].partition(":")
        _changes[_module] = _wrap(_function, _counts_its_writes)
    else:
        _changes["hfkit.training.resumable"] = lambda module: _in_training_step(module.ResumableTrainer)
        _changes["hfkit.training.trainer"] = lambda module: _in_loss(module.CrossEntropy)
        _changes["hfkit.model.modeling_hfkit"] = lambda module: _in_forward(module.HfkitForCausalLM)
    sys.meta_path.insert(0, _After(_changes))
