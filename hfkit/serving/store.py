"""The log of a server: each request with its answer, and what people thought of it, in SQLite.

`requests.sqlite` is in WAL mode and has one writer, a thread that commits what is in its queue together. Who waits
for `Store.write` knows that the record survives the end of the process. Where the disk is full or the queue is,
answers go on, and what was not written is counted.
"""

import contextlib
import hashlib
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from hfkit.errors import HfkitError
from hfkit.privacy.personal_data import redact

FILE = "requests.sqlite"
VERSION = 1  # of the tables
MOST_WAITING = 10_000
CHANGEABLE_SECONDS = 24 * 3600  # in which feedback may be changed
PRUNE_SECONDS = 600

TABLES = """
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, time REAL NOT NULL, route TEXT NOT NULL, model TEXT, digest TEXT, share TEXT, user TEXT,
    parameters TEXT, prompt TEXT, answer TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, finish TEXT,
    first_token_seconds REAL, seconds REAL, status INTEGER NOT NULL, error TEXT
);
CREATE INDEX IF NOT EXISTS requests_by_time ON requests (time);
CREATE TABLE IF NOT EXISTS feedback (
    request_id TEXT PRIMARY KEY REFERENCES requests (id) ON DELETE CASCADE, time REAL NOT NULL, changed REAL NOT NULL,
    rating INTEGER, correction TEXT, label TEXT, comment TEXT, user TEXT
);
"""
COLUMNS = (
    "id", "time", "route", "model", "digest", "share", "user", "parameters", "prompt", "answer", "prompt_tokens",
    "completion_tokens", "finish", "first_token_seconds", "seconds", "status", "error",
)  # fmt: skip
Content = Literal["redacted", "full", "none"]


def hashed(user: str) -> str:
    """Return what stands for a user in the log."""
    return hashlib.sha256(f"hfkit user {user}".encode()).hexdigest()[:16]


class Store:
    """The open log.

    Args:
        folder: that has the file.
        content: which texts are kept: as they are, without personal data, or none.
        retention_days: after which records are removed.

    Attributes:
        lost: how many records could not be written.
    """

    def __init__(self, folder: Path, content: Content = "redacted", retention_days: int = 30):
        self.path, self.content, self.retention_days, self.lost = folder / FILE, content, retention_days, 0
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._prepare()
        except sqlite3.Error as error:
            raise HfkitError(
                f"{self.path}: is no log that can be written: {error}; move it away or set output_dir"
            ) from None
        self._queue: queue.Queue[tuple[Callable[[sqlite3.Connection], Any], Future[Any]] | None]
        self._queue = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def _prepare(self) -> None:
        with connected(self.path) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise HfkitError(
                    f"{self.path}: was written by another version (tables {version}, here {VERSION}); "
                    "set another output_dir"
                )
            connection.executescript(TABLES)
            connection.execute(f"PRAGMA user_version={VERSION}")

    def text(self, text: str | None) -> str | None:
        """Return a text as the log keeps it."""
        if text is None or self.content == "none":
            return None
        return redact(text).text if self.content == "redacted" else text

    def write(self, record: dict[str, Any]) -> "Future[Any]":
        """Add a request to the log. The future is done when it is on record."""
        values = [record.get(column) for column in COLUMNS]
        marks = ", ".join("?" * len(COLUMNS))
        return self._do(lambda log: log.execute(f"INSERT INTO requests VALUES ({marks})", values))

    def write_feedback(self, request_id: str, user: str | None, values: dict[str, Any]) -> "Future[str]":
        """Add or change what somebody thinks of an answer.

        Returns:
            A future of `saved`; `unknown` where there is no such answer, `late` where it may not be changed any more.
        """

        def write(log: sqlite3.Connection) -> str:
            if log.execute("SELECT 1 FROM requests WHERE id = ?", [request_id]).fetchone() is None:
                return "unknown"
            now = time.time()
            known = log.execute("SELECT time FROM feedback WHERE request_id = ?", [request_id]).fetchone()
            if known is not None and now - known[0] > CHANGEABLE_SECONDS:
                return "late"
            first = now if known is None else known[0]
            row = [values.get(name) for name in ("rating", "correction", "label", "comment")]
            log.execute(
                "INSERT OR REPLACE INTO feedback VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [request_id, first, now, *row, user]
            )
            return "saved"

        return self._do(write)

    def close(self) -> None:
        """Write what waits, and end."""
        self._queue.put(None)
        self._thread.join()

    def _do(self, work: Callable[[sqlite3.Connection], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            self._queue.put_nowait((work, future))
        except queue.Full:
            self.lost += 1
            future.set_result(None)
        return future

    def _run(self) -> None:
        pruned = 0.0
        is_open = True
        while is_open:
            items = [self._queue.get()]
            while len(items) < 1000 and not self._queue.empty():
                items.append(self._queue.get_nowait())
            is_open = None not in items
            work = [item for item in items if item is not None]
            try:
                with connected(self.path) as log:
                    results = [item(log) for item, _ in work]
                    if time.monotonic() - pruned > PRUNE_SECONDS:
                        pruned = time.monotonic()
                        oldest = time.time() - self.retention_days * 24 * 3600
                        log.execute("DELETE FROM requests WHERE time < ?", [oldest])
            except sqlite3.Error:
                self.lost += len(work)
                results = [None] * len(work)
            for (_, future), result in zip(work, results, strict=True):
                future.set_result(result)


@contextlib.contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a log for one transaction, which is committed at the end."""
    connection = sqlite3.connect(path, timeout=10)
    try:
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}")
        yield connection
        connection.commit()
    finally:
        connection.close()  # which takes back what was not committed


def read(folder: Path, since: float = 0.0) -> Iterator[dict[str, Any]]:
    """Yield the records of a log in the order of time, each with its `feedback` or None.

    Args:
        since: seconds of the epoch.

    Raises:
        HfkitError: if there is no log that can be read.
    """
    path = folder / FILE if folder.is_dir() else folder
    if not path.is_file():
        raise HfkitError(f"{path}: there is no log; name the output_dir of a recipe of `stage: serve`")
    try:
        log = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
        log.row_factory = sqlite3.Row
        query = "SELECT * FROM requests LEFT JOIN feedback ON id = request_id WHERE requests.time >= ? ORDER BY 2"
        for row in log.execute(query, [since]):
            record = dict(zip(COLUMNS, row, strict=False))
            record["parameters"] = json.loads(record["parameters"] or "{}")
            names = ("time", "changed", "rating", "correction", "label", "comment", "user")
            given = tuple(row)[len(COLUMNS) + 1 :]
            record["feedback"] = None if row["request_id"] is None else dict(zip(names, given, strict=True))
            yield record
    except sqlite3.Error as error:
        raise HfkitError(f"{path}: the log cannot be read: {error}; restore it from a copy") from None
