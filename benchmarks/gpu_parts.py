"""What benchmarks/gpu.py measures: each part gives pieces, of a size, or of None for its own."""

import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import device, forget_peak, peak

ROOT = Path(__file__).resolve().parent.parent
Pieces = Iterator[tuple[str, Callable[[], dict[str, Any]]]]  # a name, and what measures it and gives JSON
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


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


def main_job(size: Size | None) -> Pieces:
    """recipes/pretrain.yaml from nothing, by hfkit's own command."""
    yield "recipes/pretrain.yaml", lambda: _main_job(size)


def _main_job(size: Size | None) -> dict[str, Any]:
    options = ["train.max_steps=2", "train.torch_compile=false"] if size else []
    with tempfile.TemporaryDirectory() as folder:
        if size:
            from tests.toy import write_world

            write_world(Path(folder))
        else:
            shutil.copytree(ROOT / "recipes", Path(folder) / "recipes")
        command = [sys.executable, "-m", "hfkit", "run", "recipes/pretrain.yaml", *options]
        begun = time.perf_counter()
        run(command, folder)
        seconds = time.perf_counter() - begun
        metrics = json.loads((Path(folder) / "runs/pretrain/metrics.json").read_text(encoding="utf-8"))
    return {"command_seconds": seconds, "metrics": metrics}


def gpu_tests(size: Size | None) -> Pieces:
    """`pytest -m gpu`, file by file; at toy size the tests are only collected."""
    files = [path for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text("utf-8")]
    groups = [files] if size else [[path] for path in sorted(files)]
    for group in groups:
        more = ["--collect-only"] if size else ["-vv", "--durations=0"]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", *map(str, group), *more]
        yield (
            "collected" if size else group[0].name,
            lambda command=command: {"output": run(command, str(ROOT))[-6000:]},
        )


def run(command: list[str], folder: str) -> str:
    """The output of a command that must succeed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


# ---- training


class Ground(NamedTuple):
    """What trainings of a size share.

    Args:
        options: of TrainingArguments.
        flops: training FLOPs a token.
    """

    size: Size
    options: dict[str, Any]
    is_compiled: bool
    roof: float
    flops: float

    @classmethod
    def of(cls, size: Size, is_toy: bool, model: Any) -> "Ground":
        from hfkit.model.flops import training_flops_per_token
        from hfkit.runtime.devices import fastest_precision

        precision, roof = fastest_precision(device())
        options = {"bf16": precision == "bf16", "logging_strategy": "no", "disable_tqdm": True, "report_to": "none"}
        options |= {"use_cpu": device().type == "cpu", "per_device_train_batch_size": size.rows, "save_strategy": "no"}
        return cls(size, options, not is_toy, roof, training_flops_per_token(model, size.tokens))

    def measured(self, work: Callable[[], list[float]]) -> dict[str, Any]:
        """Of a training that gives the seconds of its steps."""
        from hfkit.planning.machines import published

        torch._dynamo.reset()
        forget_peak()
        times = work()
        speed = self.size.rows * self.size.tokens / statistics.median(times[2:] or times)
        known = published(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        return {
            "tokens_per_second": speed,  # of steps after the second
            "mfu": speed * self.flops / self.roof,
            "mfu_of_published_peak": speed * self.flops / (known[0] * 1e12) if known else None,
            "first_step_seconds": times[0],
            "peak_bytes": peak(),
            "bf16": self.options["bf16"],
        }


def pretrain(name: str) -> Callable[[Size | None], Pieces]:
    return lambda size: pretraining(size or SIZES[name], is_toy=size is not None)


def pretraining(size: Size, is_toy: bool) -> Pieces:
    """Training steps on random tokens: hfkit by its kinds of attention, and its peers."""
    import pretrain_speed as speed
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, Trainer

    from hfkit.model import HfkitConfig, HfkitForCausalLM
    from hfkit.training.trainer import HfkitTrainer

    whole = speed.Rows(vocabulary=size.vocab_size, tokens=size.tokens)
    packed = speed.Rows(2, size.vocab_size, size.tokens)
    heads = {"num_key_value_heads": size.num_attention_heads}
    heads |= {"head_dim": size.hidden_size // size.num_attention_heads}

    def ours() -> Any:
        with device():
            return HfkitForCausalLM(HfkitConfig(**size.shape()))

    def stock(kind: Any, config: Any) -> Any:
        with device():
            return kind(config(**size.shape(), **heads))

    ground = Ground.of(size, is_toy, ours())

    def hfkit(attention: str, rows: Any) -> list[float]:
        model, options = ours(), {**ground.options, "torch_compile": ground.is_compiled}
        model.set_attn_implementation(attention)
        return speed.with_trainer(HfkitTrainer, model, rows, size.steps, **options)

    def trainer(kind: Any, config: Any) -> list[float]:
        return speed.with_trainer(Trainer, stock(kind, config), whole, size.steps, **ground.options)

    def loop() -> list[float]:
        model, is_half = stock(LlamaForCausalLM, LlamaConfig), ground.options["bf16"]
        return speed.plain_loop(model, size.steps, is_half, device(), whole, size.rows, ground.is_compiled)

    no_flex = None if torch.cuda.is_available() else "flex_attention has no gradients on a CPU"
    contenders: dict[str, tuple[Callable[[], list[float]], str | None]] = {
        "hfkit, sdpa": (lambda: hfkit("sdpa", whole), None),
        "hfkit, sdpa, documents masked": (lambda: hfkit("sdpa", packed), None),
        "hfkit, flex_attention, documents masked": (lambda: hfkit("flex_attention", packed), no_flex),
        "plain compiled loop, stock Llama": (loop, None),
        "Trainer, stock Llama": (lambda: trainer(LlamaForCausalLM, LlamaConfig), None),
        "Trainer, stock Qwen3": (lambda: trainer(Qwen3ForCausalLM, Qwen3Config), None),
        "hfkit, flash_attention_2, documents masked": (
            lambda: hfkit("flash_attention_2", packed),
            missing("flash_attn"),
        ),
    }
    for name, (work, reason) in contenders.items():
        yield name, unless(reason, functools.partial(ground.measured, work))


def adapters(quantization: dict[str, Any] | None) -> Callable[[Size | None], Pieces]:
    return lambda size: adapting(size or SIZES["1.5b"], quantization, is_toy=size is not None)


def adapting(size: Size, quantization: dict[str, Any] | None, is_toy: bool) -> Pieces:
    """LoRA on a stock Llama with random weights, whole or quantized: as PEFT and Trainer do it by their defaults, and
    as hfkit's finetune stage does, which loads whole weights in float32."""
    import peft
    import pretrain_speed as speed
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer

    from hfkit.model.adapters import adapt
    from hfkit.model.loading import load_model
    from hfkit.training.trainer import HfkitTrainer

    rows = speed.Rows(vocabulary=size.vocab_size, tokens=size.tokens)

    def hfkit(dtype: torch.dtype = torch.float32, is_compiled: bool = not is_toy) -> list[float]:
        model = adapt(load_model(folder, dtype=dtype, quantization=quantization), LORA, False, bool(quantization))
        options = {**ground.options, "torch_compile": is_compiled}
        return speed.with_trainer(HfkitTrainer, model, rows, size.steps, **options)

    def trainer() -> list[float]:
        base: Any
        if quantization:
            config = BitsAndBytesConfig(**quantization, bnb_4bit_compute_dtype=torch.bfloat16)
            base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
            base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        else:
            base = AutoModelForCausalLM.from_pretrained(folder)
        model: Any = peft.get_peft_model(base, peft.LoraConfig(**LORA))
        return speed.with_trainer(Trainer, model, rows, size.steps, **ground.options)

    with tempfile.TemporaryDirectory() as folder:
        with device():
            made = LlamaForCausalLM(LlamaConfig(**size.shape())).to(torch.bfloat16)
        made.save_pretrained(folder)
        ground = Ground.of(size, is_toy, made.requires_grad_(False))
        del made
        yield "PEFT, Trainer", lambda: ground.measured(trainer)
        yield "hfkit", lambda: ground.measured(hfkit)
        if quantization:
            yield "hfkit, not compiled", lambda: ground.measured(lambda: hfkit(is_compiled=False))
        else:
            yield "hfkit, base in bfloat16", lambda: ground.measured(lambda: hfkit(torch.bfloat16))


def distillation(size: Size | None) -> Pieces:
    """A student with its teacher beside it, from targets on disk, and alone; trl, and a loop written by hand."""
    import distill_speed as speed

    own, teacher = (size, size) if size else (SIZES["124m"], SIZES["350m"])
    student = own.shape()
    ground = Ground.of(own, size is not None, speed.model(student, speed.Sizes(own.vocab_size, own.tokens)))
    sizes = speed.Sizes(own.vocab_size, own.tokens, own.rows, teacher=teacher.shape(), student=student)
    if size is not None:
        sizes = sizes._replace(kept_rows=4 * own.rows, warm_up=1)
    options = ground.options | ({} if ground.is_compiled else {"torch_compile": False})

    def measured(way: Callable[[], float]) -> dict[str, Any]:
        torch._dynamo.reset()
        forget_peak()
        return {"tokens_per_second": own.rows * own.tokens / way(), "peak_bytes": peak()}

    with tempfile.TemporaryDirectory() as folder:
        for label, way in speed.contenders(sizes, options, own.steps, Path(folder)).items():
            yield label, unless(missing("trl") if "trl" in label else None, functools.partial(measured, way))


# ---- the loss, decoding


def loss_memory(size: Size | None) -> Pieces:
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
        return chunked_head(own, head, None, _of_chunk, lambda rows: (targets[rows],), chunk, size is None)[0]

    def liger(own: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        # Gradients of the head are added up in float32, as hfkit's are.
        return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(head, own, targets)

    reason = missing("liger_kernel") if torch.cuda.is_available() else "Liger's kernels need a GPU"
    for name, way in {"whole logits": whole, "hfkit": chunked, "Liger": liger}.items():
        yield name, unless(reason if name == "Liger" else None, functools.partial(_loss, way, states, weight))


def _loss(way: Callable[..., torch.Tensor], states: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    inputs = [each.detach().clone().requires_grad_(True) for each in (states, weight)]

    def once() -> float:
        for each in inputs:
            each.grad = None
        loss = way(*inputs)
        loss.backward()
        return loss.item()

    seconds = []
    for _ in range(4):  # the first one compiles
        begun = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - begun)
    for each in inputs:
        each.grad = None
    before = forget_peak()
    return {"loss": once(), "seconds_a_loss": min(seconds[1:]), "bytes": peak() - before}


def quantized(size: Size | None) -> Pieces:
    """int8 and nf4 of random weights: seconds to load, bytes, and tokens/s of writing, beside bf16."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from hfkit.model.loading import load_model

    shape, tokens = (size or SIZES["1.5b"]).shape(), 4 if size else 64

    def measured(options: dict[str, Any] | None) -> dict[str, Any]:
        forget_peak()
        begun = time.perf_counter()
        model: Any = load_model(folder, dtype=torch.bfloat16, quantization=options)
        model = model.to(device()) if options is None else model
        seconds = time.perf_counter() - begun
        ids = torch.randint(shape["vocab_size"], (8, 16), device=model.device)
        config = GenerationConfig(min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config).cpu()
        speed, used = 8 * tokens / (time.perf_counter() - start), model.get_memory_footprint()
        return {"load_seconds": seconds, "bytes": used, "peak_bytes": peak(), "tokens_per_second": speed}

    with tempfile.TemporaryDirectory() as folder:
        with device():
            LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
        for name, options in {"bf16": None, "int8": {"load_in_8bit": True}, "nf4": NF4}.items():
            yield name, functools.partial(measured, options)


def generation(size: Size | None) -> Pieces:
    """Rows/s of hfkit's loop against `model.generate`, by the script beside this one at its own sizes."""
    import generation_speed as speed

    toy = speed.Toy()
    model = (toy.model(2) if size else toy.model()).to(device())

    def measured(name: str) -> dict[str, Any]:
        kind = speed.KINDS[name]
        prompts = [toy.prompt(toy.questions[name], *kind.prompt) for _ in range(4 if size else 320)]
        runs = speed.Runs(model, toy.tokenizer, prompts, 2 if size else 16, 4 if size else kind.new_tokens)
        return speed.compare(runs, 1 if size else 3)

    for name in speed.KINDS:
        yield name, functools.partial(measured, name)


# ---- what they share


def missing(package: str) -> str | None:
    """Why what needs a package is left out."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def unless(reason: str | None, work: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    return work if reason is None else lambda: {"skipped": reason}


def attempted(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a piece gives, or how it failed: the others go on."""
    try:
        return work()
    except Exception:
        return {"failed": traceback.format_exc()}
