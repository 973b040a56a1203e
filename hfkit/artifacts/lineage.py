"""Where a folder comes from: everything that it was made of, back to the raw data, and whether that is still so."""

from collections.abc import Iterator
from pathlib import Path

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json, Manifest
from hfkit.errors import HfkitError


def record(path: str, digest: str | None = None) -> Json:
    """Return what a manifest keeps of an input: the whole of what that was made of, so that it is known when it is
    gone.

    Args:
        path: a folder, or an id on the Hub, of which the revision in the cache is kept.
        digest: of the content of a folder that hfkit did not make.
    """
    if not Path(path).is_dir():
        revisions = (revision_of(path, kind) for kind in ("model", "dataset"))
        return {"place": path, "stage": None, "digest": None, "revision": next(filter(None, revisions), None)}
    content = manifest.read_json(Path(path))
    if content is None:
        return {"place": path, "stage": None, "digest": digest}
    entry = {"place": path, "stage": content["stage"], "digest": content.get("digest")}
    external = content["made_from"].get("external")  # digests of raw files, versions of sources
    return entry | {key: value for key, value in (("inputs", content["inputs"]), ("external", external)) if value}


def revision_of(repo: str, kind: str = "model", revision: str = "main") -> str | None:
    """Return the commit that a branch of a repository stood at when it was last loaded; None where that is not
    known."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    reference = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind) / "refs" / revision
    return reference.read_text().strip() if reference.is_file() else None


def pushed_to(entry: Json) -> Json | None:
    """Return where the very content that a manifest names as an input lies on the Hub, as far as this machine
    knows."""
    content = manifest.read_json(Path(entry["place"])) if Path(entry["place"]).is_dir() else None
    return content.get("pushed") if content is not None and content.get("digest") == entry["digest"] else None


# ---- for a person


def of(folder: Path) -> str:
    """Return the lineage of a folder, held against what is on disk now.

    Raises:
        HfkitError: if hfkit did not make it, or it is not finished.
    """
    content = manifest.read_json(folder)
    if content is None:
        raise HfkitError(f"{folder}: holds no {manifest.MANIFEST}; name a finished output_dir, such as runs/pretrain")
    return tree(str(folder), content, is_checked=True)


def tree(folder: str, content: Manifest, is_checked: bool = False) -> str:
    """Return the lineage as lines of text.

    Args:
        folder: what the root is called.
        content: its manifest, or what will be one.
        is_checked: say of each folder whether it is still on disk as it was, which reads all of its files.
    """
    checks: dict[str, str] = {}
    note = f"  {_check(folder, content.get('digest'), checks)}" if is_checked else ""
    lines = [f"{folder}  {content['stage']}{_short(content.get('digest'))}{note}"]
    return "\n".join([*lines, *_branches(content, "", checks if is_checked else None, set())])


def _branches(
    entry: Json, indent: str, checks: dict[str, str] | None, seen: set[tuple[str, str | None]]
) -> Iterator[str]:
    """Yield the inputs of an entry, each with its own; what stands above already is named alone."""
    entries = list(entry.get("inputs", {}).items())
    raw = list(entry.get("external", entry.get("made_from", {}).get("external", {})).items())
    for number, (key, value) in enumerate([*entries, *raw], 1):
        is_last = number == len(entries) + len(raw)
        mark, deeper = ("└─ ", "   ") if is_last else ("├─ ", "│  ")
        if not isinstance(value, dict):
            note = "" if checks is None else _check_raw(key, str(value))
            yield f"{indent}{mark}{key}{_short(str(value)) if _is_digest(value) else f'  {value}'}{note}"
            continue
        name = (value["place"], value.get("digest"))
        is_known = name in seen and bool(value.get("inputs") or value.get("external"))
        seen.add(name)
        note = "" if checks is None else f"  {_check(*name, checks)}"
        yield f"{indent}{mark}{key}: {_described(value)}{note}{'  (as above)' if is_known else ''}"
        if not is_known:
            yield from _branches(value, indent + deeper, checks, seen)


def _described(entry: Json) -> str:
    words = [entry["place"], entry["stage"] or "", _short(entry["digest"]).strip()]
    if entry.get("revision"):
        words.append(f"revision {entry['revision'][:12]}")
    if pushed := pushed_to(entry):
        words.append(f"on the Hub {pushed['repo']} at {pushed['commit'][:12]}")
    return "  ".join(word for word in words if word)


def _short(digest: str | None) -> str:
    return f"  sha256 {digest[:12]}" if digest else ""


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


def _check(path: str, digest: str | None, checks: dict[str, str]) -> str:
    """Return what has become of a folder since, which is looked at once."""
    if path not in checks:
        checks[path] = _now(Path(path))
    if digest is None or checks[path] in ("", digest):
        return "ok" if checks[path] else ""
    return f"CHANGED: {checks[path]}" if " " in checks[path] else f"CHANGED: its sha256 is {checks[path][:12]} now"


def _now(folder: Path) -> str:
    """Return the digest of a folder on disk, or what is wrong with it in words; nothing of an id on the Hub."""
    if not folder.is_dir():
        return "it is gone" if folder.parts[0] in (".", "..", "runs", folder.anchor) else ""
    try:
        content = manifest.read_json(folder)
    except HfkitError:
        return f"its {manifest.MANIFEST} cannot be read"
    if content is None:
        return manifest.digest_of(manifest.describe_files(folder))
    changed = manifest.changed_files(folder, content)
    differ = "differs" if len(changed) == 1 else "differ"
    return f"{', '.join(changed)} {differ} from its {manifest.MANIFEST}" if changed else content["digest"]


def _check_raw(key: str, value: str) -> str:
    path = Path(key)
    if not _is_digest(value):
        return ""
    if not path.exists():
        return "  CHANGED: it is gone"
    now = manifest.sha256_of(path) if path.is_file() else manifest.digest_of(manifest.describe_files(path))
    return "  ok" if now == value else f"  CHANGED: its sha256 is {now[:12]} now"
