"""The server as a process: what is there after a kill, how it stops, what it refuses before it listens."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hfkit import cli
from hfkit.serving import extra
from hfkit.serving.store import read

BODY = {"model": "toy", "prompt": "the cat", "max_tokens": 200, "temperature": 1.9, "seed": 1}


@pytest.fixture
def process(toy_models: Path, tmp_path: Path) -> Iterator[tuple[str, "subprocess.Popen[str]", Path]]:
    log = tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "hfkit",
        "serve",
        str(toy_models / "toy"),
        "--port",
        "0",
        "--output-dir",
        str(log),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert server.stdout is not None
    address = ""
    for line in server.stdout:
        address = next(iter(re.findall(r"http://127.0.0.1:\d+", line)), address)
        if line.strip().startswith("try"):
            break
    yield address, server, log
    server.kill()
    server.wait()


def test_an_answer_that_was_received_is_in_the_log_after_a_kill(
    process: tuple[str, "subprocess.Popen[str]", Path],
) -> None:
    address, server, log = process
    received: list[str] = []

    def ask(number: int) -> None:
        for turn in range(1000):
            body = {**BODY, "max_tokens": 6, "seed": 1000 * number + turn, "stream": bool(turn % 2)}
            try:
                answer = httpx.post(f"{address}/v1/completions", json=body)
            except httpx.HTTPError:
                return
            assert answer.status_code == 200
            received.append(re.findall(r'"id":"(cmpl-\w+)"', answer.text)[0])

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for client in clients:
        client.start()
    while len(received) < 40:
        time.sleep(0.01)
    server.send_signal(signal.SIGKILL)
    for client in clients:
        client.join()
    records = {record["id"]: record for record in read(log)}
    assert len(received) >= 40 and set(received) <= records.keys()
    assert all(records[name]["status"] == 200 and records[name]["completion_tokens"] > 0 for name in received)


def test_it_finishes_what_runs_and_exits_with_0(process: tuple[str, "subprocess.Popen[str]", Path]) -> None:
    address, server, log = process
    with httpx.stream("POST", f"{address}/v1/completions", json={**BODY, "stream": True}, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-2] == "data: [DONE]" or "data: [DONE]" in rest
    assert server.wait(30) == 0
    (record,) = read(log)
    assert record["status"] == 200 and record["finish"] in ("stop", "length")


def test_a_second_signal_ends_it_at_once(process: tuple[str, "subprocess.Popen[str]", Path]) -> None:
    address, server, _ = process
    with httpx.stream(
        "POST", f"{address}/v1/completions", json={**BODY, "n": 8, "stream": True}, timeout=60
    ) as answer:
        next(answer.iter_bytes())
        server.send_signal(signal.SIGINT)
        time.sleep(0.02)
        server.send_signal(signal.SIGINT)
        assert server.wait(10) in (0, 75)  # 0 where all were done before the second came


# ---- before it listens


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["serve", *arguments]) == 2
    return capsys.readouterr().err


def test_what_is_refused(toy_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HFKIT_TOKENS", raising=False)
    toy = str(toy_models / "toy")
    assert "others reach it, and there is no token; set HFKIT_TOKENS" in refused(capsys, toy, "--host", "0.0.0.0")
    monkeypatch.setenv("HFKIT_TOKENS", "short")
    assert "16 characters at least" in refused(capsys, toy)
    monkeypatch.delenv("HFKIT_TOKENS")
    assert "cannot be read" in refused(capsys, toy, "--tokens", "gone.txt")
    assert "there is no such folder" in refused(capsys, "runs/gone")
    with monkeypatch.context() as patch:
        patch.setattr(extra, "MODULES", ("fastapi", "gone_module"))
        assert 'serve: stage: serving needs gone_module: pip install "hfkit[serve]"' in refused(capsys, toy)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"port={port}: Address already in use; set another port" in refused(capsys, toy, "--port", port)
    Path("log").mkdir()
    Path("log/requests.sqlite").write_text("this is no database, but long enough to be read as one" * 50)
    assert "requests.sqlite: is no log that can be written" in refused(
        capsys, toy, "--port", "0", "--output-dir", "log"
    )
    assert Path("log/requests.sqlite").read_text().startswith("this is no database")


def test_a_recipe_of_several_models_is_checked(toy_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    text = f"stage: serve\nmodels: {{old: {toy_models}/toy, new: {toy_models}/toy}}\nshares: {{old: 0.5, gone: 2}}\n"
    Path("serve.yaml").write_text(text)
    assert cli.main(["run", "serve.yaml"]) == 2
    shown = capsys.readouterr().err
    assert "shares: old: must name one of the models, and not the first (old, new)" in shown and "gone" in shown
    assert cli.main(["run", "serve.yaml", "shares={}", "models.new=runs/gone"]) == 2
    assert "models.new=runs/gone: runs/gone: there is no such folder" in capsys.readouterr().err
    assert cli.main(["run", "serve.yaml", "shares={}", "model=x.yaml"]) == 2


# ---- without a server


def test_chat_in_the_terminal(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\nthe dog\n/new\nthe cat\n"))
        assert cli.main(["chat", str(toy_models / "toy"), "--seed", "3", "--max-tokens", "20"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and "a chat of 256 tokens" in answers[0] and len(answers[0]) > 100
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    assert cli.main(["chat", str(toy_models / "labels")]) == 0
    assert len(re.findall(r"\d\.\d%  (red|green|blue)", capsys.readouterr().out)) == 3


def test_the_log_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hfkit.serving.store import Store

    store = Store(tmp_path, "full")
    now = time.time()
    for number in range(3):
        record = {"id": f"cmpl-{number}", "time": now - 3600 * number, "route": "/v1/completions", "status": 200}
        store.write({**record, "prompt": "line\nbreak \u2028 {", "parameters": '{"n": 1}'}).result()
    assert store.write_feedback("cmpl-1", "u", {"rating": 1}).result() == "saved"
    store.close()
    assert cli.main(["log", str(tmp_path), "--since", "90m"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert [line["id"] for line in lines] == ["cmpl-1", "cmpl-0"] and lines[0]["feedback"]["rating"] == 1
    assert lines[1]["prompt"] == "line\nbreak \u2028 {" and lines[1]["parameters"] == {"n": 1}
    assert cli.main(["log", str(tmp_path), "--since", "yesterday"]) == 2
    assert cli.main(["log", str(tmp_path / "gone")]) == 2
    shown = capsys.readouterr().err
    assert "must be a number and a unit" in shown and "there is no log" in shown


def test_what_is_too_old_leaves_the_log(tmp_path: Path) -> None:
    from hfkit.serving.store import Store

    store = Store(tmp_path, "full", retention_days=2)
    for name, days in (("old", 3), ("new", 1)):
        store.write(
            {"id": name, "time": time.time() - days * 86400, "route": "r", "status": 200, "prompt": f"{name} text"}
        )
    store.close()
    store = Store(tmp_path, "full", retention_days=2)
    store.write({"id": "now", "time": time.time(), "route": "r", "status": 200}).result()
    store.close()
    assert [record["id"] for record in read(tmp_path)] == ["new", "now"]
    os.sync()
    assert b"old text" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
