"""What benchmarks/gpu.py measures: each part is a function of a size, or of None for its own, and gives JSON."""

import contextlib
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


def main_job(size: Size | None) -> dict[str, Any]:
    """recipes/pretrain.yaml from nothing, by the command of the README."""
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
        metrics = json.loads((Path(folder) / "runs/pretrain/metrics.json").read_text(encoding="utf-8"))
    return {"seconds": time.perf_counter() - begun, "metrics": metrics}


def gpu_tests(size: Size | None) -> dict[str, Any]:
    """`pytest -m gpu`; at toy size they are only collected."""
    more = ["--collect-only"] if size else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "tests/test_gpu.py", *more]
    return {"output": run(command, str(ROOT))[-4000:]}


def run(command: list[str], folder: str) -> str:
    """The output of a command that must succeed."""
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
    from hfkit.model.flops import training_flops_per_token
    from hfkit.planning.machines import published
    from hfkit.runtime import devices
    from hfkit.training.trainer import HfkitTrainer

    where = device()
    precision, measured = devices.fastest_precision(where)
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
    flops = training_flops_per_token(ours("sdpa"), size.tokens)
    known = published(torch.cuda.get_device_name()) if where.type == "cuda" else None
    nominal = known[0] * 1e12 if known else None
    result: dict[str, Any] = {"precision": precision, "roof_flops": measured, "nominal_flops": nominal}
    for name, work in contenders.items():
        if "flash" in name and importlib.util.find_spec("flash_attn") is None:
            result[name] = {"skipped": "flash_attn is not installed"}
        else:
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
        "mfu": speed * flops / measured,
        "mfu_of_published_peak": speed * flops / nominal if nominal else None,
        "first_step_seconds": times[0],
        "peak_bytes": peak(),
    }


def adapters(kind: str | None) -> Callable[[Size | None], dict[str, Any]]:
    return lambda size: adapting(size or SIZES["1.5b"], kind, is_toy=size is not None)


def adapting(size: Size, kind: str | None, is_toy: bool) -> dict[str, Any]:
    """LoRA on a stock Llama with random weights, in bf16 or nf4 (QLoRA): hfkit, and PEFT with Trainer's defaults."""
    import peft
    import pretrain_speed as speed
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer

    from hfkit.model.adapters import adapt
    from hfkit.model.flops import training_flops_per_token
    from hfkit.model.loading import load_model
    from hfkit.runtime import devices
    from hfkit.training.trainer import HfkitTrainer

    where, rows = device(), speed.Rows(vocabulary=size.vocab_size, tokens=size.tokens)
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    precision, measured = devices.fastest_precision(where)
    common = {"bf16": precision == "bf16", "logging_strategy": "no", "disable_tqdm": True, "report_to": "none"}
    common |= {"use_cpu": where.type == "cpu", "per_device_train_batch_size": size.rows}
    dtype = torch.bfloat16 if kind else torch.float32  # as each of them loads a base that it trains on

    def ours() -> list[float]:
        base = load_model(folder, dtype=dtype, quantization=quantization if kind else None)
        model = adapt(base, lora, "generate", is_quantized=kind is not None)
        compiled = {"torch_compile": not is_toy and kind is None}  # bitsandbytes breaks the graph at each matrix
        return speed.with_trainer(HfkitTrainer, model, rows, size.steps, **common, **compiled)

    def theirs() -> list[float]:
        options = {"quantization_config": BitsAndBytesConfig(**quantization)} if kind else {}
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        if kind:
            base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        model = peft.get_peft_model(base, peft.LoraConfig(**lora))
        return speed.with_trainer(Trainer, model, rows, size.steps, **common)

    result: dict[str, Any] = {"base": kind or str(dtype), "lora": lora, "precision": precision}
    with tempfile.TemporaryDirectory() as folder:
        made = LlamaForCausalLM(LlamaConfig(**size.shape())).to(torch.bfloat16)
        made.save_pretrained(folder)
        # Forward and backward to the inputs; the gradients of the base's weights are not made.
        flops = training_flops_per_token(made, size.tokens) * 2 / 3
        del made
        for name, work in {"PEFT, Trainer": theirs, "hfkit": ours}.items():
            result[name] = attempted(lambda work=work: _training(work, size, flops, measured, None))
    return result


def distillation(size: Size | None) -> dict[str, Any]:
    """Tokens/s of a student: trl's GKD trainer, hfkit with its teacher beside it, from targets on disk, and alone."""
    import distill_speed as speed
    from transformers import LlamaConfig, LlamaForCausalLM

    from hfkit.runtime import devices

    teacher_size, own = (size, size) if size else (SIZES["350m"], SIZES["124m"])
    where = device()
    precision = devices.fastest_precision(where)[0]
    options = {"per_device_train_batch_size": own.rows, "bf16": precision == "bf16", "save_strategy": "no"}
    options |= {"use_cpu": where.type == "cpu", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    options |= {} if size is None else {"torch_compile": False}
    shapes = [{**each.shape(), "vocab_size": own.vocab_size} for each in (teacher_size, own)]
    warm_up = 1 if size else speed.WARM_UP
    sizes = {"VOCABULARY": own.vocab_size, "TOKENS": own.tokens, "ROWS": own.rows, "WARM_UP": warm_up}
    sizes |= {"KEPT_ROWS": own.rows * 4 if size else speed.KEPT_ROWS}
    sizes |= {"model": lambda shape: LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0, eos_token_id=1))}
    sizes |= {"STUDENT": shapes[1]}
    result: dict[str, Any] = {"precision": precision}
    with changed(speed, sizes), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = speed.model(shapes[0]).to(where)
        ways: dict[str, Callable[[], float]] = {
            "trl GKD": lambda: speed.with_trl(teacher, options, own.steps, str(folder / "trl")),
            "hfkit, cross-entropy alone": lambda: speed.with_hfkit("alone", teacher, options, own.steps, folder),
            "hfkit, online": lambda: speed.with_hfkit("online", teacher, options, own.steps, folder),
            "hfkit, cached": lambda: speed.with_hfkit("cached", teacher, options, own.steps, folder),
        }
        for label, way in ways.items():
            if "trl" in label and importlib.util.find_spec("trl") is None:
                result[label] = {"skipped": "trl is not installed"}
            else:
                result[label] = attempted(lambda way=way: _distilling(way, own))
    return result


def _distilling(way: Callable[[], float], size: Size) -> dict[str, Any]:
    torch._dynamo.reset()
    forget_peak()
    seconds = way()
    return {"tokens_per_second": size.rows * size.tokens / seconds, "peak_bytes": peak()}


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
    with changed(speed, {"STEPS": 2 if size else speed.STEPS}):
        model = toy.model().to(device())
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


# ---- what they share


@contextlib.contextmanager
def changed(module: Any, values: dict[str, Any]) -> Iterator[None]:
    """The constants of a script, other ones for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


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
