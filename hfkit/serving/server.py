"""The state behind the routes: models, limits, the log; and the requests whose answers are numbers."""

import asyncio
import base64
import json
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from hfkit.inference.sampling import Sampling
from hfkit.serving import answers as forms
from hfkit.serving.access import Token
from hfkit.serving.engine import Answer, Engine
from hfkit.serving.errors import ApiError, Failure
from hfkit.serving.metrics import Monitor
from hfkit.serving.models import Served
from hfkit.serving.requests import choose_model, parse
from hfkit.serving.store import Store, hashed
from hfkit.serving.types import (
    Body,
    ChatRequest,
    ClassifyRequest,
    EmbeddingRequest,
    FeedbackRequest,
    Inputs,
)

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

    def check_ready(self) -> None:
        """
        Raises:
            ApiError: if no requests are taken: not yet, or no more.
        """
        if self.is_draining or not self.engine.is_ready:
            raise ApiError(503, "the server is stopping or not ready; ask again soon", code="not_ready", retry_after=5)

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
        await self.log(record, [], [])
        return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": _usage(ids)})

    async def classify(self, request: Request) -> Response:
        """Answer with the probability of each label of each text."""
        body = parse(ClassifyRequest, await request.body(), request.headers.get("content-type", ""))
        served, record, ids = await self._texts(request, body, "/v1/classify")
        if served.kind != "classify":
            raise ApiError(400, f"{served.name} gives no classes; ask another model", "model", "unsupported_model")
        data = []
        logits = await self._forward(record, served, ids, with_states=False)
        for index, shares in enumerate(served.probabilities(logits)):
            ranked = sorted(shares.items(), key=lambda pair: -pair[1])
            probs = [{"label": label, "probability": share} for label, share in ranked]
            data.append({"index": index, "label": ranked[0][0], "probs": probs})
        await self.log(record, [], [json.dumps([row["label"] for row in data], ensure_ascii=False)])
        head = {"id": record["id"], "object": "list", "created": forms.now(), "model": served.name}
        return JSONResponse({**head, "data": data, "usage": _usage(ids)})

    async def _texts(self, request: Request, body: Inputs, route: str) -> tuple[Served, Json, list[list[int]]]:
        self.check_ready()
        user = self.user(request, body.user)
        served, share = choose_model(self.models, self.settings.shares, body.model, user)
        record = self.record(route, served, share, user, body)
        record["id"] = f"cls-{record['id']}"
        ids = await asyncio.to_thread(
            lambda: [text if isinstance(text, list) else served.tokenizer(text)["input_ids"] for text in body.several]
        )
        size = len(served.tokenizer)
        for place, row in enumerate(ids):
            if not 0 < len(row) <= served.window or not all(0 <= token < size for token in row):
                message = f"input: text {place} has {len(row)} tokens; {served.name} takes 1 to {served.window}"
                error = ApiError(400, message, "input", "context_length_exceeded")
                await self.refused(record, error)
                raise error
        record |= {"prompt_tokens": sum(map(len, ids)), "completion_tokens": 0, "status": 200}
        return served, record, ids

    async def _forward(self, record: Json, served: Served, ids: list[list[int]], with_states: bool) -> Any:
        try:
            return await asyncio.wrap_future(self.engine.forward(served, ids, with_states))
        except Exception as error:
            failure = Failure("model", f"{type(error).__name__}: {error}", "model_failed")
            record |= {"status": failure.status, "error": failure.record}
            await self.log(record, [], [])
            raise failure from None

    # ---- the log

    async def feedback(self, request: Request) -> Response:
        body = parse(FeedbackRequest, await request.body(), request.headers.get("content-type", ""))
        values = body.model_dump(exclude={"request_id"})
        for name in ("correction", "comment"):
            values[name] = self.store.text(values[name])
        user = hashed(self.user(request, None))
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

    def record(self, route: str, served: Served, share: str | None, user: str, body: Body) -> Json:
        parameters = body.model_dump(exclude_none=True, exclude=NO_PARAMETERS)
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

    async def log(self, record: Json, written: list[Answer], texts: list[str]) -> None:
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

    async def refused(self, record: Json, error: ApiError) -> None:
        record |= {"status": error.status, "error": error.message}
        await self.log(record, [], [])

    def user(self, request: Request, named: str | None) -> str:
        client = request.client.host if request.client else ""
        return named or getattr(request.state, "token", None) or client


def _usage(ids: list[list[int]]) -> Json:
    tokens = sum(map(len, ids))
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _encoded(row: np.ndarray, form: str) -> Any:
    return base64.b64encode(row.tobytes()).decode() if form == "base64" else row.tolist()
