"""A server under load for minutes: are records lost, slots stuck, does memory grow?

    python benchmarks/serve_load.py                    # 30 minutes, 64 clients; benchmarks/results/serve_load.json
    python benchmarks/serve_load.py --seconds 20 --clients 16

The clients ask, stream, go away in the middle, read slowly, and send bodies that are wrong. Every answer that a client
received to its end must be in the log, no slot may be in use at the end, and memory after the first fifth of the time
and at the end is compared.
"""

import argparse
import json
import random
import re
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serve import ROOT, Process, free_port, prompt, write_model
from hfkit.serving.store import read

BAD = [b"{", b"[]", b'{"model": "default"}', b'{"model": "default", "prompt": 5}', b'{"model": "gone", "prompt": "x"}',
       b'{"model": "default", "prompt": "x", "n": 999}', b"\xff" * 100]  # fmt: skip


class Client(threading.Thread):
    """One that asks until the time is over."""

    def __init__(self, address: str, number: int, end: float):
        super().__init__()
        self.address, self.chance, self.end = f"{address}/v1/completions", random.Random(number), end
        self.counts: Counter[str] = Counter()
        self.received: list[str] = []

    def run(self) -> None:
        with httpx.Client(timeout=120) as http:
            while time.monotonic() < self.end:
                what = self.chance.choices(("whole", "stream", "leave", "slow", "bad"), (4, 4, 2, 1, 2))[0]
                self.counts[what] += 1
                try:
                    getattr(self, what)(http)
                except httpx.HTTPError as error:
                    self.counts[type(error).__name__] += 1

    def body(self, **options: Any) -> dict[str, Any]:
        words, tokens = self.chance.randint(1, 300), self.chance.randint(1, 100)
        return {
            "model": "default",
            "prompt": prompt(self.chance.randint(0, 9), words),
            "max_tokens": tokens,
            **options,
        }

    def keep(self, answer: httpx.Response, text: str) -> None:
        self.counts[str(answer.status_code)] += 1
        if answer.status_code == 200:
            self.received.append(re.findall(r'"id":"(cmpl-\w+)"', text)[0])

    def whole(self, http: httpx.Client) -> None:
        answer = http.post(self.address, json=self.body())
        self.keep(answer, answer.text)

    def stream(self, http: httpx.Client, pause: float = 0.0) -> None:
        with http.stream("POST", self.address, json=self.body(stream=True)) as answer:
            text = ""
            for part in answer.iter_text():
                text += part
                time.sleep(pause)
            if answer.status_code != 200 or "data: [DONE]" in text:
                self.keep(answer, text)

    def slow(self, http: httpx.Client) -> None:
        self.stream(http, 0.05)

    def leave(self, http: httpx.Client) -> None:
        with http.stream("POST", self.address, json=self.body(stream=True, max_tokens=200)) as answer:
            next(answer.iter_bytes(), None)

    def bad(self, http: httpx.Client) -> None:
        headers = {"Content-Type": "application/json"}
        answer = http.post(self.address, content=self.chance.choice(BAD), headers=headers)
        self.counts[str(answer.status_code)] += 1


def metric(address: str, name: str) -> float:
    return float(re.findall(rf"^{name} (\S+)$", httpx.get(f"{address}/metrics").text, re.M)[0])


def measure(seconds: float, clients: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "default"
        write_model(folder, "default")
        port = free_port()
        command = ["hfkit", "serve", str(folder), "--threads", "1", "--port", str(port), "--output-dir", f"{root}/log"]
        process = Process(command, port, "/health/ready")
        threads = [Client(process.address, number, time.monotonic() + seconds) for number in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 5)
        before = metric(process.address, "hfkit_memory_bytes")
        for thread in threads:
            thread.join()
        time.sleep(2)
        results: dict[str, Any] = {
            "seconds": seconds,
            "clients": clients,
            "memory_growth": metric(process.address, "hfkit_memory_bytes") / before - 1,
            "slots_in_use": metric(process.address, "hfkit_slots_in_use"),
            "waiting": metric(process.address, "hfkit_requests_waiting"),
            "log_lost": metric(process.address, "hfkit_log_lost_records"),
            "counts": dict(sum((thread.counts for thread in threads), Counter())),
        }
        process.end()
        logged = {record["id"] for record in read(Path(root) / "log") if record["status"] == 200}
        received = [name for thread in threads for name in thread.received]
        results |= {"received": len(received), "received_and_not_logged": len(set(received) - logged)}
        results["exit_code"] = process.process.returncode
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "serve_load.json")
    options = parser.parse_args()
    results = measure(options.seconds, options.clients)
    print(json.dumps(results, indent=2))
    options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
