"""The routes of the server."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from hfkit.serving import documentation
from hfkit.serving.access import Guard
from hfkit.serving.errors import ApiError, Failure
from hfkit.serving.models import Served
from hfkit.serving.requests import choose_model
from hfkit.serving.server import Server
from hfkit.serving.types import (
    Body,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    FeedbackRequest,
)
from hfkit.serving.writing import write
from hfkit.version import __version__

PAGE = Path(__file__).with_name("page.html")
Json = dict[str, Any]


def create_app(server: Server) -> Any:
    """Return the ASGI application."""
    app = FastAPI(title="hfkit serve", version=__version__, docs_url=None, redoc_url=None)

    def route(path: str, answer: Callable[[Request], Any], body: type[Body]) -> None:
        app.add_api_route(path, answer, methods=["POST"], openapi_extra=documentation.of(body), response_model=None,
                          summary=(body.__doc__ or "").strip().splitlines()[0])  # fmt: skip

    async def chat(request: Request) -> Response:
        return await write(server, request, ChatRequest, "/v1/chat/completions")

    async def completions(request: Request) -> Response:
        return await write(server, request, CompletionRequest, "/v1/completions")

    route("/v1/chat/completions", chat, ChatRequest)
    route("/v1/completions", completions, CompletionRequest)
    route("/v1/embeddings", server.embed, EmbeddingRequest)
    route("/v1/classify", server.classify, ClassifyRequest)
    route("/v1/feedback", server.feedback, FeedbackRequest)

    @app.get("/v1/models")
    async def models() -> Json:
        """The models that can be named."""
        data = [_described(served) for served in server.models.values()]
        return {"object": "list", "data": data, "log": server.store.content}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Json:
        """One of them."""
        served, _ = choose_model(server.models, {}, name, "")
        return _described(served)

    @app.get("/health/live")
    async def live() -> Json:
        """Whether the process answers."""
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> Json:
        """Whether requests are taken: every model has written a token, and the server is not stopping."""
        server.check_ready()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        server.monitor.waiting.set(server.engine.waiting)
        server.monitor.slots.set(server.engine.in_use)
        server.monitor.lost.set(server.store.lost)
        return Response(server.monitor.text(), media_type="text/plain; version=0.0.4")

    @app.get("/docs", response_class=HTMLResponse)
    async def docs() -> Response:
        """The routes and their parameters."""
        return _page(documentation.page(app.openapi()))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        return _page(PAGE.read_text(encoding="utf-8"))

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        return await api_error(request, Failure("server", f"{type(error).__name__}: {error}", cause=error))

    settings = server.settings
    return Guard(app, settings.tokens, settings.hosts, settings.origins, settings.most_bytes)


def _described(served: Served) -> Json:
    return {
        "id": served.name, "object": "model", "created": served.created, "owned_by": "hfkit", "kind": served.kind,
        "chat": served.chat_problem is None, "context_length": served.window, "digest": served.digest,
    }  # fmt: skip


def _page(text: str) -> Response:
    """Return a page that may run its own script alone."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(text.replace("__NONCE__", nonce), headers={"content-security-policy": policy})
