"""What hfkit does on one GPU, in parts that each end in minutes and are resumed.

    python benchmarks/gpu.py --out benchmarks/results/gpu      # again and again, until it says that all parts are done
    python benchmarks/gpu.py --out /tmp/toy --toy              # every part at toy size, also on a CPU

The parts stand in the order of their worth. Each runs in a process of its own and leaves `<part>.json` with the card,
the versions and its numbers, or the traceback of what failed. A part that is there is skipped (`--retry` runs failed
ones again), and one that may not fit into what is left of `--budget` is left to the next call.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # of the scripts beside this one


class Size(NamedTuple):
    """A decoder and the rows that it is trained on."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    tokens: int
    rows: int
    steps: int

    def shape(self) -> dict[str, Any]:
        """Arguments of a configuration."""
        kept = {key: value for key, value in self._asdict().items() if key not in ("tokens", "rows", "steps")}
        return {**kept, "max_position_embeddings": self.tokens, "tie_word_embeddings": True}


SIZES = {
    "124m": Size(768, 2048, 12, 12, 50304, 1024, 16, 12),
    "350m": Size(1024, 2816, 24, 16, 50304, 1024, 8, 12),
    "1.5b": Size(1536, 8960, 28, 12, 151936, 1024, 4, 12),
}
TOY = Size(64, 128, 1, 2, 128, 32, 2, 3)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """The card, its driver, and the versions of what runs on it."""
    found: dict[str, Any] = {"device": platform.processor() or "CPU", "torch": torch.__version__}
    for name in ("transformers", "accelerate", "peft", "bitsandbytes", "trl", "liger_kernel", "flash_attn"):
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory
        found |= {"device": properties.name, "memory_bytes": memory, "driver": driver, "cuda": torch.version.cuda}
    return found


# ---- the parts


def main_job(size: Size | None) -> dict[str, Any]:
    """recipes/pretrain.yaml from nothing, by the command of the README."""
    options = ["train.max_steps=2", "train.torch_compile=false"] if size else []
    with tempfile.TemporaryDirectory() as folder:
        if size:
            from tests.toy import write_world

            write_world(Path(folder))
        else:
            import shutil

            shutil.copytree(ROOT / "recipes", Path(folder) / "recipes")
        command = [sys.executable, "-m", "hfkit", "run", "recipes/pretrain.yaml", *options]
        begun = time.perf_counter()
        run(command, folder)
        metrics = json.loads((Path(folder) / "runs/pretrain/metrics.json").read_text(encoding="utf-8"))
    return {"seconds": time.perf_counter() - begun, "metrics": metrics}


def gpu_tests(size: Size | None) -> dict[str, Any]:
    """`pytest -m gpu`; at toy size they are only collected."""
    more = ["--collect-only"] if size else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "tests/test_gpu.py", *more]
    return {"output": run(command, str(ROOT))[-4000:]}


def run(command: list[str], folder: str) -> str:
    """The output of a command that must succeed."""
    import os

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def pretrain(name: str) -> Callable[[Size | None], dict[str, Any]]:
    return lambda size: pretraining(size or SIZES[name], is_toy=size is not None)


def pretraining(size: Size, is_toy: bool) -> dict[str, Any]:
    """Tokens/s, MFU and memory of training steps on random tokens: hfkit by its kinds of attention, and its peers."""
    import pretrain_speed as speed
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, Trainer

    from hfkit.model import HfkitConfig, HfkitForCausalLM
    from hfkit.planning.machines import published
    from hfkit.training import roof
    from hfkit.training.trainer import HfkitTrainer

    where = device()
    precision, measured = roof.fastest_precision(where)
    common = {"bf16": precision == "bf16", "logging_strategy": "no", "disable_tqdm": True, "report_to": "none"}
    common |= {"use_cpu": where.type == "cpu", "per_device_train_batch_size": size.rows}
    whole = speed.Rows(vocabulary=size.vocab_size, tokens=size.tokens)
    packed = speed.Rows(2, size.vocab_size, size.tokens)

    def ours(attention: str) -> Any:
        model = HfkitForCausalLM(HfkitConfig(**size.shape()))
        model.set_attn_implementation(attention)
        return model

    def stock(kind: Any, config: Any) -> Any:
        heads = {"num_key_value_heads": size.num_attention_heads}
        heads |= {"head_dim": size.hidden_size // size.num_attention_heads}
        return kind(config(**size.shape(), **heads))

    def with_hfkit(attention: str, rows: Any) -> list[float]:
        options = {**common, "torch_compile": not is_toy}
        return speed.with_trainer(HfkitTrainer, ours(attention), rows, size.steps, **options)

    contenders: dict[str, Callable[[], list[float]]] = {
        "hfkit, sdpa": lambda: with_hfkit("sdpa", whole),
        "hfkit, sdpa, documents masked": lambda: with_hfkit("sdpa", packed),
        "hfkit, flex_attention, documents masked": lambda: with_hfkit("flex_attention", packed),
        "hfkit, flash_attention_2, documents masked": lambda: with_hfkit("flash_attention_2", packed),
        "Trainer, stock Llama": lambda: speed.with_trainer(
            Trainer, stock(LlamaForCausalLM, LlamaConfig), whole, size.steps, **common
        ),
        "Trainer, stock Qwen3": lambda: speed.with_trainer(
            Trainer, stock(Qwen3ForCausalLM, Qwen3Config), whole, size.steps, **common
        ),
        "plain compiled loop, stock Llama": lambda: speed.plain_loop(
            stock(LlamaForCausalLM, LlamaConfig), size.steps, common["bf16"], where, whole, size.rows, not is_toy
        ),
    }
    if importlib.util.find_spec("flash_attn") is None:
        del contenders["hfkit, flash_attention_2, documents masked"]
    flops = roof.training_flops_per_token(ours("sdpa"), size.tokens)
    known = published(torch.cuda.get_device_name()) if where.type == "cuda" else None
    nominal = known[0] * 1e12 if known else None
    result: dict[str, Any] = {"precision": precision, "roof_flops": measured, "nominal_flops": nominal}
    for name, work in contenders.items():
        result[name] = attempted(lambda work=work: _training(work, size, flops, measured, nominal))
    return result


def _training(
    work: Callable[[], list[float]], size: Size, flops: float, measured: float, nominal: float | None
) -> dict[str, Any]:
    torch._dynamo.reset()
    forget_peak()
    times = work()
    speed = size.rows * size.tokens / statistics.median(times[2:] or times)
    return {
        "tokens_per_second": speed,  # of steps after the second
        "roof_share": speed * flops / measured,
        "mfu": speed * flops / nominal if nominal else None,
        "first_step_seconds": times[0],
        "peak_bytes": peak(),
    }


def loss_memory(size: Size | None) -> dict[str, Any]:
    """Bytes and seconds of one cross-entropy with its gradients: whole logits, hfkit's chunks, Liger's kernel."""
    from torch.nn import functional

    from hfkit.training.chunked_head import chunk_tokens, chunked_head
    from hfkit.training.trainer import _of_chunk

    tokens, hidden, vocabulary = (64, 32, 128) if size else (8192, 1536, 151936)
    where = device()
    states = torch.randn(tokens, hidden, device=where, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, hidden, device=where, dtype=torch.bfloat16) * 0.02
    targets = torch.randint(vocabulary, (tokens,), device=where)

    def whole(own: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional.linear(own, head).float(), targets, reduction="sum")

    def chunked(own: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        chunk = chunk_tokens(vocabulary, where)
        return chunked_head(own, head, None, _of_chunk, lambda rows: (targets[rows],), chunk)[0]

    ways: dict[str, Callable[..., torch.Tensor]] = {"whole logits": whole, "hfkit": chunked}
    result: dict[str, Any] = {"tokens": tokens, "hidden_size": hidden, "vocab_size": vocabulary}
    if importlib.util.find_spec("liger_kernel") is None:
        result["Liger"] = {"skipped": "liger_kernel is not installed"}
    else:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["Liger"] = lambda own, head: liger(head, own, targets)
    for name, way in ways.items():
        result[name] = attempted(lambda way=way: _loss(way, states, weight))
    return result


def _loss(way: Callable[..., torch.Tensor], states: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    for _ in range(2):  # the first one warms up
        inputs = [each.detach().clone().requires_grad_(True) for each in (states, weight)]
        before = forget_peak()
        begun = time.perf_counter()
        loss = way(*inputs)
        loss.backward()
        found = loss.item()
    return {"loss": found, "seconds": time.perf_counter() - begun, "bytes": peak() - before}


def generation(size: Size | None) -> dict[str, Any]:
    """Rows/s of hfkit's loop against `model.generate`, by the script beside this one at its own sizes."""
    import generation_speed as speed

    toy = speed.Toy()
    steps, speed.STEPS = speed.STEPS, 2 if size else speed.STEPS
    try:
        model = toy.model().to(device())
    finally:
        speed.STEPS = steps
    result = {}
    for name, kind in speed.KINDS.items():
        prompts = [toy.prompt(toy.questions[name], *kind.prompt) for _ in range(4 if size else 320)]
        runs = speed.Runs(model, toy.tokenizer, prompts, 2 if size else 16, 4 if size else kind.new_tokens)
        result[name] = speed.compare(runs, 1 if size else 3)
    return result


def quantized(size: Size | None) -> dict[str, Any]:
    """int8 and nf4 of random weights: seconds to load, bytes, and tokens/s of writing, beside bf16."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from hfkit.model.loading import load_model

    shape = (size or SIZES["1.5b"]).shape()
    kinds = {"bf16": None, "int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)

        def of_kind(options: dict[str, Any] | None) -> dict[str, Any]:
            forget_peak()
            begun = time.perf_counter()
            model: Any = load_model(folder, dtype=torch.bfloat16, quantization=options)
            model = model.to(device()) if options is None else model
            seconds, tokens = time.perf_counter() - begun, 4 if size else 64
            ids = torch.randint(shape["vocab_size"], (8, 16), device=model.device)
            config = GenerationConfig(min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
            for _ in range(2):  # the first one warms up
                start = time.perf_counter()
                model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config).cpu()
            speed = 8 * tokens / (time.perf_counter() - start)
            used = model.get_memory_footprint()
            return {"load_seconds": seconds, "bytes": used, "peak_bytes": peak(), "tokens_per_second": speed}

        for name, options in kinds.items():
            result[name] = attempted(lambda options=options: of_kind(options))
    return result


# In the order of their worth, each with the seconds that it may take on a GPU.
PARTS: dict[str, tuple[Callable[[Size | None], dict[str, Any]], int]] = {
    "main_job": (main_job, 420),
    "gpu_tests": (gpu_tests, 520),
    "pretrain_124m": (pretrain("124m"), 420),
    "pretrain_350m": (pretrain("350m"), 500),
    "loss_memory": (loss_memory, 60),
    "quantized": (quantized, 240),
    "generation": (generation, 240),
}


# ---- running them


def forget_peak() -> int:
    """Let the peak of the memory begin now; the bytes in use."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def attempted(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a piece of a part gives, or how it failed: the others go on."""
    try:
        return work()
    except Exception:
        return {"failed": traceback.format_exc()}


def record(part: str, out: Path, size: Size | None) -> None:
    """Run a part in this process and write its JSON."""
    begun = time.perf_counter()
    result = attempted(lambda: PARTS[part][0](size))
    told = {"part": part, "machine": machine(), "seconds": time.perf_counter() - begun, "result": result}
    write(out / f"{part}.json", told)


def write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are not there yet, as far as the budget goes.

    Returns:
        0 once all parts are done, 75 where a further call is needed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", type=float, default=540, help="seconds after which the call ends")
    parser.add_argument("--toy", action="store_true", help="every part at toy size")
    parser.add_argument("--retry", action="store_true", help="run parts again that failed")
    parser.add_argument("--here", action="store_true", help="in this process, without a limit of time")
    options = parser.parse_args(arguments)
    size, begun = TOY if options.toy else None, time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    waiting = [part for part in options.parts if not is_done(options.out / f"{part}.json", options.retry)]
    for number, part in enumerate(waiting):
        if options.here:
            record(part, options.out, size)
            continue
        left = options.budget - (time.perf_counter() - begun)
        if number and left < (60 if options.toy else PARTS[part][1]):
            print(f"{', '.join(waiting[number:])}: left to the next call", flush=True)
            return 75
        command = [sys.executable, __file__, "--here", "--parts", part, "--out", str(options.out)]
        try:
            subprocess.run([*command, *(["--toy"] if options.toy else []), "--retry"], timeout=left, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            write(options.out / f"{part}.json", {"part": part, "machine": machine(), "result": {"failed": str(error)}})
        print(f"{part}: {time.perf_counter() - begun:.0f} s", flush=True)
    return 0


def is_done(path: Path, is_retry: bool) -> bool:
    if not path.is_file():
        return False
    return not (is_retry and "failed" in json.dumps(json.loads(path.read_text(encoding="utf-8"))["result"]))


if __name__ == "__main__":
    raise SystemExit(main())
