"""Requests for text: answered by the engine, put on record, and only then ended."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from hfkit.serving import answers as forms
from hfkit.serving.engine import Answer, Piece
from hfkit.serving.errors import ApiError, Failure
from hfkit.serving.models import Served
from hfkit.serving.requests import choose_model, parse, prompt_of, room_of, sampling_of, seed_of
from hfkit.serving.server import Server
from hfkit.serving.types import ChatRequest, CompletionRequest, Sampled

Json = dict[str, Any]
Pieces = asyncio.Queue[tuple[int, Piece]]  # of answers by their index


async def write(server: Server, request: Request, kind: type[Sampled], route: str) -> Response:
    """Answer a request for text."""
    server.check_ready()
    body = parse(kind, await request.body(), request.headers.get("content-type", ""))
    user = server.user(request, body.user)
    served, share = choose_model(server.models, server.settings.shares, body.model, user)
    record = server.record(route, served, share, user, body)
    try:
        prompt = await asyncio.to_thread(prompt_of, served, body)
        room = room_of(served, prompt, body, server.settings.most_tokens)
        if server.engine.waiting + body.n > server.settings.most_waiting:
            raise ApiError(
                429, "too many requests wait for an answer; ask again soon", code="queue_full", retry_after=2
            )
    except ApiError as error:
        await server.refused(record, error)
        raise
    pieces: Pieces = asyncio.Queue()
    written = _start(server, served, body, prompt, room, pieces)
    prefix = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
    form = forms.Form(
        f"{prefix}-{record['id']}", served.name, (served.digest or "")[:16] or None, forms.now(),
        isinstance(body, ChatRequest),
    )  # fmt: skip
    record["id"] = form.id
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        stream = _stream(server, form, written, pieces, record, with_usage)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
    return await _whole(server, request, form, written, pieces, record)


def _start(
    server: Server,
    served: Served,
    body: Sampled,
    prompt: list[int],
    room: int,
    pieces: Pieces,
) -> list[Answer]:
    loop, seed = asyncio.get_running_loop(), seed_of(body.seed)
    rules = sampling_of(body, server.settings.defaults)
    wanted = body.logprobs if isinstance(body, CompletionRequest) else None
    if isinstance(body, ChatRequest) and body.logprobs:
        wanted = body.top_logprobs or 0
    written: list[Answer] = []
    for index in range(body.n):

        def deliver(_: Answer, piece: Piece, index: int = index) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waits
                loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        answer = Answer(
            served, prompt, room, rules, seed + index, deliver, body.stops, wanted, server.settings.seconds
        )
        written.append(answer)
    return written


async def _pieces(
    server: Server, written: list[Answer], pieces: Pieces, record: Json
) -> AsyncGenerator[tuple[int, Piece]]:
    """Yield what the engine delivers. Before the last piece the record is in the log."""
    left, texts, first = len(written), [""] * len(written), None
    model = record["model"]
    server.running += 1
    try:
        for answer in written:
            server.engine.submit(answer)
        while left:
            arrived = await _arrived(pieces)
            if first is None:
                first = record["first_token_seconds"] = time.time() - record["time"]
                server.monitor.first.labels(model).observe(first)
            for index, piece in arrived.items():
                if piece.error is not None:
                    failure = Failure("model", piece.error, "model_failed")
                    record["error"] = failure.record
                    raise failure
                texts[index] += piece.text
                left -= piece.finish is not None
                record["finish"] = piece.finish or record.get("finish")
            if not left:
                record["status"] = 200
                await server.log(record, written, texts)
            for index, piece in arrived.items():
                yield index, piece
    except ApiError as error:
        record["status"] = error.status
        for answer in written:
            server.engine.cancel(answer)
        await server.log(record, written, texts)
        raise
    finally:
        server.running -= 1
        if "status" not in record:  # the client has gone
            record |= {"status": 499, "finish": "cancelled"}
            for answer in written:
                server.engine.cancel(answer)
            await asyncio.shield(server.log(record, written, texts))


async def _arrived(pieces: Pieces) -> dict[int, Piece]:
    """Wait for a piece; return all that have come, joined by answer. The busier the server, the fewer the chunks."""
    index, piece = await pieces.get()
    arrived = {index: piece}
    while not pieces.empty():
        index, piece = pieces.get_nowait()
        if (before := arrived.get(index)) is not None:
            text, tokens = before.text + piece.text, before.tokens + piece.tokens
            piece = Piece(text, tokens, piece.finish, piece.error)
        arrived[index] = piece
    return arrived


async def _stream(
    server: Server,
    form: forms.Form,
    written: list[Answer],
    pieces: Pieces,
    record: Json,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    source = _pieces(server, written, pieces, record)
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
    server: Server,
    request: Request,
    form: forms.Form,
    written: list[Answer],
    pieces: Pieces,
    record: Json,
) -> Response:
    parts: list[list[Piece]] = [[] for _ in written]

    async def collect() -> None:
        async for index, piece in _pieces(server, written, pieces, record):
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


async def _gone(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
