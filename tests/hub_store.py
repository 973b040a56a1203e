"""What the double of the Hub (tests/hub_double.py) holds: users, repositories with their commits, and LFS objects."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import parse_qs, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".png", ".npy", ".gz")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
# Said beside a status.
MESSAGES = {
    401: "Invalid credentials in Authorization header",
    403: "Authorization error.",
    409: "Conflict",
    412: "A commit has happened since. Please refresh and try again.",
    429: "Too Many Requests",
    500: "Internal Error",
}


@dataclass
class Request:
    method: str
    path: str  # as sent: quoted, with its query
    headers: dict[str, str]  # names in lower case
    body: bytes = b""

    @property
    def token(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)


@dataclass
class Answer:
    status: int = 200
    body: Any = b""  # bytes, or what is sent as JSON
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """Ends a request with an error, which the client reads from headers and the body."""

    def __init__(self, status: int, message: str = "", code: str = "", retry_after: int | None = None, **more: Any):
        message = message or MESSAGES[status]
        headers = {"X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        if retry_after is not None:
            headers["Retry-After"] = str(retry_after)
        self.answer = Answer(status, {"error": message, **more}, headers)


@dataclass(frozen=True)
class Blob:
    """A file: git stores it, or a pointer to it where it is an LFS object."""

    content: bytes
    is_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def git_sha1(self) -> str:
        stored = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def pointer(self) -> bytes:
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @property
    def oid(self) -> str:
        """By what the client sees that a file has not changed."""
        return self.sha256 if self.is_lfs else self.git_sha1


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    id: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    objects: dict[str, Blob] = field(default_factory=dict)  # sha256 to LFS object, committed or not

    def __post_init__(self) -> None:
        self.commit("main", "initial commit", {".gitattributes": Blob(GITATTRIBUTES)})

    def head(self, revision: str) -> Commit:
        """The commit that a branch ends with, or the one of this name."""
        if revision in self.branches:
            return self.branches[revision][-1]
        for commits in self.branches.values():
            for commit in commits:
                if commit.oid == revision:
                    return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        """End a branch with a commit that holds these files, and no others."""
        commits = self.branches.setdefault(branch, [])
        parent = commits[-1].oid if commits else self.id
        listing = [(path, blob.git_sha1) for path, blob in sorted(files.items())]
        commits.append(Commit(hashlib.sha1(repr((parent, message, listing)).encode()).hexdigest(), message, files))
        return commits[-1]


@dataclass
class User:
    name: str
    orgs: list[str] = field(default_factory=list)
    role: str = "write"

    def may_read(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.name, *self.orgs)

    def may_write(self, repo_id: str) -> bool:
        return self.role != "read" and self.may_read(repo_id)


@dataclass
class State:
    url: str
    users: dict[str, User]  # token to user
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)  # ("models", "ada/tiny") to repository
    lfs_limit: int = 10 * 2**20  # bytes: a larger file is an LFS object, whatever its name

    def user(self, request: Request) -> User | None:
        if request.token and request.token not in self.users:
            raise Refusal(401)
        return self.users.get(request.token)

    def readable(self, request: Request, kind: str | None, id: str) -> Repo:
        user, repo = self.user(request), self.repos.get((kind or "models", id))
        if repo and (not repo.private or (user and user.may_read(id))):
            return repo
        # Whether a private repository exists is told to nobody else.
        if user is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def writable(self, request: Request, kind: str | None, id: str) -> Repo:
        repo, user = self.readable(request, kind, id), self.user(request)
        if user is None:
            # At an https address the client takes every 401 about a repository for RepoNotFound; here it is told to.
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if not user.may_write(id):
            raise Refusal(403)
        return repo
