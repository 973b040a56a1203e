"""What happens to a request: answered by the engine, put on record, and only then ended."""

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from hfkit.inference.sampling import Sampling
from hfkit.serving import answers as forms
from hfkit.serving.access import Token
from hfkit.serving.engine import Answer, Engine, Piece
from hfkit.serving.errors import ApiError
from hfkit.serving.metrics import Monitor
from hfkit.serving.models import Served
from hfkit.serving.requests import choose_model, parse, prompt_of, room_of, sampling_of, seed_of
from hfkit.serving.store import Store, hashed
from hfkit.serving.types import (
    Body,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    FeedbackRequest,
    Inputs,
    Sampled,
)

logger = logging.getLogger("hfkit.serve")
Json = dict[str, Any]
# A request's fields that are no parameters of it: the log has columns for them, or keeps them as texts.
NO_PARAMETERS = {
    "messages",
    "prompt",
    "input",
    "user",
    "metadata",
    "store",
    "model",
    "stream",
    "stream_options",
    "tools",
}


@dataclass
class Settings:
    """What a server allows.

    Args:
        shares: of the requests to the first model, which go to another.
        defaults: of sampling.
        most_tokens: of an answer.
        most_waiting: answers; more are refused.
        seconds: that an answer may take.
    """

    tokens: list[Token]
    shares: dict[str, float]
    defaults: Sampling = Sampling()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    most_tokens: int = 4096
    most_waiting: int = 256
    most_bytes: int = 1_000_000
    seconds: float = 300.0


class Server:
    """The state behind the routes."""

    def __init__(self, engine: Engine, store: Store, monitor: Monitor, settings: Settings):
        self.engine, self.store, self.monitor, self.settings = engine, store, monitor, settings
        self.models = engine.models
        self.is_draining = False
        self.running = 0

    # ---- text

    async def write(self, request: Request, kind: type[Sampled], route: str) -> Response:
        """Answer a request for text."""
        if self.is_draining or not self.engine.is_ready:
            raise ApiError(503, "the server is stopping or not ready; ask again soon", code="not_ready", retry_after=5)
        body = parse(kind, await request.body(), request.headers.get("content-type", ""))
        user = self._user(request, body.user)
        served, share = choose_model(self.models, self.settings.shares, body.model, user)
        record = self._record(route, served, share, user, body)
        try:
            prompt = await asyncio.to_thread(prompt_of, served, body)
            room = room_of(served, prompt, body, self.settings.most_tokens)
            if self.engine.waiting + body.n > self.settings.most_waiting:
                raise ApiError(
                    429, "too many requests wait for an answer; ask again soon", code="queue_full", retry_after=2
                )
        except ApiError as error:
            await self._refused(record, error)
            raise
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        written = self._start(served, body, prompt, room, pieces)
        prefix = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
        form = forms.Form(
            f"{prefix}-{record['id']}", served.name, (served.digest or "")[:16] or None, forms.now(),
            isinstance(body, ChatRequest),
        )  # fmt: skip
        record["id"] = form.id
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            stream = self._stream(form, written, pieces, record, with_usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        return await self._whole(request, form, written, pieces, record)

    def _start(
        self, served: Served, body: Sampled, prompt: list[int], room: int, pieces: "asyncio.Queue[tuple[int, Piece]]"
    ) -> list[Answer]:
        loop, seed = asyncio.get_running_loop(), seed_of(body)
        wanted = body.logprobs if isinstance(body, CompletionRequest) else None
        if isinstance(body, ChatRequest) and body.logprobs:
            wanted = body.top_logprobs or 0
        written: list[Answer] = []
        for index in range(body.n):

            def deliver(_: Answer, piece: Piece, index: int = index) -> None:
                with suppress(RuntimeError):  # the loop has ended, and with it whoever waits
                    loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

            rules = sampling_of(body, self.settings.defaults)
            answer = Answer(
                served, prompt, room, rules, seed + index, deliver, body.stops, wanted, self.settings.seconds
            )
            written.append(answer)
            self.engine.submit(answer)
        self.running += 1
        return written

    async def _pieces(
        self, written: list[Answer], pieces: "asyncio.Queue[tuple[int, Piece]]", record: Json
    ) -> AsyncGenerator[tuple[int, Piece]]:
        """Yield what the engine delivers. Before the last piece the record is in the log."""
        left, texts, first = len(written), [""] * len(written), None
        model = record["model"]
        try:
            while left:
                index, piece = await pieces.get()
                if first is None:
                    first = record["first_token_seconds"] = time.time() - record["time"]
                    self.monitor.first.labels(model).observe(first)
                if piece.error is not None:
                    reference = secrets.token_hex(8)
                    logger.error("%s: %s", reference, piece.error)
                    record["error"] = f"{reference}: {piece.error}"
                    raise ApiError(500, f"the model failed; tell the reference {reference}", code="model_failed")
                texts[index] += piece.text
                left -= piece.finish is not None
                if piece.finish is not None:
                    record["finish"] = piece.finish
                if not left:
                    record["status"] = 200
                    await self._log(record, written, texts)
                yield index, piece
        except ApiError as error:
            record["status"] = error.status
            await self._log(record, written, texts)
            raise
        finally:
            self.running -= 1
            if "status" not in record:  # the client has gone
                record |= {"status": 499, "finish": "cancelled"}
                for answer in written:
                    self.engine.cancel(answer)
                await asyncio.shield(self._log(record, written, texts))

    async def _stream(
        self,
        form: forms.Form,
        written: list[Answer],
        pieces: "asyncio.Queue[tuple[int, Piece]]",
        record: Json,
        with_usage: bool,
    ) -> AsyncIterator[bytes]:
        source = self._pieces(written, pieces, record)
        try:
            if form.is_chat:
                for index in range(len(written)):
                    yield forms.event(form.first(index))
            async for index, piece in source:
                if piece.text or piece.finish is not None or written[index].top_logprobs is not None:
                    yield forms.event(form.chunk(index, written[index], piece))
            if with_usage:
                yield forms.event(form.last(written))
        except ApiError as error:
            yield forms.event(error.body)
        finally:
            await source.aclose()
        yield b"data: [DONE]\n\n"

    async def _whole(
        self,
        request: Request,
        form: forms.Form,
        written: list[Answer],
        pieces: "asyncio.Queue[tuple[int, Piece]]",
        record: Json,
    ) -> Response:
        parts: list[list[Piece]] = [[] for _ in written]

        async def collect() -> None:
            async for index, piece in self._pieces(written, pieces, record):
                parts[index].append(piece)

        collecting, gone = asyncio.ensure_future(collect()), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({collecting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)
            collecting.result()
        finally:
            for task in (collecting, gone):
                task.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await collecting
        return JSONResponse(form.whole(written, parts))

    # ---- numbers

    async def embed(self, request: Request) -> Response:
        """Answer with the mean of the last hidden states of each text."""
        body = parse(EmbeddingRequest, await request.body(), request.headers.get("content-type", ""))
        served, record, ids = await self._texts(request, body, "/v1/embeddings")
        states = (await self._forward(record, served, ids, with_states=True)).numpy().astype("<f4")
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(row, body.encoding_format)}
            for index, row in enumerate(states)
        ]
        await self._log(record, [], [])
        tokens = sum(map(len, ids))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})

    async def classify(self, request: Request) -> Response:
        """Answer with the probability of each label of each text."""
        body = parse(ClassifyRequest, await request.body(), request.headers.get("content-type", ""))
        served, record, ids = await self._texts(request, body, "/v1/classify")
        if served.kind != "classify":
            raise ApiError(400, f"{served.name} gives no classes; ask another model", "model", "unsupported_model")
        data = []
        for index, shares in enumerate(
            served.probabilities(await self._forward(record, served, ids, with_states=False))
        ):
            ranked = sorted(shares.items(), key=lambda pair: -pair[1])
            probs = [{"label": label, "probability": share} for label, share in ranked]
            data.append({"index": index, "label": ranked[0][0], "probs": probs})
        await self._log(record, [], [json.dumps([row["label"] for row in data], ensure_ascii=False)])
        tokens = sum(map(len, ids))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        head = {"id": record["id"], "object": "list", "created": forms.now(), "model": served.name}
        return JSONResponse({**head, "data": data, "usage": usage})

    async def _texts(self, request: Request, body: Inputs, route: str) -> tuple[Served, Json, list[list[int]]]:
        if self.is_draining or not self.engine.is_ready:
            raise ApiError(503, "the server is stopping or not ready; ask again soon", code="not_ready", retry_after=5)
        user = self._user(request, body.user)
        served, share = choose_model(self.models, self.settings.shares, body.model, user)
        record = self._record(route, served, share, user, body)
        record["id"] = f"cls-{record['id']}"
        ids = await asyncio.to_thread(
            lambda: [text if isinstance(text, list) else served.tokenizer(text)["input_ids"] for text in body.several]
        )
        size = len(served.tokenizer)
        for place, row in enumerate(ids):
            if not 0 < len(row) <= served.window or not all(0 <= token < size for token in row):
                message = f"input: text {place} has {len(row)} tokens; {served.name} takes 1 to {served.window}"
                error = ApiError(400, message, "input", "context_length_exceeded")
                await self._refused(record, error)
                raise error
        record |= {"prompt_tokens": sum(map(len, ids)), "completion_tokens": 0, "status": 200}
        return served, record, ids

    async def _forward(self, record: Json, served: Served, ids: list[list[int]], with_states: bool) -> Any:
        try:
            return await asyncio.wrap_future(self.engine.forward(served, ids, with_states))
        except Exception as error:
            reference = secrets.token_hex(8)
            logger.error("%s: %s: %s", reference, type(error).__name__, error)
            record |= {"status": 500, "error": f"{reference}: {error}"}
            await self._log(record, [], [])
            raise ApiError(500, f"the model failed; tell the reference {reference}", code="model_failed") from None

    # ---- the log

    async def feedback(self, request: Request) -> Response:
        body = parse(FeedbackRequest, await request.body(), request.headers.get("content-type", ""))
        values = body.model_dump(exclude={"request_id"})
        for name in ("correction", "comment"):
            values[name] = self.store.text(values[name])
        user = hashed(self._user(request, None))
        state = await asyncio.wrap_future(self.store.write_feedback(body.request_id, user, values))
        if state == "unknown":
            message = "request_id: there is no such answer in the log"
            raise ApiError(404, message, "request_id", "request_not_found")
        if state == "late":
            message = "request_id: a judgement can be changed for a day, and that is over"
            raise ApiError(409, message, "request_id", "too_late")
        for name, value in values.items():
            if value is not None:
                kind = {-1: "down", 0: "none", 1: "up"}[value] if name == "rating" else name
                self.monitor.feedback.labels(kind).inc()
        return JSONResponse({"object": "feedback", "request_id": body.request_id, "saved": state == "saved"})

    def _record(self, route: str, served: Served, share: str | None, user: str, body: Body) -> Json:
        texts = {
            "messages",
            "prompt",
            "input",
            "user",
            "metadata",
            "store",
            "model",
            "stream",
            "stream_options",
            "tools",
        }
        parameters = body.model_dump(exclude_none=True, exclude=texts)
        keeps = getattr(body, "store", None) is not False
        prompt: Any = getattr(body, "prompt", None) or getattr(body, "input", None)
        if isinstance(body, ChatRequest):
            prompt = [{"role": message.role, "content": message.text} for message in body.messages]
        text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
        return {
            "id": secrets.token_hex(16), "time": time.time(), "route": route, "model": served.name, "share": share,
            "digest": served.digest, "user": hashed(user), "parameters": json.dumps(parameters, ensure_ascii=False),
            "prompt": self.store.text(text) if keeps else None, "keeps": keeps,
        }  # fmt: skip

    async def _log(self, record: Json, written: list[Answer], texts: list[str]) -> None:
        """Put a record into the log, and wait until it is there."""
        record["seconds"] = time.time() - record["time"]
        if written:
            record["prompt_tokens"] = len(written[0].prompt)
            record["completion_tokens"] = sum(len(answer.tokens) for answer in written)
        if record.pop("keeps", True) and texts:
            answer = texts[0] if len(texts) == 1 else json.dumps(texts, ensure_ascii=False)
            record["answer"] = self.store.text(answer)
        self.monitor.requests.labels(record["route"], record["model"], str(record["status"])).inc()
        self.monitor.tokens.labels(record["model"], "prompt").inc(record.get("prompt_tokens") or 0)
        self.monitor.tokens.labels(record["model"], "completion").inc(record.get("completion_tokens") or 0)
        with suppress(asyncio.CancelledError):
            await asyncio.wrap_future(self.store.write(record))

    async def _refused(self, record: Json, error: ApiError) -> None:
        record |= {"status": error.status, "error": error.message}
        await self._log(record, [], [])

    def _user(self, request: Request, named: str | None) -> str:
        client = request.client.host if request.client else ""
        return named or getattr(request.state, "token", None) or client


def _encoded(row: np.ndarray, form: str) -> Any:
    return base64.b64encode(row.tobytes()).decode() if form == "base64" else row.tolist()


async def _gone(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
