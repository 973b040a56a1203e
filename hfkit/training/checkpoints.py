"""Checkpoints that are whole or not there: written beside their place, described, synced, renamed.

A checkpoint is the folder `checkpoint-<step>` of a run. `checkpoint.json`, written last, holds the size and SHA-256 of
every file; a folder without it was never committed. All processes must see one file system: on several machines with
disks of their own nothing could be renamed for all of them at once, so the run's folder has to be a shared one.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from safetensors import SafetensorError

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json
from hfkit.errors import HfkitError
from hfkit.runtime.cores import usable_cores
from hfkit.runtime.distributed import is_main, of_all, on_main, say

DESCRIPTION = "checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_BAD_NAME = re.compile(r"checkpoint-\d+\.corrupt\d*")
_SPARE_BYTES = 1 << 20
_background = concurrent.futures.ThreadPoolExecutor(1, "commit")
_DISK_SIGNS = ("PytorchStreamWriter", "iostream", "unexpected pos", "I/O error", "os error")


def committed(run: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by their step, oldest first. They have their name, but are not verified."""
    paths = {int(match[1]): path for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(paths.items()))


def last(run: Path) -> Path | None:
    """Return the newest checkpoint, not verified."""
    return next(reversed(committed(run).values()), None)


def size_of(checkpoint: Path) -> int:
    """Return the size of a checkpoint in bytes."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def has_any(run: Path) -> bool:
    """Return whether a run has committed anything, be it lost since."""
    return bool(committed(run) or _bad(run) or (manifest.read_json(run, manifest.STARTED) or {}).get("committed"))


def _bad(run: Path) -> list[Path]:
    return sorted(path for path in run.glob("checkpoint-*") if _BAD_NAME.fullmatch(path.name))


# ---- writing


class Commit:
    """A checkpoint on its way: written, and now described, synced and renamed while training goes on.

    Until that is done the run has the checkpoints it had before.
    """

    def __init__(
        self, run: Path, step: int, problem: str | None, finishing: "concurrent.futures.Future | None" = None
    ):
        self.run, self.step = run, step
        self._problem, self._finishing = problem, finishing
        self._is_there: bool | None = None

    def wait(self) -> bool:
        """Return whether the checkpoint is there now; if not, report why. Call it on every process."""
        if self._is_there is None:
            finishing = self._finishing
            problem = self._problem or on_main("commit", lambda: finishing.result() if finishing else None)
            self._is_there = problem is None
            if problem is not None:
                on_main("clean", lambda: manifest.sweep(self.run))
                newest = last(self.run)
                fallback = f"{newest.name} is untouched" if newest is not None else "there is none yet"
                say(f"  WARNING: the checkpoint of step {self.step} was not written: {problem}. {fallback}.")
        return self._is_there

    def settle(self) -> None:
        """Let the work of this process end, whatever becomes of it."""
        if self._finishing is not None:
            concurrent.futures.wait([self._finishing])


def commit(
    run: Path, step: int, write: Callable[[Path], None], needed_bytes: int, keep: int | None, best: int | None
) -> Commit:
    """Make `checkpoint-<step>` of what `write` puts into the folder it is given. Call it on every process.

    This returns when everything is written; wait for the result before the next one. Then the oldest checkpoints are
    removed until `keep` are left; that of step `best` always stays. If there is no room, what was committed before is
    untouched.
    """
    path, work = run / f"checkpoint-{step}", run / f".checkpoint-{step}{manifest.PARTIAL}"
    if on_main("committed", path.exists):
        return Commit(run, step, None)
    problem = on_main("room", lambda: _prepare(run, work, needed_bytes, keep, best))
    if problem is None:
        problem = next(filter(None, of_all("written", _try(lambda: _write(work, write)))), None)
    if problem is not None or not is_main():
        return Commit(run, step, problem)
    return Commit(run, step, None, _background.submit(_try, lambda: _finish(run, step, work, keep, best)))


def _write(work: Path, write: Callable[[Path], None]) -> None:
    with disk_errors(work):
        write(work)


def _prepare(run: Path, work: Path, needed_bytes: int, keep: int | None, best: int | None) -> str | None:
    """Make an empty folder to write to. Returns what is in the way, if anything is."""
    manifest.sweep(run)
    needed_bytes += _SPARE_BYTES
    if _free(run) < needed_bytes and keep is not None:
        going = _superfluous(run, max(keep - 1, 1), best)  # those that would go after the commit anyway
        if _free(run) + sum(map(size_of, going)) >= needed_bytes:
            _remove(going)
    if (free := _free(run)) < needed_bytes:
        return f"{free / 1e6:,.1f} MB are free in {run}, {needed_bytes / 1e6:,.1f} MB are needed; make room"
    work.mkdir()
    return None


def _free(run: Path) -> int:
    return shutil.disk_usage(run).free


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise the errors of torch and safetensors for a file that cannot be written as OSErrors."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not any(sign in str(error) for sign in _DISK_SIGNS):
            raise
        raise OSError(errno.EIO, str(error).splitlines()[0], str(folder)) from None


def _try(function: Callable[[], None]) -> str | None:
    """Return what went wrong with the disk, in one line."""
    try:
        function()
    except OSError as error:
        return f"{error.filename or 'disk'}: {error.strerror}"
    return None


def _finish(run: Path, step: int, work: Path, keep: int | None, best: int | None) -> None:
    started = manifest.read_json(run, manifest.STARTED) or {}
    description = {"step": step, "fingerprint": started.get("fingerprint"), "files": _secure(work)}
    manifest.write_json(work / DESCRIPTION, {**description, "digest": _digest(description)})
    for folder in (path for path in work.rglob("*") if path.is_dir()):
        manifest.sync(folder)
    work.replace(run / f"checkpoint-{step}")
    manifest.sync(run)
    if started and not started.get("committed"):
        manifest.write_json(run / manifest.STARTED, {**started, "committed": True})
    _remove(_superfluous(run, keep, best))


def _secure(work: Path) -> dict[str, Json]:
    """Sync every file and describe it; both at once, as one waits for the disk and the other for the processor."""
    paths = sorted(path for path in work.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        synced = [pool.submit(manifest.sync, path) for path in paths]
        digests = list(pool.map(manifest.sha256_of, paths))
        for future in synced:
            future.result()
    return {
        path.relative_to(work).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }


def _digest(description: Json) -> str:
    """Return the digest of a description without its own digest."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _superfluous(run: Path, keep: int | None, best: int | None) -> list[Path]:
    """Return all but the newest `keep` checkpoints and that of step `best`."""
    checkpoints = list(committed(run).items())
    return [path for step, path in checkpoints[: -max(keep, 1)] if step != best] if keep is not None else []


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        # Renamed first: a kill while its files go must not leave something that looks like a checkpoint.
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old{manifest.PARTIAL}")))


# ---- reading


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint that verifies, or None for a run that has committed none yet.

    Bad ones are set aside as `checkpoint-<step>.corrupt`. Call it on the main process only.

    Raises:
        HfkitError: if there were checkpoints and none can be used.
    """
    manifest.sweep(run)
    started = manifest.read_json(run, manifest.STARTED) or {}
    admitted = {started.get("fingerprint"), *started.get("forced_from", [])}
    for path in reversed(committed(run).values()):
        problems = problems_with(path)
        if not problems:
            _check_fingerprint(path, admitted)
            return path
        aside = path.with_name(f"{path.name}.corrupt")
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}.corrupt{number}")
        path.rename(aside)
        lines = "\n".join(f"    {problem}" for problem in problems)
        print(f"  WARNING: {path.name} is damaged and set aside as {aside.name}:\n{lines}", flush=True)
    if has_any(run):
        bad = "".join(f"\n    {path}" for path in _bad(run)) or " all of them are gone"
        raise HfkitError(
            f"{run}: this run has committed checkpoints, but none can be used:{bad}\n"
            f"  Nothing was begun anew. Restore one under its name, checkpoint-<step>, or add --fresh to begin again."
        )
    return None


def problems_with(checkpoint: Path) -> list[str]:
    """Return what differs from the checkpoint's own description, one line a file; empty if nothing does."""
    try:
        description = manifest.read_json(checkpoint, DESCRIPTION)
    except HfkitError:
        return [f"{DESCRIPTION}: is damaged"]
    if description is None:
        return [f"{DESCRIPTION}: is missing"]
    is_as_written = (checkpoint / DESCRIPTION).read_text(encoding="utf-8") == manifest.as_json(description)
    if not is_as_written or not isinstance(description, dict) or description.pop("digest", 0) != _digest(description):
        return [f"{DESCRIPTION}: is damaged"]
    if checkpoint.name != f"checkpoint-{description['step']}":
        return [f"{DESCRIPTION}: describes step {description['step']}"]
    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        results = pool.map(lambda item: _problem_with(checkpoint / item[0], item[1]), description["files"].items())
        return [problem for problem in results if problem]


def _problem_with(path: Path, entry: Json) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{path.name}: has {size} bytes instead of {entry['size']}"
        if manifest.sha256_of(path) != entry["sha256"]:
            return f"{path.name}: its content is not what was written (SHA-256)"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None


def _check_fingerprint(checkpoint: Path, admitted: Collection[str | None]) -> None:
    digest = (manifest.read_json(checkpoint, DESCRIPTION) or {}).get("fingerprint")
    if digest not in admitted:
        raise HfkitError(
            f"{checkpoint}: belongs to a run of another recipe, data or tokenizer (fingerprint {str(digest)[:12]}); "
            f"remove it, or add --force to go on from it all the same"
        )
