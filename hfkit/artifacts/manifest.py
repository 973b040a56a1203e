"""`hfkit.json`: what made a folder. And the writing of folders that appear whole or not at all."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hfkit.errors import HfkitError
from hfkit.version import __version__

Json = dict[str, Any]  # an object of a JSON file
Manifest = dict[str, Any]  # what `hfkit.json` says
Metrics = dict[str, Any]  # what `metrics.json` says
MANIFEST = "hfkit.json"
STARTED = "hfkit.started.json"  # what an unfinished folder is being made from
ADAPTER = "adapter_config.json"  # in the folder of an adapter, as peft writes it
PARTIAL = ".partial"  # ends the name of what is not whole yet; such names begin with a dot
DIGEST_EXCLUDES = {MANIFEST, STARTED, "README.md", "metrics.json", "metrics.jsonl", "loss.png"}
LIBRARIES = ("torch", "transformers", "datasets", "peft", "accelerate", "evaluate", "bitsandbytes", "tokenizers")


def read_json(folder: Path, name: str = MANIFEST) -> Json | None:
    """Return a JSON file of a folder, or None where it is not there.

    Raises:
        HfkitError: if it is there but cannot be read.
    """
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise HfkitError(f"{folder / name}: cannot be read: {error}; restore it or delete {folder}") from None


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / ADAPTER).is_file()


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call for folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Call `sync` for everything in a folder, and the folder itself."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sweep(folder: Path, pattern: str = "*") -> None:
    """Remove what a kill left half written in a folder: everything named `.<pattern>.partial`."""
    for path in folder.glob(f".{pattern}{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def as_json(value: Json) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Json) -> None:
    write_file(path, as_json(value))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def describe_files(folder: Path) -> dict[str, Json]:
    """Return size and SHA-256 of every file that the folder's result consists of."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        name.as_posix(): {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in names
        if name.name not in (MANIFEST, STARTED) and not name.parts[0].startswith("checkpoint-")
    }


def digest_of(files: dict[str, Json]) -> str:
    """Return one digest for the content of a folder; reports and timings do not count."""
    parts = [f"{name} {entry['sha256']}" for name, entry in sorted(files.items()) if name not in DIGEST_EXCLUDES]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def changed_files(folder: Path, content: Manifest) -> list[str]:
    """Return the files of a finished folder that are missing, or no longer what they were, but for its reports."""
    return [
        name
        for name, entry in content["files"].items()
        if name not in DIGEST_EXCLUDES
        and (not (folder / name).is_file() or sha256_of(folder / name) != entry["sha256"])
    ]


def content_of(path: str) -> str:
    """Return what identifies the content of an input: the digest of a folder, or an id on the Hub as it is."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    return (read_json(folder) or {}).get("digest") or digest_of(describe_files(folder))


def finish(folder: Path, content: Manifest) -> None:
    """Write `hfkit.json`, which makes the folder finished: `content`, the files and what they were made with."""
    files = describe_files(folder)
    versions = {"hfkit": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    hardware = {"machine": platform.machine(), "system": platform.system(), **content.get("hardware", {})}
    manifest = {**content, "digest": digest_of(files), "files": files, "versions": versions, "hardware": hardware}
    write_json(folder / MANIFEST, manifest)


def check_whole(folder: Path, manifest: Manifest) -> None:
    """Check the sizes of a finished folder's files against its manifest.

    Raises:
        HfkitError: naming the files that are missing or of another size.
    """
    problems = []
    for name, entry in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: is missing, although {MANIFEST} lists it; restore it or use --rebuild")
        elif path.stat().st_size != entry["size"] and name not in DIGEST_EXCLUDES:
            size = f"has {path.stat().st_size} bytes, {MANIFEST} says {entry['size']}"
            problems.append(f"{path}: {size}; restore it or use --rebuild")
    if problems:
        raise HfkitError(*problems)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder. The system releases the lock when the process ends, however it ends.

    Raises:
        HfkitError: if another run holds it, or the parent folder cannot be written.
    """
    path = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout:
        raise HfkitError(
            f"{folder}: another run is writing this folder; wait for it, or give this one its own output_dir=..."
        ) from None
    except OSError as error:
        raise HfkitError(f"{folder}: cannot be written: {error.strerror}; choose another output_dir=...") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Open a temporary folder beside `folder`, renamed to it at the end; removed if anything goes wrong.

    What stood in the place of `folder` until then is set aside. Hold the lock of `folder`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent, f"{folder.name}.????????")  # as mkdtemp names them
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=PARTIAL))
    try:
        work.chmod(0o755)
        yield work
        sync_tree(work)
        if folder.is_dir() and any(folder.iterdir()):
            set_aside(folder)
        work.replace(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a folder that is to be made anew: nothing finished is ever deleted."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    print(f"  the old {folder} is kept as {aside}", flush=True)
    return folder.rename(aside)
