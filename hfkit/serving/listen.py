"""The process of a server: a socket, the engine behind it, and an end that loses nothing."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from hfkit.errors import HfkitError
from hfkit.runtime.distributed import say
from hfkit.runtime.signals import EXIT_CODE
from hfkit.serving.app import create_app
from hfkit.serving.server import Server

KEEP_ALIVE_SECONDS, CLOSE_SECONDS = 20, 2
CONNECTIONS = 1000
SWITCH_SECONDS = 5e-4  # after which the engine lets the thread of the routes run; Python's own 5 ms delay each token


def bound(host: str, port: int) -> socket.socket:
    """Return a socket at an address.

    Raises:
        HfkitError: if it is not to be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        raise HfkitError(f"host={host}, port={port}: {error.strerror}; set another port, 0 for a free one") from None
    return opened


class Background:
    """A server in a thread, for Python. `address` is where it answers; `stop`, or the end of `with`, ends it."""

    def __init__(self, server: Server, opened: socket.socket):
        self.server, self.address = server, f"http://{opened.getsockname()[0]}:{opened.getsockname()[1]}"
        self._http = uvicorn.Server(_config(server))
        self._thread = threading.Thread(target=self._http.run, args=([opened],), daemon=True)
        self._thread.start()
        while not self._http.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.is_draining = self._http.should_exit = True
        self._thread.join()
        self.server.engine.stop()
        self.server.store.close()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def _config(server: Server) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(server), log_config=None, access_log=False, lifespan="off", server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=CLOSE_SECONDS, limit_concurrency=CONNECTIONS,
    )  # fmt: skip


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # `serve` takes them itself
        yield


def listen(server: Server, opened: socket.socket, drain_seconds: float, welcome: str) -> None:
    """Answer requests until SIGTERM or SIGINT; then finish what runs, up to a limit. A second one ends at once."""
    sys.setswitchinterval(SWITCH_SECONDS)
    asyncio.run(_listen(server, opened, drain_seconds, welcome))
    server.engine.stop()
    server.store.close()


async def _listen(server: Server, opened: socket.socket, drain_seconds: float, welcome: str) -> None:
    http = _Uvicorn(_config(server))
    drained: list[asyncio.Task[None]] = []

    def stop(*_: Any) -> None:
        if server.is_draining:
            os._exit(EXIT_CODE)  # every record that a client has seen the end of is on the disk
        server.is_draining = True
        drained.append(asyncio.ensure_future(drain()))

    async def drain() -> None:
        end = asyncio.get_running_loop().time() + drain_seconds
        while server.running and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        http.should_exit = True

    async def announce() -> None:
        while not http.started:
            await asyncio.sleep(0.01)
        say(welcome)

    loop = asyncio.get_running_loop()
    announcing = asyncio.ensure_future(announce())
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        loop.add_signal_handler(number, stop)
    try:
        await http.serve(sockets=[opened])
    finally:
        announcing.cancel()
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
