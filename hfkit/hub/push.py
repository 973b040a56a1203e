"""`hfkit push`: a finished folder to a repository of the Hub, in one commit, tried out before."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hfkit.artifacts import manifest
from hfkit.artifacts.kinds import KINDS
from hfkit.artifacts.manifest import Manifest
from hfkit.errors import HfkitError, reason
from hfkit.hub import staging
from hfkit.hub.verification import try_out
from hfkit.privacy import secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Result = TypeVar("Result")
OF_THE_HUB = {".gitattributes", "README.md"}  # what a repository may hold before the first push
ATTEMPTS, LONGEST_WAIT = 5, 60.0  # seconds


def push(folder: Path, repo: str, private: bool = False, revision: str | None = None) -> str:
    """Push a folder, and note in its manifest where it lies now.

    Returns:
        What was done, for a person.

    Raises:
        HfkitError: if the folder is not finished or has changed, does not load elsewhere, or the Hub refuses it. Then
            nothing was pushed.
    """
    content = _finished(folder)
    api = _api()
    kind, branch = _repo_type(content), revision or "main"
    repo = _refuse_early(api, folder, content, repo, private, branch)
    with tempfile.TemporaryDirectory(prefix="hfkit-push-") as work:
        staged = Path(work) / "files"
        staged.mkdir()
        staging.stage(folder, content, repo, staged)
        try_out(folder, staging.with_base_at_hand(folder, staged, Path(work) / "trial"), content)
        _told(repo, lambda: api.create_repo(repo, repo_type=kind, private=private or None, exist_ok=True))
        if branch != "main":
            _told(repo, lambda: api.create_branch(repo, repo_type=kind, branch=branch, exist_ok=True))
        before = _told(repo, lambda: _head(api, repo, kind, branch))
        commit = _told(repo, lambda: _commit(api, repo, kind, branch, content, staged))
    if content.get("pushed", {}).get("commit") != commit.oid:
        pushed = {"repo": repo, "revision": branch, "commit": commit.oid}
        manifest.write_json(folder / manifest.MANIFEST, {**content, "pushed": pushed})
    if commit.oid == before:
        return f"{repo} holds {folder} already, in commit {before[:12]}: nothing to push."
    return f"{folder} is pushed: {commit.commit_url}"


def command(folder: Path, repo: str, private: bool = False, revision: str | None = None) -> str:
    """Return the command that does this push again."""
    more = f"{' --private' if private else ''}{f' --revision {revision}' if revision else ''}"
    return f"hfkit push {folder} {repo}{more}"


def token() -> str:
    """Return the user's token, from the environment or huggingface_hub's own store.

    Raises:
        HfkitError: if there is none.
    """
    from huggingface_hub import get_token

    if stored := get_token():
        return stored
    raise HfkitError("push: there is no token for the Hub; set HF_TOKEN, or log in once: `hf auth login`")


# ---- before anything is sent


def _finished(folder: Path) -> Manifest:
    """Return the manifest of a folder that is whole and as it was made."""
    content = manifest.read_json(folder)
    if content is None:
        if (folder / manifest.STARTED).is_file():
            raise HfkitError(f"{folder}: is not finished; run its recipe to the end, then push")
        what = "holds no hfkit.json: hfkit pushes what it made" if folder.is_dir() else "there is no such folder"
        raise HfkitError(f"{folder}: {what}; name a finished output_dir, such as runs/pretrain")
    if content.get("makes") not in KINDS or KINDS[content["makes"]].repository is None:
        what = f"an {content['makes']}" if content.get("makes") else "of an older hfkit"
        raise HfkitError(f"{folder}: is {what}; models, tokenizers and data sets are pushed")
    missing = [name for name in content["files"] if not (folder / name).is_file()]
    changed = sorted({*missing, *manifest.changed_files(folder, content)})
    if changed:
        raise HfkitError(
            f"{folder}: {', '.join(changed)} changed since it was made; restore it, or make it anew with --rebuild"
        )
    return content


def _repo_type(content: Manifest) -> str:
    """Return `model` or `dataset`, as the Hub calls the repository of a folder."""
    return str(KINDS[content["makes"]].repository)


def _api() -> "HfApi":
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # what it says of commits is said here
    if constants.is_offline_mode():
        raise HfkitError("push: HF_HUB_OFFLINE is set; unset it to reach the Hub")
    return HfApi(token=token())


def _refuse_early(api: "HfApi", folder: Path, content: Manifest, repo: str, private: bool, branch: str) -> str:
    """Return everything that the Hub can say against a push, before the files are looked at. Returns the full id."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HfkitError(f"{repo}: is no valid id of a repository: {error}") from None
    user = _told(repo, api.whoami)
    repo = repo if "/" in repo else f"{user['name']}/{repo}"
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HfkitError(f"{repo}: the token may only read; make one that may write, at the Hub under Access Tokens")
    kind = _repo_type(content)
    try:
        info = _told(repo, lambda: api.repo_info(repo, repo_type=kind), RepositoryNotFoundError)
    except RepositoryNotFoundError:
        other = "dataset" if kind == "model" else "model"
        if _told(repo, lambda: api.repo_exists(repo, repo_type=other)):
            raise HfkitError(
                f"{repo}: is a {other} on the Hub, and {folder} is a {content['makes']}; choose another name"
            ) from None
        return repo
    if private and not info.private:
        raise HfkitError(f"{repo}: is there already and public; make it private at the Hub, or leave out `private`")
    try:
        names = _told(repo, lambda: api.list_repo_files(repo, repo_type=kind, revision=branch), RevisionNotFoundError)
    except RevisionNotFoundError:
        return repo
    if {*names} <= OF_THE_HUB:
        return repo
    there = _manifest_of(api, repo, kind, branch) if manifest.MANIFEST in names else {}
    if there.get("makes") != content["makes"]:
        what = f"a {there['makes']}" if there.get("makes") else "files that hfkit did not push"
        raise HfkitError(f"{repo}: holds {what}, and {folder} is a {content['makes']}; choose another repository")
    return repo


def _manifest_of(api: "HfApi", repo: str, kind: str, branch: str) -> Manifest:
    with tempfile.TemporaryDirectory() as folder:
        _told(
            repo,
            lambda: api.hf_hub_download(
                repo, manifest.MANIFEST, repo_type=kind, revision=branch, local_dir=folder, force_download=True
            ),
        )
        return manifest.read_json(Path(folder)) or {}


# ---- the commit


def _head(api: "HfApi", repo: str, kind: str, branch: str) -> str:
    return api.repo_info(repo, repo_type=kind, revision=branch).sha or ""


def _commit(api: "HfApi", repo: str, kind: str, branch: str, content: Manifest, staged: Path) -> Any:
    """Return all files in one commit, and what the last push had and this one has not, deleted.

    Called again after an answer that was lost, it finds everything there and makes no second one.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = _head(api, repo, kind, branch)
    names = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
    there = api.list_repo_files(repo, repo_type=kind, revision=head)
    deleted = [name for name in there if name not in names and name not in OF_THE_HUB]
    operations = [CommitOperationAdd(name, staged / name) for name in names]
    return api.create_commit(
        repo,
        [*operations, *(CommitOperationDelete(name) for name in deleted)],
        commit_message=f"Push {content['name']}, made by hfkit's stage {content['stage']}",
        repo_type=kind,
        revision=branch,
        parent_commit=head,
    )


def _told(repo: str, call: Callable[[], Result], *expected: type[Exception]) -> Result:
    """Return the result of a call to the Hub, tried again where the Hub is busy or the line is cut; errors in our
    words."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    for wait in _waits():
        try:
            return call()
        except expected:
            raise
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if wait is None or (status != 429 and status < 500):
                raise HfkitError(_refusal(repo, status, error)) from None
            after = error.response.headers.get("Retry-After", "")
            wait = min(float(after), LONGEST_WAIT) if after.isdigit() else wait
        # Of the network, of huggingface_hub about it, and of an answer that is not the Hub's.
        except (HTTPError, OSError, RuntimeError, KeyError, json.JSONDecodeError) as error:
            if wait is None:
                message = secrets.without_secrets(reason(error))
                raise HfkitError(f"{repo}: the Hub cannot be reached: {message}; push again later") from None
        except ValueError as error:  # of the client, before it sends anything
            raise HfkitError(f"{repo}: {secrets.without_secrets(reason(error))}") from None
        time.sleep(wait)
    raise AssertionError("the last wait is None")


def _waits() -> Iterator[float | None]:
    """Yield the seconds before the next attempt; None with the last."""
    yield from (2.0**attempt for attempt in range(ATTEMPTS - 1))
    yield None


def _refusal(repo: str, status: int, error: Exception) -> str:
    said = secrets.without_secrets(reason(error))
    if status == 401:
        return f"{repo}: the Hub does not know the token; set a valid HF_TOKEN, or log in again: `hf auth login`"
    if status == 403:
        return f"{repo}: the token has no right to write there; choose a repository of yours, or another token"
    if status in (409, 412):
        return f"{repo}: somebody else has changed it in the meantime; look at it, then push again"
    if status == 429 or status >= 500:
        return f"{repo}: the Hub is busy (status {status}), {ATTEMPTS} times in a row; push again later"
    return f"{repo}: the Hub refuses (status {status}): {said}"
