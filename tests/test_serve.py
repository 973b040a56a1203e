"""The API as a client sees it: the official one, and those that send what they should not."""

import asyncio
import base64
import json
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from hfkit.inference.prompting import generate
from hfkit.serving.access import tokens_of
from hfkit.serving.server import Server
from hfkit.serving.store import read
from tests.serving import running

HELLO = [{"role": "user", "content": "the cat sees"}]


@pytest.fixture
def client(served: tuple[str, Server]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


def ask(address: str, path: str, body: Any, **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return httpx.post(f"{address}{path}", content=content, headers=headers, timeout=60, **options)


# ---- the official client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy", "labels"]
    assert client.models.retrieve("toy").owned_by == "hfkit"
    with pytest.raises(openai.NotFoundError, match="there is no 'gone' here; there is toy, labels"):
        client.models.retrieve("gone")


def test_a_completion_is_what_the_model_writes(client: openai.OpenAI, toy_models: Path) -> None:
    found = client.completions.create(model="toy", prompt="the cat", max_tokens=20, temperature=0)
    (expected,) = generate(toy_models / "toy", ["the cat"], max_new_tokens=20)
    assert found.choices[0].text == expected.rstrip("\ufffd")  # a character that is not whole is not shown
    assert found.usage is not None and found.usage.completion_tokens == 20
    assert found.choices[0].finish_reason == "length"


def test_a_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    options: Any = {"model": "toy", "messages": HELLO, "max_tokens": 40, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**options)
    texts, finishes, usage = ["", ""], {}, None
    with client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert finishes == {0: whole.choices[0].finish_reason, 1: whole.choices[1].finish_reason}
    assert usage == whole.usage


def test_log_probabilities(client: openai.OpenAI) -> None:
    options: Any = {"model": "toy", "messages": HELLO, "max_tokens": 5, "temperature": 0, "logprobs": True}
    content = client.chat.completions.create(**options, top_logprobs=3).choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and len(content) == 5
    for token in content:
        assert token.token == token.top_logprobs[0].token and token.logprob == token.top_logprobs[0].logprob < 0
        assert bytes(token.bytes or []).decode() == token.token and len(token.top_logprobs) == 3
    legacy = client.completions.create(model="toy", prompt="the", max_tokens=4, logprobs=2, temperature=0).choices[0]
    assert legacy.logprobs is not None and len(legacy.logprobs.token_logprobs or []) == 4


def test_embeddings(client: openai.OpenAI, served: tuple[str, Server]) -> None:
    texts = ["the cat", "a red dog under the tree"]
    found = client.embeddings.create(model="toy", input=texts, encoding_format="float")
    model = served[1].models["toy"]
    for text, entry in zip(texts, found.data, strict=True):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = model.model.model(input_ids=ids).last_hidden_state[0].mean(0)
        assert entry.embedding == pytest.approx(states.tolist(), abs=1e-5)
    raw = ask(served[0], "/v1/embeddings", {"model": "toy", "input": texts[0], "encoding_format": "base64"}).json()
    values = struct.unpack("<32f", base64.b64decode(raw["data"][0]["embedding"]))
    assert list(values) == pytest.approx(found.data[0].embedding, abs=1e-5)


def test_classes(served: tuple[str, Server]) -> None:
    found = ask(served[0], "/v1/classify", {"model": "labels", "input": ["the cat", "a dog"]}).json()
    model = served[1].models["labels"]
    for text, row in zip(["the cat", "a dog"], found["data"], strict=True):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            shares = model.model(input_ids=ids).logits[0].softmax(-1).tolist()
        names = dict(zip(("red", "green", "blue"), shares, strict=True))
        assert {entry["label"]: entry["probability"] for entry in row["probs"]} == pytest.approx(names, abs=1e-5)
        assert row["label"] == max(names, key=lambda name: names[name])


def test_async_client(served: tuple[str, Server]) -> None:
    async def many() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served[0]}/v1", api_key="none") as client:
            jobs = [
                client.completions.create(model="toy", prompt="the cat", max_tokens=8, seed=seed) for seed in range(40)
            ]
            return await asyncio.gather(*jobs)

    assert len({found.choices[0].text for found in asyncio.run(many())}) > 20


# ---- the engine


def test_a_seed_gives_the_same_text_whatever_else_runs(served: tuple[str, Server]) -> None:
    address, _ = served
    body = {"model": "toy", "prompt": "a small dog", "max_tokens": 40, "seed": 7, "temperature": 0.8, "top_p": 0.9}
    alone = ask(address, "/v1/completions", body).json()["choices"][0]["text"]

    def other(number: int) -> None:
        ask(address, "/v1/completions", {"model": "toy", "prompt": "the " * (5 * number + 1), "max_tokens": 60})

    with ThreadPoolExecutor(16) as pool:
        others = [pool.submit(other, number) for number in range(12)]
        texts = list(pool.map(lambda _: ask(address, "/v1/completions", body).json()["choices"][0]["text"], range(4)))
        for job in others:
            job.result()
    assert texts == [alone] * 4


def test_stops(served: tuple[str, Server], toy_models: Path) -> None:
    address, _ = served
    (text,) = generate(toy_models / "toy", ["the cat"], max_new_tokens=40)
    for size in (1, 3, 6):
        stop = text[10 : 10 + size]
        body = {"model": "toy", "prompt": "the cat", "max_tokens": 40, "temperature": 0, "stop": ["absent", stop]}
        choice = ask(address, "/v1/completions", body).json()["choices"][0]
        assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_a_client_that_goes_frees_its_slot(served: tuple[str, Server], toy_models: Path) -> None:
    address, server = served
    body = {"model": "toy", "prompt": "the tree", "max_tokens": 240, "stream": True, "temperature": 1.5}
    for _ in range(3):
        with httpx.stream("POST", f"{address}/v1/completions", json=body) as answer:
            next(answer.iter_bytes())
    deadline = time.monotonic() + 10
    while (server.engine.in_use or server.running) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.engine.in_use == 0 and server.running == 0


def test_more_requests_than_slots(toy_models: Path, tmp_path: Path) -> None:
    with running({"toy": str(toy_models / "toy")}, tmp_path, slots=2, most_waiting=4) as (address, server):
        body = {"model": "toy", "prompt": "the", "max_tokens": 250, "temperature": 1.9}
        with ThreadPoolExecutor(16) as pool:
            codes = [
                answer.status_code for answer in pool.map(lambda _: ask(address, "/v1/completions", body), range(16))
            ]
        assert set(codes) == {200, 429} and codes.count(200) >= 4
        assert server.engine.in_use == 0 and server.running == 0


def test_adapters_share_their_base(toy_models: Path, tmp_path: Path) -> None:
    import peft

    from hfkit.data.tokenizer import load_tokenizer
    from hfkit.model.loading import load_model

    folders = {}
    for number in range(2):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
        adapter: Any = peft.get_peft_model(load_model(str(toy_models / "toy")), config)
        folders[f"a{number}"] = str(tmp_path / f"a{number}")
        adapter.save_pretrained(folders[f"a{number}"])
        load_tokenizer(str(toy_models / "toy")).save_pretrained(folders[f"a{number}"])
    expected = [generate(path, ["the cat"], max_new_tokens=16)[0].rstrip("\ufffd") for path in folders.values()]
    with running(folders, tmp_path / "log") as (address, server):
        assert server.models["a0"].model is server.models["a1"].model

        def text(number: int) -> str:
            body = {"model": f"a{number % 2}", "prompt": "the cat", "max_tokens": 16, "temperature": 0}
            return ask(address, "/v1/completions", body).json()["choices"][0]["text"]

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(text, range(6))) == expected * 3 and expected[0] != expected[1]


def test_a_step_that_fails_is_told_and_the_server_goes_on(toy_models: Path, tmp_path: Path) -> None:
    body = {"model": "toy", "prompt": "the cat sees the dog", "max_tokens": 20, "seed": 1}
    with running({"toy": str(toy_models / "toy")}, tmp_path) as (address, server):
        expected = ask(address, "/v1/completions", body).json()["choices"][0]["text"]
        batch: Any = server.models["toy"].batch
        choose = batch.choose

        def fail(*_: Any) -> Any:
            batch.choose = choose
            raise MemoryError("no room for the keys")

        batch.choose = fail
        error = ask(address, "/v1/completions", body)
        assert error.status_code == 500 and "no room" not in error.text
        reference = error.json()["error"]["message"].split()[-1]
        assert ask(address, "/v1/completions", body).json()["choices"][0]["text"] == expected
        assert server.engine.in_use == server.running == 0
    errors = [record["error"] for record in read(tmp_path)]
    assert errors == [None, f"{reference}: MemoryError: no room for the keys", None]


def test_shares_are_sticky_by_user(toy_models: Path, tmp_path: Path) -> None:
    folders = {"old": str(toy_models / "toy"), "new": str(toy_models / "toy")}
    with running(folders, tmp_path, shares={"new": 0.3}) as (address, _):

        def model(user: int) -> str:
            body = {"model": "old", "prompt": "the", "max_tokens": 1, "user": f"user {user}"}
            return ask(address, "/v1/completions", body).json()["model"]

        names = [model(user) for user in range(60)]
        assert names == [model(user) for user in range(60)] and 8 <= names.count("new") <= 28
    records = list(read(tmp_path))
    assert [record["share"] for record in records[:60]] == [name if name == "new" else None for name in names]


# ---- the log


def test_the_log_has_what_was_asked_and_judged(toy_models: Path, tmp_path: Path) -> None:
    with running({"toy": str(toy_models / "toy")}, tmp_path, content="redacted") as (address, server):
        body = {"model": "toy", "prompt": "write to ann@example.org", "max_tokens": 4, "user": "ann"}
        answer = ask(address, "/v1/completions", body).json()
        secret = ask(address, "/v1/completions", {**body, "store": False}).json()
        ask(address, "/v1/completions", {**body, "model": "gone"})
        ask(address, "/v1/completions", {**body, "max_tokens": 9999})
        judged = {"request_id": answer["id"], "rating": -1, "correction": "mail bob@example.org"}
        assert ask(address, "/v1/feedback", judged).json()["saved"] is True
        assert ask(address, "/v1/feedback", {**judged, "rating": 1}).json()["saved"] is True
        unknown = ask(address, "/v1/feedback", {"request_id": "cmpl-0", "rating": 1})
        assert unknown.status_code == 404 and unknown.json()["error"]["param"] == "request_id"
        numbers = httpx.get(f"{address}/metrics").text
        assert 'hfkit_requests_total{model="toy",route="/v1/completions",status="200"} 2.0' in numbers
    first, second, refused = read(tmp_path)
    assert first["id"] == answer["id"] and first["answer"] == answer["choices"][0]["text"]
    assert first["prompt"] == "write to <EMAIL>" and "ann" not in first["user"] and first["user"] == second["user"]
    assert first["feedback"]["rating"] == 1 and first["feedback"]["correction"] == "mail <EMAIL>"
    assert second["id"] == secret["id"] and second["prompt"] is None and second["answer"] is None
    assert second["completion_tokens"] == 4 and second["feedback"] is None
    assert refused["status"] == 400 and "max_tokens" in refused["error"]


# ---- who may ask


def test_every_route_asks_for_a_token(toy_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFKIT_TOKENS", "ann:0123456789abcdefgh,bob:abcdefgh0123456789:3")
    with running({"toy": str(toy_models / "toy")}, tmp_path, tokens=tokens_of(None)) as (address, server):
        paths = set(
            httpx.get(f"{address}/openapi.json", headers={"Authorization": "Bearer 0123456789abcdefgh"}).json()[
                "paths"
            ]
        )
        assert len(paths) > 9
        for path in [*paths, "/openapi.json", "/v1", "/../v1/models", "//v1/models"]:
            for method in ("GET", "POST", "OPTIONS", "PUT"):
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic 0123456789abcdefgh"}):
                    code = httpx.request(method, f"{address}{path}", headers=headers).status_code
                    assert code == 401 or path.startswith("/health"), (path, method, code)
        bob = {"Authorization": "Bearer abcdefgh0123456789"}
        codes = [httpx.get(f"{address}/v1/models", headers=bob) for _ in range(4)]
        assert [code.status_code for code in codes] == [200, 200, 200, 429] and int(
            codes[3].headers["retry-after"]
        ) > 0
        retrying = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong-key")
        with pytest.raises(openai.AuthenticationError, match="Bearer TOKEN"):
            retrying.models.list()


def test_hosts_origins_and_headers(toy_models: Path, tmp_path: Path) -> None:
    options: Any = {"hosts": ("127.0.0.1", "localhost"), "origins": ("https://a.example",)}
    with running({"toy": str(toy_models / "toy")}, tmp_path, **options, most_bytes=2000) as (address, _):
        assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 403
        answer = httpx.get(f"{address}/v1/models", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in answer.headers and answer.headers["x-frame-options"] == "DENY"
        answer = httpx.options(f"{address}/v1/models", headers={"Origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        page = httpx.get(address)
        assert "default-src 'none'" in page.headers["content-security-policy"] and "__NONCE__" not in page.text
        assert ask(address, "/v1/completions", {"model": "toy", "prompt": "x" * 3000}).status_code == 413
        assert ask(address, "/v1/completions", b"{}", headers={"Content-Type": "text/plain"}).status_code == 415


# ---- what bad input gets

OK: dict[str, Any] = {"model": "toy", "messages": HELLO, "max_tokens": 4}
TEXT: dict[str, Any] = {"model": "toy", "prompt": "the cat", "max_tokens": 4}
SURROGATE = b'{"model": "\\ud800"}'
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BAD: list[tuple[str, Any, int, str | None]] = [
    *((path, body, 400, None) for path in (CHAT, COMPLETIONS, "/v1/embeddings", "/v1/classify", "/v1/feedback")
      for body in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"', SURROGATE, b"[" * 9999)),
    *((CHAT, {**OK, name.split(".")[0]: value}, 400, name) for name, value in (
        ("temperature", "1"), ("temperature", -1), ("temperature", 3), ("top_p", 0), ("top_p", 2),
        ("top_k", -1), ("n", 0), ("n", 1000), ("n", 1.5), ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 10**9),
        ("max_tokens", 2.5), ("temperature", True), ("max_completion_tokens", -1), ("seed", "a"), ("seed", 2**70),
        ("stop", ["a"] * 9), ("stop", ""), ("stop.0", [""]), ("stop.0", ["x" * 999]), ("stop", 5), ("stream", "yes"),
        ("logprobs", 3), ("top_logprobs", 5), ("messages", []), ("messages", "hello"), ("messages", None),
        ("messages", [{"role": "user", "content": "a"}] * 1000), ("model", ""), ("model", 5), ("user", ""),
        ("frequency_penalty", 0.5), ("presence_penalty", -1), ("logit_bias", {"5": 1}), ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}), ("best_of", 3), ("audio", {}), ("suffix", "x"), ("foo", 1),
        ("generation_config", {"max_length": 9}), ("chat_template", "{{ 1 }}"), ("trust_remote_code", True),
        ("tools", [{"type": "function", "function": {"name": "f"}}]), ("stream_options", {"include_usage": True}))),
    (CHAT, {**OK, "messages": [{"role": "boss", "content": "x"}]}, 400, "messages.0.role"),
    (CHAT, {**OK, "messages": [{"role": "user"}]}, 400, "messages.0.content"),
    (CHAT, {**OK, "messages": [{"role": "user", "content": "x\0y"}]}, 400, "messages.0.content"),
    (CHAT, {**OK, "messages": [{"content": "x"}]}, 400, "messages.0.role"),
    (CHAT, {**OK, "messages": [*HELLO, {"role": "assistant", "content": "x"}]}, 400, "messages"),
    (CHAT, {**OK, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
     400, "messages.0.content.0.type"),
    (CHAT, {**OK, "messages": [{"role": "user", "content": "the cat " * 500}]}, 400, "messages"),
    (CHAT, {**OK, "model": "../../etc/passwd"}, 404, "model"),
    (CHAT, {**OK, "model": "labels"}, 400, "model"),
    (COMPLETIONS, {**TEXT, "prompt": ""}, 400, None),
    (COMPLETIONS, {**TEXT, "prompt": [10**6]}, 400, "prompt"),
    (COMPLETIONS, {**TEXT, "prompt": [-1]}, 400, "prompt"),
    (COMPLETIONS, {**TEXT, "prompt": ["a", "b"]}, 400, "prompt.0"),
    (COMPLETIONS, {**TEXT, "echo": True}, 400, "echo"),
    (COMPLETIONS, {**TEXT, "logprobs": 50}, 400, "logprobs"),
    ("/v1/embeddings", {"model": "toy", "input": []}, 400, "input"),
    ("/v1/embeddings", {"model": "toy", "input": "the cat " * 500}, 400, "input"),
    ("/v1/embeddings", {"model": "toy", "input": "x", "dimensions": 5}, 400, "dimensions"),
    ("/v1/classify", {"model": "toy", "input": "x"}, 400, "model"),
    ("/v1/classify", {"model": "labels", "input": [""] * 999}, 400, None),
    ("/v1/feedback", {"request_id": "x", "rating": 5}, 400, "rating"),
    ("/v1/feedback", {"request_id": "../x", "rating": 1}, 400, "request_id"),
    ("/v1/feedback", {"request_id": "x"}, 400, "rating"),
    ("/v1/nothing", {}, 404, None),
    ("/v1/models", {}, 405, None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD, ids=range(len(BAD)))
def test_bad_requests(served: tuple[str, Server], path: str, body: Any, status: int, param: str | None) -> None:
    answer = ask(served[0], path, body)
    if path == COMPLETIONS and isinstance(body, dict) and body.get("prompt") == "":
        assert answer.status_code in (200, 400)  # by whether the tokenizer begins with a token
        return
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    if param is not None:
        assert error["param"] == param, error


def test_no_request_changes_what_others_get(served: tuple[str, Server]) -> None:
    address, _ = served
    body = {**TEXT, "max_tokens": 60, "seed": 5}
    expected = ask(address, COMPLETIONS, body).json()["choices"][0]["text"]
    is_over = threading.Event()

    def disturb() -> None:
        while not is_over.is_set():
            for path, bad, _, _ in BAD[::7]:
                ask(address, path, bad)

    with ThreadPoolExecutor(2) as pool:
        job = pool.submit(disturb)
        texts = [ask(address, COMPLETIONS, body).json()["choices"][0]["text"] for _ in range(8)]
        is_over.set()
        job.result()
    assert texts == [expected] * 8
