"""What the double of the Hub (tests/hub_double.py) answers to each request.

It is what huggingface_hub 2.4 asks with classic LFS: no Xet, no pull requests, no tags. As on the Hub, a new
repository has a first commit with `.gitattributes`, and a commit without a change is made when it is asked for: not to
ask is the client's part. The words of an error are the Hub's where the client looks at them.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from tests.hub_store import LFS_SUFFIXES, Answer, Blob, Refusal, Repo, Request, State


def whoami(state: State, request: Request) -> Any:
    user = state.user(request)
    if user is None:
        raise Refusal(401)
    orgs = [{"type": "org", "name": org} for org in user.orgs]
    token = {"displayName": "a token", "role": user.role}
    return {"type": "user", "name": user.name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


def validate_yaml(state: State, request: Request) -> Any:
    state.user(request)
    front = re.match(r"---\r?\n(.*?)^---\s*$", json.loads(request.body)["content"], re.DOTALL | re.MULTILINE)
    if front is None:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    try:
        yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        raise Refusal(400, "Invalid metadata", errors=[{"message": str(error)}], warnings=[]) from error
    return {"errors": [], "warnings": []}


def create_repo(state: State, request: Request) -> Any:
    asked, user = json.loads(request.body), state.user(request)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    namespace, kind = asked.get("organization") or user.name, f"{asked.get('type', 'model')}s"
    id = f"{namespace}/{asked['name']}"
    if not user.may_write(id):
        raise Refusal(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{namespace}".')
    url = f"{state.url}/{id}" if kind == "models" else f"{state.url}/{kind}/{id}"
    if (kind, id) in state.repos:
        raise Refusal(409, f"You already created this {kind[:-1]} repo", url=url)
    state.repos[kind, id] = Repo(id, asked.get("visibility") == "private")
    return {"url": url, "name": id}


def repo_info(state: State, request: Request, kind: str, id: str, revision: str = "main") -> Any:
    repo = state.readable(request, kind, id)
    head = repo.head(revision)
    siblings = [{"rfilename": path} for path in sorted(head.files)]
    return {"id": id, "author": id.split("/")[0], "private": repo.private, "sha": head.oid, "siblings": siblings}


def list_tree(state: State, request: Request, kind: str, id: str, revision: str, path: str = "") -> Any:
    head, recursive = state.readable(request, kind, id).head(revision), request.query.get("recursive") == ["true"]
    folder, entries = PurePosixPath(path), {}
    for name, blob in head.files.items():
        inner = [PurePosixPath(name), *PurePosixPath(name).parents]
        for place in inner[: inner.index(folder)] if folder in inner[1:] else []:
            if not recursive and place.parent != folder:
                continue
            if str(place) != name:
                oid = hashlib.sha1(str(place).encode()).hexdigest()
                entries[str(place)] = {"type": "directory", "path": str(place), "oid": oid, "size": 0}
                continue
            entries[name] = {"type": "file", "path": name, "oid": blob.git_sha1, "size": len(blob.content)}
            if blob.is_lfs:
                pointed = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
                entries[name]["lfs"] = pointed
    if path and not entries:
        raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
    return [entries[name] for name in sorted(entries)]


def list_commits(state: State, request: Request, kind: str, id: str, revision: str) -> Any:
    repo = state.readable(request, kind, id)
    commits = next(commits for commits in repo.branches.values() if repo.head(revision) in commits)
    said = {"authors": [{"user": id.split("/")[0]}], "date": "2026-01-01T00:00:00.000Z", "message": ""}
    upto = commits[: commits.index(repo.head(revision)) + 1]
    return [{"id": commit.oid, "title": commit.message, **said} for commit in reversed(upto)]


def list_refs(state: State, request: Request, kind: str, id: str) -> Any:
    branches = state.readable(request, kind, id).branches
    heads = [(name, commits[-1].oid) for name, commits in branches.items()]
    refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in heads]
    return {"branches": refs, "tags": [], "converts": []}


def create_branch(state: State, request: Request, kind: str, id: str, branch: str) -> Any:
    repo = state.writable(request, kind, id)
    start = repo.head(json.loads(request.body).get("startingPoint", "main"))
    if branch in repo.branches:
        raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
    commits = next(commits for commits in repo.branches.values() if start in commits)
    repo.branches[branch] = commits[: commits.index(start) + 1]
    return {}


def preupload(state: State, request: Request, kind: str, id: str, revision: str) -> Any:
    remote = state.writable(request, kind, id).head(revision).files
    files = []
    for file in json.loads(request.body)["files"]:
        path = file["path"]
        mode = "lfs" if path.endswith(LFS_SUFFIXES) or file["size"] > state.lfs_limit else "regular"
        oid = remote[path].oid if path in remote else None
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": files}


def lfs_batch(state: State, request: Request, id: str, kind: str | None = None) -> Any:
    repo = state.writable(request, kind, id)
    objects = json.loads(request.body)["objects"]
    git = urlsplit(request.path).path.removesuffix("/batch")
    for object in objects:
        if object["oid"] not in repo.objects:
            # As at a storage service, the address itself is the right to upload.
            upload = {"href": f"{state.url}/lfs/{kind or 'models'}/{id}/{object['oid']}"}
            object["actions"] = {"upload": upload, "verify": {"href": f"{state.url}{git}/verify"}}
    return {"transfer": "basic", "objects": objects}


def lfs_upload(state: State, request: Request, kind: str, id: str, oid: str) -> Any:
    blob = Blob(request.body, is_lfs=True)
    if blob.sha256 != oid:
        raise Refusal(400, "The content does not have the sha256 of its address")
    state.repos[kind, id].objects[oid] = blob
    return b""


def lfs_verify(state: State, request: Request, id: str, kind: str | None = None) -> Any:
    repo, asked = state.writable(request, kind, id), json.loads(request.body)
    if asked["oid"] not in repo.objects or len(repo.objects[asked["oid"]].content) != asked["size"]:
        raise Refusal(404, "The object was not uploaded")
    return {}


def create_commit(state: State, request: Request, kind: str, id: str, revision: str) -> Any:
    repo = state.writable(request, kind, id)
    head = repo.head(revision)
    if revision not in repo.branches:
        raise Refusal(400, f"Not a branch: {revision}")
    header, *operations = (json.loads(line) for line in request.body.splitlines())
    if not head.oid.startswith(header["value"].get("parentCommit", "")):
        raise Refusal(412)
    files = dict(head.files)
    for operation in operations:
        value = operation["value"]
        path = value["path"]
        if operation["key"] == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif operation["key"] == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refusal(400, "LFS pointer pointed to a file that does not exist")
            files[path] = repo.objects[value["oid"]]
        else:  # deletedFile, deletedFolder
            is_folder = operation["key"] == "deletedFolder"
            gone = [name for name in files if name == path or (is_folder and name.startswith(path.rstrip("/") + "/"))]
            if not gone:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            files = {name: blob for name, blob in files.items() if name not in gone}
    commit = repo.commit(revision, header["value"]["summary"], files)
    prefix = "" if kind == "models" else f"{kind}/"
    return {"success": True, "commitOid": commit.oid, "commitUrl": f"{state.url}/{prefix}{id}/commit/{commit.oid}"}


def resolve(state: State, request: Request, id: str, revision: str, path: str, kind: str | None = None) -> Answer:
    head = state.readable(request, kind, id).head(revision)
    headers = {"X-Repo-Commit": head.oid, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if path not in head.files:
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        refusal.answer.headers["X-Repo-Commit"] = head.oid
        raise refusal
    blob = head.files[path]
    content, size = blob.content, len(blob.content)
    headers["ETag"] = f'"{blob.oid}"'
    if blob.is_lfs:
        headers |= {"X-Linked-ETag": f'"{blob.oid}"', "X-Linked-Size": str(size)}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if asked is None:
        return Answer(200, content, headers)
    start, end = int(asked[1]), min(int(asked[2] or size), size - 1)
    if start >= size:
        return Answer(416, b"", {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return Answer(206, content[start : end + 1], headers)


REPO = "(?P<id>[^/]+/[^/]+)"
API = f"/api/(?P<kind>models|datasets|spaces)/{REPO}"
GIT = f"/(?:(?P<kind>datasets|spaces)/)?{REPO}"
REVISION = "(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/api/repos/create", create_repo),
    ("GET", f"{API}(?:/revision/{REVISION})?", repo_info),
    ("GET", f"{API}/tree/{REVISION}(?:/(?P<path>.+))?", list_tree),
    ("GET", f"{API}/commits/{REVISION}", list_commits),
    ("GET", f"{API}/refs", list_refs),
    ("POST", f"{API}/branch/(?P<branch>[^/]+)", create_branch),
    ("POST", f"{API}/preupload/{REVISION}", preupload),
    ("POST", f"{GIT}\\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", f"/lfs/(?P<kind>[^/]+)/{REPO}/(?P<oid>[^/]+)", lfs_upload),
    ("POST", f"{GIT}\\.git/info/lfs/objects/verify", lfs_verify),
    ("POST", f"{API}/commit/{REVISION}", create_commit),
    ("GET", f"{GIT}/resolve/{REVISION}/(?P<path>.+)", resolve),
]


def answer(state: State, request: Request) -> Answer:
    """Do what is asked. A HEAD is answered as a GET, whose body the server leaves out."""
    method, path = request.method.replace("HEAD", "GET"), urlsplit(request.path).path
    try:
        for route_method, pattern, call in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and route_method == method:
                named = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                result = call(state, request, **named)
                return result if isinstance(result, Answer) else Answer(200, result)
    except Refusal as refusal:
        return refusal.answer
    return Refusal(501, f"The double of the Hub does not know {method} {path}").answer
