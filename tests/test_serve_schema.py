"""Requests made from the specification by schemathesis, and from what is near it: no answer is a 500.

pip install schemathesis && pytest -m schema
"""

import contextlib
import socket
import threading
import time
from typing import Any

import pytest

from hfkit.serving.server import Server

schemathesis: Any = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.schema


@pytest.fixture(scope="module")
def address(served: tuple[str, Server]) -> str:
    return served[0]


def test_no_request_is_answered_with_a_failure(address: str) -> None:
    import hypothesis

    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    statuses: dict[int, int] = {}
    for operation in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            strategy = operation.ok().as_strategy(generation_mode=mode)

            @hypothesis.given(case=strategy)
            @hypothesis.settings(max_examples=40, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
            def call(case: Any) -> None:
                if isinstance(case.body, dict) and "model" in case.body and len(str(case.body)) % 2:
                    case.body["model"] = "toy"
                    case.body["max_tokens"] = 2
                answer = case.call(base_url=address)
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                assert answer.status_code < 500 or answer.status_code == 503, (case.body, answer.text)
                if answer.status_code >= 400:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

            with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # a route without parameters has no wrong ones
                call()
    assert statuses.get(200) and statuses.get(400)


def test_half_open_clients_are_cut_off(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as opened:
        opened.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        opened.settimeout(40)
        start = time.monotonic()
        assert b"408" in opened.recv(1000) and time.monotonic() - start < 30
    assert threading.active_count() < 50
