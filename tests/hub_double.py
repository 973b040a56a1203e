"""A double of the Hub for tests: an HTTP server in this process, for the real client, with faults on demand.

What it holds is in tests/hub_store.py, what it answers in tests/hub_answers.py; here are the server, the faults, the
record of what was sent, and the fixture `hub`.
"""

import base64
import json
import os
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn
from urllib.parse import unquote

import pytest

from tests.hub_answers import answer
from tests.hub_store import GITATTRIBUTES, Answer, Blob, Commit, Refusal, Repo, Request, State, User

# Tokens as long as real ones: of ada, who is in the organization lab; of ada, to read only; of bob, a stranger.
WRITER, READER, STRANGER = ("hf_" + letter * 34 for letter in "wrs")


class LostAnswer(Exception):
    """The request is handled, and the connection closed without an answer."""


@dataclass
class Fault:
    method: str
    part: str  # of the path
    act: Callable[[Request], Any]
    skip: int
    times: int


class Hub:
    """The double: `state` (users, repositories, `lfs_limit`), what was sent to it, and its faults.

    `fail`, `drop`, `lose` and `on` bring a fault to the requests of a method whose path contains `part`: after `skip`
    of them, `times` times. Faults of one request come in the order in which they were asked for, one at a time.
    """

    def __init__(self) -> None:
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        users = {WRITER: User("ada", ["lab"]), READER: User("ada", ["lab"], "read"), STRANGER: User("bob")}
        self.state = State(self.url, users)
        self.requests: list[Request] = []
        self.waits: list[float] = []  # seconds for which the client of this process wanted to wait between two tries
        self.errors: list[BaseException | None] = []  # in the double itself, or in a callback
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def on(self, method: str, part: str, act: Callable[[Request], Any], *, skip: int = 0, times: int = 1) -> None:
        """Call `act` when a request comes in. Its body is not read yet, and empty.

        When `act` raises a ConnectionError, the connection breaks in the middle of the body and nothing is done: a
        callback that kills the client ends so. A Refusal is answered. Otherwise the request goes on.
        """
        self.faults.append(Fault(method, part, act, skip, times))

    def fail(self, method: str, part: str, *, status: int, retry_after: int | None = None, **when: int) -> None:
        """Answer with an error, and do nothing."""
        self.on(method, part, raising(Refusal(status, retry_after=retry_after)), **when)

    def drop(self, method: str, part: str, **when: int) -> None:
        """Break the connection in the middle of the body, and do nothing."""
        self.on(method, part, raising(ConnectionAbortedError()), **when)

    def lose(self, method: str, part: str, **when: int) -> None:
        """Do what is asked, and break the connection instead of answering."""
        self.on(method, part, raising(LostAnswer()), **when)

    def meet(self, request: Request) -> None:
        """Record a request, and bring it the first fault that is due."""
        due = None
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.method == request.method and fault.part in request.path and fault.times:
                    if fault.skip:
                        fault.skip -= 1
                    elif due is None:
                        due, fault.times = fault, fault.times - 1
        if due:
            due.act(request)

    def answer(self, request: Request) -> Answer:
        with self.lock:
            return answer(self.state, request)

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.state.repos[f"{repo_type}s", repo_id]

    def create(self, repo_id: str, *, private: bool = False, repo_type: str = "model") -> Repo:
        """A new repository, past the interface."""
        repo = self.state.repos[f"{repo_type}s", repo_id] = Repo(repo_id, private)
        return repo

    def commit(
        self, repo_id: str, files: dict[str, bytes], revision: str = "main", repo_type: str = "model"
    ) -> Commit:
        """Somebody else's commit: these files are new or changed, the others stay."""
        with self.lock:
            repo = self.repo(repo_id, repo_type)
            blobs = {path: Blob(content) for path, content in files.items()}
            return repo.commit(revision, "Somebody else's", repo.head(revision).files | blobs)

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """What a revision holds, path to content, but for the `.gitattributes` that the Hub wrote."""
        files = self.repo(repo_id, repo_type).head(revision).files
        return {path: blob.content for path, blob in files.items() if blob.content != GITATTRIBUTES}

    def calls(self, method: str, part: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.path]

    def sent(self) -> bytes:
        """Everything that was sent, but for Authorization headers; what is in base64 comes decoded too."""
        sent = []
        for request in self.requests:
            headers = {name: value for name, value in request.headers.items() if name != "authorization"}
            sent += [unquote(request.path).encode(), repr(headers).encode(), request.body]
            if re.search("/(preupload|commit)/", request.path):
                encoded = re.findall(rb'"(?:content|sample)": ?"([^"]*)"', request.body)
                sent += [base64.b64decode(content) for content in encoded]
        return b"\n".join(sent)


def raising(error: Exception) -> Callable[[Request], NoReturn]:
    def act(request: Request) -> NoReturn:
        raise error

    return act


class Server(ThreadingHTTPServer):
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that was killed, or gave up, is no error of ours.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.hub.errors.append(sys.exc_info()[1])


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body go together: otherwise each answer waits for an acknowledgement
    disable_nagle_algorithm = True

    def handle_request(self) -> None:
        hub, length = self.server.hub, int(self.headers.get("Content-Length", 0))
        assert "Transfer-Encoding" not in self.headers
        request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        fault: Exception | None = None
        try:
            hub.meet(request)
        except (ConnectionError, LostAnswer, Refusal) as raised:
            fault = raised
        is_dropped = isinstance(fault, ConnectionError)
        request.body = self.rfile.read(length // 2 if is_dropped else length)
        self.close_connection = True
        if is_dropped or len(request.body) < length:
            return
        result = fault.answer if isinstance(fault, Refusal) else hub.answer(request)
        if not isinstance(fault, LostAnswer):
            self.send(result)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def send(self, result: Answer) -> None:
        is_bytes = isinstance(result.body, bytes)
        body = result.body if is_bytes else json.dumps(result.body).encode()
        self.send_response(result.status)
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json"} | result.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = False

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A double of the Hub, to which the client of this process and of its subprocesses talks as ada.

    Subprocesses read the environment. In this process huggingface_hub and datasets have read it when they were
    imported, offline, so the names in which they keep it are replaced: in `huggingface_hub.constants`, whose names are
    looked up at each call; in `hf_api.api`, behind functions such as `create_repo`; and in `datasets.config`. Both are
    imported before the environment changes, or else they would keep this double's address for later tests. An
    `HfApi()` made in the test needs nothing. transformers keeps the folder for code from the Hub (HF_MODULES_CACHE)
    at its import: load such code in a subprocess. All is undone after the test, and other tests are offline again.

    The client of this process does not wait between its tries; `hub.waits` holds what it would have waited.
    """
    import datasets.config
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import _http

    double = Hub()
    home = tmp_path_factory.mktemp("hf_home")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HF_ASSETS_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    switches = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    for name, value in {"HF_ENDPOINT": double.url, "HF_HOME": str(home), "HF_TOKEN": WRITER, **switches}.items():
        monkeypatch.setenv(name, value)
    replaced = {
        "ENDPOINT": double.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": double.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": os.path.join(home, "hub"),
        "HF_ASSETS_CACHE": os.path.join(home, "assets"),
        "HF_TOKEN_PATH": os.path.join(home, "token"),
        "HF_STORED_TOKENS_PATH": os.path.join(home, "stored_tokens"),
        "AGENT_HARNESSES_PATH": os.path.join(home, ".agent_harnesses.json"),
    }
    for name, constant in replaced.items():
        monkeypatch.setattr(constants, name, constant, raising=False)  # an older client lacks some
    monkeypatch.setattr(hf_api.api, "endpoint", double.url)
    monkeypatch.setattr(hf_api.api, "_whoami_cache", {})
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", double.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=double.waits.append))
    _http.close_session()
    thread = threading.Thread(target=double.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield double
    double.server.shutdown()
    double.server.server_close()
    _http.close_session()
    assert not double.errors
