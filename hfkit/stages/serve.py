"""Serve models: an OpenAI-compatible API, a page to try and judge them, a log of what was asked and answered."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import pydantic
from pydantic import StringConstraints

from hfkit.artifacts.manifest import Metrics
from hfkit.errors import HfkitError
from hfkit.recipe.fields import Input, RecipePart, ResolvedInputs, StageRecipe
from hfkit.runtime.distributed import say, world_size
from hfkit.serving import extra
from hfkit.serving.access import LOOPBACK, tokens_of

if TYPE_CHECKING:
    from socket import socket

    from hfkit.serving.server import Server, Settings

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Log(RecipePart):
    """What is kept of requests."""

    content: Literal["redacted", "full", "none"] = pydantic.Field(
        "redacted", description="Texts without personal data, as they are, or none. Numbers are kept always."
    )
    retention_days: int = pydantic.Field(30, ge=1, description="After which records are removed.")


class Defaults(RecipePart):
    """How tokens are chosen where a request does not say."""

    temperature: float = pydantic.Field(1.0, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float = pydantic.Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens of this probability.")
    top_k: int = pydantic.Field(0, ge=0, description="Sample from so many of the likeliest tokens; 0 for all.")


class Limits(RecipePart):
    """What requests may cost."""

    max_tokens: int = pydantic.Field(4096, ge=1, description="Of an answer.")
    queue: int = pydantic.Field(
        256, ge=1, description="Answers that wait for a slot; more requests are refused (429)."
    )
    body_bytes: int = pydantic.Field(1_000_000, ge=1000, description="Of a request.")
    seconds: float = pydantic.Field(300.0, gt=0, description="After which an answer ends as it is.")


class Recipe(StageRecipe):
    """A server of models."""

    MAKES: ClassVar[str] = "log"
    DISTRIBUTED: ClassVar[bool] = False
    ENDS: ClassVar[bool] = False
    SUMMARY: ClassVar[str] = "The log of a server."

    stage: Literal["serve"]
    model: Annotated[str | None, Input("model")] = pydantic.Field(None, description="What answers.")
    models: Annotated[dict[Name, str] | None, Input("model")] = pydantic.Field(
        None,
        min_length=1,
        description="Several models by the names that requests choose them by.",
    )
    shares: dict[Name, float] = pydantic.Field(
        {}, description="Of the requests to the first model, the share that another one answers, such as {new: 0.1}."
    )
    host: str = pydantic.Field("127.0.0.1", description="Another address than loopback needs tokens, or open: true.")
    port: int = pydantic.Field(8000, ge=0, le=65535, description="0 takes one that is free.")
    open: bool = pydantic.Field(False, description="Let everybody who reaches the port ask, without a token.")
    tokens: str | None = pydantic.Field(
        None, description="A file with lines name:token or name:token:60 (requests a minute). By default HFKIT_TOKENS."
    )
    origins: list[str] = pydantic.Field(
        [], description="Pages of other sites that may ask, such as https://a.example."
    )
    slots: int = pydantic.Field(32, ge=1, le=1024, description="Answers that a model writes at the same time.")
    context_length: int | None = pydantic.Field(
        None, ge=16, description="Tokens of a prompt and its answer; by default the model's, 4,096 at most."
    )
    threads: int | None = pydantic.Field(None, ge=1, description="Of the CPU. By default the cores of the container.")
    sampling: Defaults = Defaults()
    limits: Limits = Limits()
    log: Log = Log()
    drain_seconds: float = pydantic.Field(30.0, ge=0, description="To finish what runs when the server is stopped.")
    trust_remote_code: bool = pydantic.Field(False, description="Run the code that comes with a model.")


def check(recipe: Recipe, inputs: ResolvedInputs) -> Iterator[tuple[str, str]]:
    """Check what can be known before a model is loaded."""

    if (recipe.model is None) == (recipe.models is None):
        yield "model", "name a model, or several as `models: {name: folder}`, and not both"
    names = _folders(recipe, inputs)
    for name, share in recipe.shares.items():
        if name not in names or name == next(iter(names), None):
            yield "shares", f"{name}: must name one of the models, and not the first ({', '.join(names)})"
        elif not 0 <= share <= 1:
            yield "shares", f"{name}={share}: must be from 0 to 1"
    if sum(recipe.shares.values()) > 1:
        yield "shares", f"{sum(recipe.shares.values()):g} in all: must be 1 at most"
    try:
        extra.check()
    except HfkitError as error:
        yield "stage", str(error)
    try:
        tokens = tokens_of(Path(recipe.tokens) if recipe.tokens else None)
    except HfkitError as error:
        yield "tokens", str(error)
        return
    if recipe.host not in LOOPBACK and not tokens and not recipe.open:
        yield (
            "host",
            (
                f"{recipe.host}: others reach it, and there is no token; set HFKIT_TOKENS=name:token, `tokens:` to a "
                "file of them, or `open: true` to let everybody ask"
            ),
        )


def run(recipe: Recipe, inputs: ResolvedInputs, output: Path) -> Metrics:
    from hfkit.serving.listen import listen

    server, opened = ready(recipe, inputs, output)
    listen(server, opened, recipe.drain_seconds, _welcome(recipe, server, opened.getsockname()[1]))
    say("stopped; every answer that was received is in the log")
    return {}


def ready(recipe: Recipe, inputs: ResolvedInputs, output: Path) -> "tuple[Server, socket]":
    """Return a server whose models have written a token, and the socket that it is to listen at."""
    import time

    import torch

    from hfkit.runtime.cores import usable_cores
    from hfkit.serving import models
    from hfkit.serving.engine import Engine
    from hfkit.serving.listen import bound
    from hfkit.serving.metrics import Monitor
    from hfkit.serving.server import Server
    from hfkit.serving.store import Store

    if world_size() > 1:
        raise HfkitError("serve runs in one process: use `hfkit run`, or `accelerate launch --num_processes 1`")

    # What can fail at once: the address, the log
    opened = bound(recipe.host, recipe.port)
    store = Store(output, recipe.log.content, recipe.log.retention_days)

    # The models, until each has written a token
    start = time.perf_counter()
    torch.set_num_threads(recipe.threads or usable_cores())
    limits = models.Limits(recipe.slots, recipe.context_length)
    monitor = Monitor()
    served = models.open_all(_folders(recipe, inputs), limits, recipe.trust_remote_code)
    engine = Engine(served, monitor.between.observe)
    engine.start()
    monitor.load.set(time.perf_counter() - start)
    return Server(engine, store, monitor, _settings(recipe)), opened


def _folders(recipe: Recipe, inputs: ResolvedInputs) -> dict[str, str]:
    """Return the folder of each model by its name. A single one is called as its folder."""
    if recipe.models is not None:
        return {key.removeprefix("models."): given.path for key, given in inputs.items() if key.startswith("models.")}
    return {Path(given.path).name: given.path for key, given in inputs.items() if key == "model"}


def _settings(recipe: Recipe) -> "Settings":
    from hfkit.inference.sampling import Sampling
    from hfkit.serving.server import Settings

    is_local = recipe.host in LOOPBACK
    return Settings(
        tokens=[] if recipe.open else tokens_of(Path(recipe.tokens) if recipe.tokens else None),
        shares=recipe.shares,
        defaults=Sampling(recipe.sampling.temperature, recipe.sampling.top_p, recipe.sampling.top_k),
        hosts=LOOPBACK if is_local else (),
        origins=tuple(recipe.origins),
        most_tokens=recipe.limits.max_tokens,
        most_waiting=recipe.limits.queue,
        most_bytes=recipe.limits.body_bytes,
        seconds=recipe.limits.seconds,
    )


def _welcome(recipe: Recipe, server: "Server", port: int) -> str:
    """Return what somebody needs to ask a first question."""
    host = f"[{recipe.host}]" if ":" in recipe.host else recipe.host
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    source = recipe.tokens or "HFKIT_TOKENS"
    access = f"a token of {source}" if server.settings.tokens else "open to everybody who reaches the port"
    kept = {"redacted": "texts without personal data", "full": "texts as they are", "none": "no texts"}
    first = next(iter(server.models.values()))
    header = ' -H "Authorization: Bearer $TOKEN"' if server.settings.tokens else ""
    if first.kind == "classify":
        path, body = "classify", f'{{"model": "{first.name}", "input": "some text"}}'
    elif first.chat_problem is None:
        path = "chat/completions"
        body = f'{{"model": "{first.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    else:
        path, body = "completions", f'{{"model": "{first.name}", "prompt": "Hello"}}'
    windows = [f"{name} ({served.kind}, {served.window:,} tokens)" for name, served in server.models.items()]
    return "\n".join(
        [
            f"\n  {address}  page, /v1 API, /docs, /metrics",
            f"  models   {', '.join(windows)}",
            f"  access   {access}",
            f"  log      {server.store.path}: {kept[recipe.log.content]}, for {recipe.log.retention_days} days",
            f"  try      curl {address}/v1/{path} -H 'Content-Type: application/json'{header} -d '{body}'",
        ]
    )
