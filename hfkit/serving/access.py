"""Who may ask, how much, and in what form: what stands before every route."""

import asyncio
import hashlib
import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from hfkit.errors import HfkitError
from hfkit.serving.errors import ApiError

OPEN = frozenset({"/", "/health/live", "/health/ready"})  # without a token: they tell nothing
LOOPBACK = ("127.0.0.1", "::1", "localhost")
VARIABLE = "HFKIT_TOKENS"
LEAST_CHARACTERS = 16  # of a token
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Token(NamedTuple):
    """A token that may ask.

    Args:
        digest: its SHA-256; the token itself is not kept.
        per_minute: requests; None for any number.
    """

    name: str
    digest: bytes
    per_minute: int | None


def tokens_of(file: Path | None) -> list[Token]:
    """Read the tokens of a file, or else of the environment: `name:token` or `name:token:60` (requests a minute).

    They stand one a line, or parted by commas.

    Raises:
        HfkitError: if one cannot be used.
    """
    source = str(file) if file is not None else VARIABLE
    try:
        text = file.read_text(encoding="utf-8") if file is not None else os.environ.get(VARIABLE, "")
    except OSError as error:
        raise HfkitError(
            f"tokens: {file}: cannot be read: {error.strerror}; name a file with lines `name:token`"
        ) from None
    tokens = []
    for number, entry in enumerate(filter(None, (part.strip() for part in text.replace(",", "\n").splitlines())), 1):
        name, _, rest = entry.partition(":")
        value, _, quota = rest.partition(":")
        if not rest:
            name, value = f"token{number}", entry
        if len(value) < LEAST_CHARACTERS or (quota and not (quota.isdecimal() and int(quota))):
            raise HfkitError(
                f"{source}: token {number} cannot be used: a token has {LEAST_CHARACTERS} characters at least, and "
                "after a colon the requests a minute; write name:token or name:token:60"
            )
        tokens.append(Token(name, hashlib.sha256(value.encode()).digest(), int(quota) if quota else None))
    return tokens


class Guard:
    """The middleware of all routes: hosts, tokens, quotas, sizes, times, headers.

    Args:
        tokens: without any, everybody who reaches the port may ask.
        hosts: of the `Host` header that are answered; empty for any. A page of another site cannot reach a server on
            loopback by a name of its own (DNS rebinding).
        origins: of pages of other sites that may ask (CORS).
        most_bytes: of a body.
        body_seconds: in which a body must have come.
        write_seconds: in which a client must have taken what is sent; its connection is closed otherwise.
    """

    def __init__(
        self,
        app: Any,
        tokens: list[Token],
        hosts: tuple[str, ...] = (),
        origins: tuple[str, ...] = (),
        most_bytes: int = 1_000_000,
        body_seconds: float = 20.0,
        write_seconds: float = 30.0,
    ):
        self.app, self.tokens, self.hosts, self.origins = app, tokens, hosts, origins
        self.most_bytes, self.body_seconds, self.write_seconds = most_bytes, body_seconds, write_seconds
        self.spent: dict[str, list[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        extra = list(HEADERS)
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        if origin in self.origins:
            extra += [(b"access-control-allow-origin", (origin or "").encode()), (b"vary", b"Origin")]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            slow = loop.call_later(self.write_seconds, task.cancel)  # much cheaper than a timeout for each message
            try:
                await send(message)
            finally:
                slow.cancel()

        try:
            if scope["method"] == "OPTIONS" and origin in self.origins:
                extra += [
                    (b"access-control-allow-methods", b"GET, POST"),
                    (b"access-control-allow-headers", b"authorization, content-type"),
                ]
                await answer({"type": "http.response.start", "status": 204, "headers": []})
                await answer({"type": "http.response.body", "body": b""})
                return
            scope.setdefault("state", {})["token"] = self._admit(scope["path"], headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await respond(answer, error)
            return
        sent = False

        async def again() -> Message:
            nonlocal sent
            if sent:
                return await receive()  # that the client has gone
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, answer)

    def _admit(self, path: str, headers: dict[str, str]) -> str | None:
        """Return the name of the token that asks; None where none is needed."""
        host = headers.get("host", "").rsplit(":", 1)[0].strip("[]")
        if self.hosts and host not in self.hosts:
            raise ApiError(403, f"Host: the server answers to {', '.join(self.hosts)} alone", code="host_not_allowed")
        if not self.tokens or path in OPEN:
            return None
        scheme, _, value = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(value.strip().encode("utf-8", "replace")).digest()
        matches = [token for token in self.tokens if hmac.compare_digest(token.digest, digest)]  # all of them, always
        if scheme.lower() != "bearer" or not matches:
            message = "a token is needed: send the header `Authorization: Bearer TOKEN`"
            raise ApiError(401, message, code="invalid_api_key")
        token = matches[0]
        if token.per_minute is not None:
            now = time.monotonic()
            recent = self.spent[token.name] = [then for then in self.spent.get(token.name, []) if now - then < 60]
            if len(recent) >= token.per_minute:
                wait = int(60 - (now - recent[0])) + 1
                message = f"{token.name} may ask {token.per_minute} times a minute; wait {wait} s"
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)
            recent.append(now)
        return token.name

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        too_large = ApiError(413, f"the body has more than {self.most_bytes:,} bytes", code="request_too_large")
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self.most_bytes:
            raise too_large

        async def whole() -> bytes:
            parts: list[bytes] = []
            size = 0
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client went before its body had come")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > self.most_bytes:
                    raise too_large
                if not message.get("more_body"):
                    return b"".join(parts)

        try:
            return await asyncio.wait_for(whole(), self.body_seconds)
        except (TimeoutError, asyncio.TimeoutError):  # two classes in Python 3.10
            raise ApiError(408, f"the body did not come within {self.body_seconds:.0f} s") from None


async def respond(send: Send, error: ApiError) -> None:
    """Send an error as a whole response."""
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
