"""Tokens a second, and seconds to the first token, of the server: hfkit against a plain server and transformers' own.

    python benchmarks/serve.py            # writes benchmarks/results/serve.json
    python benchmarks/serve.py --quick    # fewer rounds

Every engine serves the same model in a process of its own, with one thread, one after another, each asked by 1, 8 and
32 clients that send their next request when they have the answer. `plain` is FastAPI around `model.generate` behind a
lock, as one writes it in ten lines. `loop` is hfkit's batch without a server, with as many rows as there are clients:
what the server loses to it is its overhead. Greedy, so that all write the same. The time to the first token is that
of streams, where the engine streams; of the plain server it is that of the answer.

Then, with 8 streams, a prompt of 3/4 of the window arrives: the longest gap between two tokens of the streams, in
steps.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch

ROOT = Path(__file__).parent.parent
CLIENTS, NEW_TOKENS, PROMPT_WORDS = (1, 8, 32), 64, 24
PLAIN = """
import sys, threading, torch, uvicorn
from fastapi import FastAPI
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, port = sys.argv[1], int(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
app, lock = FastAPI(), threading.Lock()
@app.get("/health/ready")
def ready(): return {}
@app.post("/v1/completions")
def answer(body: dict):
    inputs = tokenizer(body["prompt"], return_tensors="pt", return_token_type_ids=False)
    with lock, torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=body["max_tokens"], do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    written = output.shape[1] - inputs["input_ids"].shape[1]
    return {"choices": [{"text": text}], "usage": {"completion_tokens": written}}
uvicorn.run(app, port=port, log_level="error")
"""


def write_model(folder: Path, size: str) -> None:
    """Write a stock Qwen3 of random weights, with a tokenizer, that never ends by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {word: index for index, word in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {"<pad>": len(words), "<eos>": len(words) + 1}
    words |= {f" w{number}": number for number in range(len(words), 4096)}  # so that each token is text
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    shape: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "head_dim": 64}
    if size == "default":
        shape = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384, "head_dim": 32}
    heads = shape["hidden_size"] // shape["head_dim"]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096, num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=words["<eos>"], pad_token_id=words["<pad>"], bos_token_id=None, **shape,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def prompt(number: int, words: int = PROMPT_WORDS) -> str:
    return "".join(chr(97 + (number * 7 + place) % 26) for place in range(words))


def ask(address: str, model: str, number: int, streams: bool) -> tuple[float, int]:
    """Return the seconds to the first token and the tokens of one answer."""
    body: dict[str, Any] = {"model": model, "prompt": prompt(number), "max_tokens": NEW_TOKENS, "temperature": 0}
    start = time.perf_counter()
    if not streams:
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=300).json()
        return time.perf_counter() - start, answer["usage"]["completion_tokens"]
    first, tokens = 0.0, 0
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=300) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - start
                tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", tokens)
    return first, tokens


def load(address: str, model: str, clients: int, rounds: int, streams: bool) -> dict[str, float]:
    """Let clients ask, each `rounds` times. Return tokens a second, and the 95th percentile of the first token."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(lambda number: ask(address, model, number, streams), range(clients * rounds)))
    seconds = time.perf_counter() - start
    firsts = sorted(first for first, _ in results)
    return {
        "tokens_per_second": sum(tokens for _, tokens in results) / seconds,
        "first_token_p50": statistics.median(firsts),
        "first_token_p95": firsts[max(0, int(0.95 * len(firsts)) - 1)],
    }


class Process:
    """An engine in a process of its own."""

    def __init__(self, command: list[str], port: int, ready: str):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        start = time.perf_counter()
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.address = f"http://127.0.0.1:{port}"
        while True:
            try:
                if httpx.get(f"{self.address}{ready}", timeout=1).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if self.process.poll() is not None or time.perf_counter() - start > 60:
                raise RuntimeError(f"{command[:4]} did not start")
            time.sleep(0.1)
        self.seconds = time.perf_counter() - start

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def bare(folder: Path, clients: int, rounds: int) -> float:
    """Return the tokens a second of hfkit's batch without a server."""
    from hfkit.data.tokenizer import load_tokenizer
    from hfkit.inference.decoding import Batch, Row
    from hfkit.model.loading import open_model

    torch.set_num_threads(1)
    model, tokenizer = open_model(str(folder)), load_tokenizer(str(folder), "generate")
    batch = Batch(model, lambda logits, rows: logits.argmax(-1).tolist(), clients, 512)
    for number in range(clients * rounds):
        batch.add(Row(tokenizer(prompt(number))["input_ids"], NEW_TOKENS, []))
    tokens, start = 0, time.perf_counter()
    with torch.inference_mode():
        while batch.is_busy:
            tokens += len(batch.step())
    return tokens / (time.perf_counter() - start)


def stall(address: str, model: str) -> dict[str, float]:
    """Return the longest gap between tokens of 8 streams while a long prompt is read, and the usual one, in s."""
    gaps: list[list[float]] = [[] for _ in range(8)]

    def follow(number: int) -> None:
        body = {"model": model, "prompt": prompt(number), "max_tokens": 200, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=300) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    gaps[number].append(time.perf_counter())

    streams = [threading.Thread(target=follow, args=(number,)) for number in range(8)]
    for stream in streams:
        stream.start()
    while any(len(times) < 60 for times in gaps):
        time.sleep(0.005)
    begun = time.perf_counter()
    body = {"model": model, "prompt": prompt(99, 384), "max_tokens": 1, "temperature": 0}
    httpx.post(f"{address}/v1/completions", json=body, timeout=300)
    ended = time.perf_counter()
    for stream in streams:
        stream.join()
    pairs = [(times[place], times[place + 1]) for times in gaps for place in range(20, len(times) - 1)]
    usual = statistics.median(after - before for before, after in pairs if after < begun or before > ended)
    longest = max(after - before for before, after in pairs if after > begun and before < ended)
    return {"usual_gap": usual, "longest_gap": longest, "longest_in_steps": longest / usual, "reading": ended - begun}


def measure(size: str, rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / size
        write_model(folder, size)
        script = Path(root) / "plain.py"
        script.write_text(PLAIN)
        hfkit_command = [
            sys.executable,
            "-m",
            "hfkit",
            "serve",
            str(folder),
            "--threads",
            "1",
            "--output-dir",
            f"{root}/log",
        ]
        transformers_command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder),
                                "--continuous-batching"]  # fmt: skip
        engines = {
            "plain": (lambda port: [sys.executable, str(script), str(folder), str(port)], "/health/ready", False),
            "hfkit": (lambda port: [*hfkit_command, "--port", str(port)], "/health/ready", True),
            "transformers": (lambda port: [*transformers_command, "--port", str(port)], "/health", True),
        }
        for name, (command, ready, streams) in engines.items():
            port = free_port()
            try:
                process = Process(command(port), port, ready)
            except RuntimeError as error:
                results[name] = {"error": str(error)}
                continue
            model = size if name == "hfkit" else str(folder)
            results[name] = {"ready_seconds": process.seconds}
            try:
                load(process.address, model, 2, 1, streams)
                for clients in CLIENTS:
                    several = [load(process.address, model, clients, rounds, streams) for _ in range(3)]
                    best = {key: statistics.median(one[key] for one in several) for key in several[0]}
                    results[name][str(clients)] = best
                if name == "hfkit":
                    results["stall"] = stall(process.address, model)
            except Exception as error:  # a peer that cannot is told so
                results[name]["error"] = f"{type(error).__name__}: {error}"
            process.end()
            print(size, name, json.dumps(results[name]), flush=True)
        several = {str(clients): [bare(folder, clients, rounds) for _ in range(3)] for clients in CLIENTS}
        results["loop"] = {
            clients: {"tokens_per_second": statistics.median(values)} for clients, values in several.items()
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "serve.json")
    options = parser.parse_args()
    results: dict[str, Any] = {"cpu": _cpu(), "threads": 1, "new_tokens": NEW_TOKENS}
    for size in ("default", "mid"):
        results[size] = found = measure(size, 1 if options.quick else 2)
        for clients in map(str, CLIENTS):
            ours = found["hfkit"][clients]
            line = f"{size:8} {clients:>3} clients: {ours['tokens_per_second']:7.0f} tokens/s"
            for peer in ("plain", "transformers", "loop"):
                if clients in found.get(peer, {}):
                    line += f", {ours['tokens_per_second'] / found[peer][clients]['tokens_per_second']:.2f}x {peer}"
            line += f"; first token p95 {ours['first_token_p95']:.3f} s"
            if clients in found["plain"]:
                line += f", {ours['first_token_p95'] / found['plain'][clients]['first_token_p95']:.2f} of plain's"
            print(line)
        print(f"{size:8} a long prompt: the longest gap is {found['stall']['longest_in_steps']:.1f} steps")
    options.output.write_text(json.dumps(results, indent=2) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
