"""The memory of a training on one device, by part, and the one change that makes it fit."""

import dataclasses
from collections.abc import Callable, Iterator

import torch

from hfkit.planning.machines import FSDP2, Machine, Spread
from hfkit.planning.schedule import schedule_of
from hfkit.planning.shapes import kept_for_backward, shape_of
from hfkit.planning.work import Model, Reading, Training, Writing
from hfkit.recipe.fields import Arguments
from hfkit.training.chunked_head import chunk_tokens

Memory = dict[str, float]  # bytes by part
LORA = {"r": 16, "lora_alpha": 32}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def of_training(training: Training, spread: Spread, is_half: bool, is_cpu: bool) -> Memory:
    """What each process holds at most: in a step, or in an evaluation during the training."""
    schedule, length = schedule_of(training, spread.processes), training.lengths.longest
    shape, shares = shape_of(training.model, length), spread.processes
    is_muon = training.optimizer == "muon"
    weights = shape.weight_bytes / (shares if spread.weights else 1)
    moments = (8 * shape.trained - (4 * shape.matrices if is_muon else 0)) / (shares if spread.moments else 1)
    gradients = 4 * shape.trained / (shares if spread.gradients else 1)
    gathered = 2 * 4 * shape.largest_layer if spread.weights and shares > 1 else 0  # of this layer and the next
    halves = 2 * shape.parameters if is_half and not spread.weights else 0
    kept = kept_for_backward(
        training.model, schedule.batch, length, is_half, training.lengths.is_masked, schedule.checkpointing
    )
    device = torch.device("cpu" if is_cpu else "cuda")
    learned = schedule.batch * min(training.lengths.learned, length)
    chunk = min(chunk_tokens(shape.vocab_size, device), max(learned, 1)) if not training.model.classes else 1
    of_head = chunk * shape.vocab_size * (12 if training.teacher is None else 24)  # logits, their gradient, softmax
    of_head += 4 * shape.vocab_size * training.model.config.get_text_config().hidden_size  # the gradient of the head
    reads = [each for each in training.at_evaluations if isinstance(each, Reading)]
    of_reading = max((of_logits(each, is_half) for each in reads), default=0)
    found = {
        "weights": 0 if "weights" in spread.offloads else weights + gathered + halves,
        "gradients": 0 if "gradients" in spread.offloads else gradients,
        "optimizer": 0 if "moments" in spread.offloads else moments,
        "activations": kept,
        "logits": of_head,
    }
    if of_reading > kept + of_head:  # then that is the most
        found |= {"activations": 0, "logits": of_reading}
    if training.teacher is not None:
        teacher = shape_of(training.teacher, length)
        found["teacher"] = teacher.weight_bytes / (shares if spread.weights else 1)
        found["teacher"] += schedule.batch * length * training.teacher.config.get_text_config().hidden_size * 16
    return found


def of_logits(part: Reading | Writing, is_half: bool = False) -> float:
    """Logits of a batch that is read whole, and one row of it in float32; in half precision beside their copy."""
    vocabulary = part.model.classes or part.model.config.get_text_config().vocab_size
    if isinstance(part, Writing):
        return part.batch * vocabulary * 8
    return part.batch * part.lengths.longest * vocabulary * (6 if is_half else 4)


def of_model(part: Reading | Writing) -> Memory:
    """What a model that only reads or writes holds."""
    length = part.lengths.longest if isinstance(part, Reading) else part.prompt_tokens + part.new_tokens
    config = part.model.config.get_text_config()
    shape = shape_of(part.model, length)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cached = 2 * shape.layers * heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    beside = part.batch * length * (config.hidden_size * 16 if isinstance(part, Reading) else cached * 4)
    return {"weights": shape.weight_bytes, "activations": beside, "logits": of_logits(part)}


# ---- one change that makes it fit

Change = tuple[str, Training, Spread]


def changes(training: Training, spread: Spread, machine: Machine) -> Iterator[Change]:
    """Changes of one thing, the cheapest first, each in the words of a recipe."""
    schedule = schedule_of(training, spread.processes)
    batch, accumulation = schedule.batch, schedule.accumulation
    while batch > 1:
        batch, accumulation = (batch + 1) // 2, accumulation * 2
        told = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        words = " ".join(f"train.{key}={value}" for key, value in told.items())
        yield words, _with(training, told, batch), spread
    if not schedule.checkpointing:
        yield "train.gradient_checkpointing=true", _with(training, {"gradient_checkpointing": True}), spread
    model = training.model
    if "lora" in training.may and model.lora is None:
        yield "lora={r: 16, lora_alpha: 32}", _of(training, dataclasses.replace(model, lora=LORA)), spread
    if "quantization" in training.may and not model.method:
        adapted = dataclasses.replace(model, lora=model.lora or LORA, method="bitsandbytes", quantization=NF4)
        words = "quantization={load_in_4bit: true}" + ("" if model.lora is not None else " with lora={r: 16}")
        yield words, _of(training, adapted), spread
    if not machine.is_cpu:
        for count in (2, 4, 8, 16, 32, 64):
            if count > spread.processes or not spread.weights:
                shared = dataclasses.replace(FSDP2, processes=max(count, spread.processes))
                yield f"accelerate_configs/fsdp2.yaml with num_processes: {shared.processes}", training, shared


def first_that_fits(
    training: Training, spread: Spread, machine: Machine, total: Callable[[Training, Spread], float]
) -> str | None:
    """The first of the changes with which `total`, bytes of a device, is within the machine's memory."""
    for words, changed, over in changes(training, spread, machine):
        if total(changed, over) <= machine.memory:
            return words
    return None


def _with(training: Training, told: Arguments, batch: int | None = None) -> Training:
    reads = training.at_evaluations
    if batch is not None:
        reads = tuple(dataclasses.replace(each, batch=batch) for each in reads)
    return dataclasses.replace(training, train={**training.train, **told}, at_evaluations=reads)


def _of(training: Training, model: Model) -> Training:
    return dataclasses.replace(training, model=model)
