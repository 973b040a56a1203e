"""The files of a folder as they go to the Hub: those of its manifest, without what only this machine should know."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from hfkit.artifacts import manifest
from hfkit.artifacts.lineage import pushed_to
from hfkit.artifacts.manifest import ADAPTER, Manifest, is_adapter
from hfkit.errors import HfkitError
from hfkit.privacy import secrets
from hfkit.reports import card
from hfkit.reports.metadata import hub_id

# Written by hfkit or transformers about the result, with the places of this machine in them.
ABOUT = ("README.md", "metrics.json", "metrics.jsonl", "config.json", "tokenizer_config.json", ADAPTER)
CHUNK = 1 << 24


def stage(folder: Path, content: Manifest, repo: str, target: Path) -> None:
    """Lay the files out in an empty folder `target`, under their names in the repository.

    Files that are the same there are links. The card is written anew for the repository, unless it was edited.

    Raises:
        HfkitError: for an adapter whose base model is not on the Hub, and for a file that holds a token or the path of
            the home folder.
    """
    public = {key: value for key, value in content.items() if key != "pushed"} | {"folder": repo}
    for name in content["files"]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        source, text = folder / name, None
        if name == ADAPTER:
            text = _adapter(folder, content)
        elif name == "README.md" and manifest.sha256_of(source) == content["files"][name]["sha256"]:
            text = card.text(folder, content, repo)
        elif Path(name).name in ABOUT:
            text = source.read_text(encoding="utf-8")
        if text is None:
            _link(source, target / name)
        else:
            (target / name).write_text(secrets.without_places(text), encoding="utf-8")
    files = manifest.describe_files(target)
    public = {**public, "files": files, "digest": manifest.digest_of(files)}
    (target / manifest.MANIFEST).write_text(secrets.without_places(manifest.as_json(public)), encoding="utf-8")
    _refuse_secrets(target)


def with_base_at_hand(folder: Path, staged: Path, target: Path) -> Path:
    """Return the staged folder; of an adapter another in `target` whose base model is where it lies on this
    machine."""
    if not is_adapter(folder):
        return staged
    shutil.copytree(staged, target, symlinks=True)
    config = manifest.read_json(folder, ADAPTER) or {}
    base = config["base_model_name_or_path"]
    config["base_model_name_or_path"] = str(Path(base).absolute()) if Path(base).is_dir() else base
    (target / ADAPTER).write_text(json.dumps(config), encoding="utf-8")
    return target


def _adapter(folder: Path, content: Manifest) -> str:
    """Return the configuration of an adapter, with the base model by its id and commit on the Hub."""
    config = manifest.read_json(folder, ADAPTER) or {}
    entry = content["inputs"].get("model") or content["inputs"]["student"]
    repo = hub_id(entry)
    if repo is None:
        base = entry["place"]
        raise HfkitError(
            f"{folder}: is an adapter, and its base model {base} is not on the Hub; push that first: "
            f"hfkit push {base} <organization>/<name>"
        )
    config["base_model_name_or_path"] = repo
    config["revision"] = (pushed_to(entry) or {}).get("commit") or entry.get("revision")
    return json.dumps(config, indent=2) + "\n"


def _link(source: Path, target: Path) -> None:
    try:
        os.symlink(source.absolute(), target)
    except OSError:  # Windows asks for rights
        shutil.copyfile(source, target)


def _refuse_secrets(staged: Path) -> None:
    """Look at every byte, and at every text of a Parquet file, whose bytes are compressed."""
    hidden = [secret.encode() for secret in secrets.in_environment()]
    problems = []
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        name = path.relative_to(staged).as_posix()
        is_told = False
        for content in _pieces(path):
            if any(secret in content for secret in hidden):
                problems.append(f"{name}: holds a token or password of this machine's environment; remove it there")
                break
            is_told = is_told or (path.suffix in (".json", ".jsonl", ".md") and secrets.tells_place(content))
        if is_told:
            problems.append(f"{name}: holds the path of the home folder; edit it, or make the folder anew")
    if problems:
        raise HfkitError(*(f"{problem}; nothing was pushed" for problem in problems))


def _pieces(path: Path) -> Any:
    """Yield a file piece by piece, each with the end of the one before it; of a Parquet file the texts of its rows."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            yield json.dumps(batch.to_pylist(), ensure_ascii=False, default=str).encode(errors="replace")
        return
    before = b""
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            yield before + block
            before = block[-1000:]
