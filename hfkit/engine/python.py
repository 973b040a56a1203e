"""What the recipes do, from Python: a function for each stage, with the classes as arguments that the sections name.

    from hfkit import prepare, pretrain, train_tokenizer

    data = prepare("runs/data", sources=[{"builtin": "python-stdlib"}])
    tokenizer = train_tokenizer("runs/tokenizer", data, vocab_size=4096)
    model = pretrain("runs/model", data, tokenizer, HfkitConfig(hidden_size=128), TrainingArguments(max_steps=100))
    print(model.metrics["bits_per_byte"], model.folder)

A call is a recipe without its file: checked as a whole before anything runs, up to date where it was run before,
resumed where it was interrupted, and written whole or not at all. Its arguments stand in the folder's `hfkit.json`.
"""

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkit.engine import runner
from hfkit.errors import HfkitError
from hfkit.recipe.yaml_source import Source

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, TrainingArguments

Section = Mapping[str, Any]
OWN = ("output_dir", "runtime_config")  # of sections: what hfkit sets, or what is not of the recipe


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished folder.

    Attributes:
        folder: where it lies; it is an input of other calls, of recipes, and of `from_pretrained`.
        metrics: its numbers, as `metrics.json` has them.
    """

    folder: Path
    metrics: dict[str, Any] = dataclasses.field(repr=False)

    def __fspath__(self) -> str:
        return str(self.folder)


Place = Result | str | Path


def prepare(output_dir: str | Path, sources: Sequence[Section], *, rebuild: bool = False, **keys: Any) -> Result:
    """Clean, deduplicate and split text or rows of several columns.

    Args:
        output_dir: folder of the three Parquet files.
        sources: where rows come from, each a mapping with `files` (a file, a folder or a glob), `hub` (an id) or
            `builtin` (python-stdlib, python-functions, python-packages), and what its columns are called there.
        rebuild: move an old result that was made otherwise aside, and make it again.
        keys: the further keys of a recipe of `stage: prepare`, such as `columns`, `split` (shares), `deduplicate`.

    Returns:
        The data set; `metrics` has rows and bytes of each split, and what was dropped.

    Raises:
        HfkitError: for a key, a value or a source that is wrong, before anything is written.

    Example:
        >>> data = prepare("runs/data", [{"files": "texts.txt", "document": "line"}])
        >>> data.metrics["splits"]["train"]["rows"] > 100
        True
    """
    return _run("prepare", output_dir, rebuild, {"sources": sources}, keys)


def train_tokenizer(output_dir: str | Path, data: Place, *, rebuild: bool = False, **keys: Any) -> Result:
    """Train a tokenizer on the training split of a data set.

    Args:
        output_dir: folder of the tokenizer, as `AutoTokenizer` opens it.
        data: a result of `prepare`, a folder, a data file or an id on the Hub.
        rebuild: as in `prepare`.
        keys: the further keys of `stage: tokenizer`: `algorithm`, `vocab_size` (special tokens included) ...

    Returns:
        The tokenizer; `metrics` has `bytes_per_token` and `exact_round_trip` (0 to 1) of held-out text.

    Raises:
        HfkitError: as in `prepare`.

    Example:
        >>> tokenizer = train_tokenizer("runs/tokenizer", "runs/data", vocab_size=320)
        >>> tokenizer.metrics["vocab_size"]
        320
    """
    return _run("tokenizer", output_dir, rebuild, {"data": data}, keys)


def pretrain(
    output_dir: str | Path,
    data: Place,
    tokenizer: Place,
    model: "PretrainedConfig | Section",
    train: "TrainingArguments | Section",
    *,
    rebuild: bool = False,
    **keys: Any,
) -> Result:
    """Pretrain a decoder from scratch.

    Args:
        output_dir: folder of the model, with its code, its tokenizer and its checkpoints meanwhile.
        data: as in `train_tokenizer`; documents of its column `text`.
        tokenizer: a result of `train_tokenizer`, a folder, or an id on the Hub.
        model: a `HfkitConfig`, or its arguments.
        train: `transformers.TrainingArguments`, or its arguments; learning rates are those of the optimizer.
        rebuild: as in `prepare`.
        keys: the further keys of `stage: pretrain`: `sequence_length` (tokens), `packing`, `optimizer` ...

    Returns:
        The model; `metrics` has `loss` (nats a token), `perplexity` and `bits_per_byte` of the test split.

    Raises:
        HfkitError: as in `prepare`.

    Example:
        >>> from hfkit import HfkitConfig
        >>> config = HfkitConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> train = {"max_steps": 2, "per_device_train_batch_size": 4, "torch_compile": False}
        >>> model = pretrain("runs/model", "runs/data", "runs/tokenizer", config, train, sequence_length=32)
        >>> model.metrics["steps"]
        2
    """
    inputs = {"data": data, "tokenizer": tokenizer, "model": model, "train": train}
    return _run("pretrain", output_dir, rebuild, inputs, keys)


def finetune(
    output_dir: str | Path,
    model: Place,
    data: Place,
    task: str,
    train: "TrainingArguments | Section",
    *,
    rebuild: bool = False,
    **keys: Any,
) -> Result:
    """Fine-tune a model for a task: all of its weights, or an adapter on it.

    Args:
        output_dir: folder of the model or the adapter.
        model: a result, a folder, or an id on the Hub.
        data: as in `train_tokenizer`, with the columns of the task.
        task: generate, chat or classify.
        train: as in `pretrain`.
        rebuild: as in `prepare`.
        keys: the further keys of `stage: finetune`: `prompt`, `completion`, `label`, `sequence_length` (tokens),
            `lora` (a `peft.LoraConfig` or its arguments), `quantization` (a `BitsAndBytesConfig`), `accept` ...

    Returns:
        The model; `metrics` has the loss on completions and the scores of the task on the test split.

    Raises:
        HfkitError: as in `prepare`; also where a limit of `accept` is missed, and the folder is kept.

    Example:
        >>> keys = {"prompt": "{text}", "completion": "{text}", "sequence_length": 32, "lora": {"r": 2}}
        >>> train = {"max_steps": 1, "per_device_train_batch_size": 2, "torch_compile": False}
        >>> adapter = finetune("runs/adapter", "runs/model", "runs/data", "generate", train, **keys)
        >>> adapter.metrics["loss"] > 0
        True
    """
    return _run("finetune", output_dir, rebuild, {"model": model, "data": data, "task": task, "train": train}, keys)


def distill(
    output_dir: str | Path,
    teacher: Place,
    student: "PretrainedConfig | Section | Result | str | Path",
    data: Place,
    train: "TrainingArguments | Section",
    *,
    rebuild: bool = False,
    **keys: Any,
) -> Result:
    """Train a smaller model to say what a larger one says.

    Args:
        output_dir: folder of the student.
        teacher: a causal model: a result, a folder, or an id on the Hub.
        student: a `HfkitConfig` or its arguments, `{"from_teacher": {"layers": [0, 2]}}`, or a model.
        data: as in `train_tokenizer`.
        train: as in `pretrain`.
        rebuild: as in `prepare`.
        keys: the further keys of `stage: distill`: `losses`, `targets`, `sequence_length` (tokens), `baseline` ...

    Returns:
        The student; `metrics` has its scores, those of the teacher, and of the same student without a teacher.

    Raises:
        HfkitError: as in `prepare`.

    Example:
        >>> student = {"from_teacher": {"layers": [0]}}
        >>> train = {"max_steps": 1, "per_device_train_batch_size": 2, "torch_compile": False}
        >>> small = distill("runs/small", "runs/model", student, "runs/data", train, sequence_length=32)
        >>> small.metrics["teacher_bits_per_byte"] > 0
        True
    """
    inputs = {"teacher": teacher, "student": student, "data": data, "train": train}
    return _run("distill", output_dir, rebuild, inputs, keys)


def quantize(
    output_dir: str | Path,
    model: Place,
    data: Place,
    quantization: "BitsAndBytesConfig | Section",
    *,
    rebuild: bool = False,
    **keys: Any,
) -> Result:
    """Quantize a model's weights, and measure what that cost on data.

    Args:
        output_dir: folder of the quantized model.
        model: a result, a folder, or an id on the Hub; an adapter is merged into its base first.
        data: what the model is scored on before and after.
        quantization: a `BitsAndBytesConfig` or its arguments, or those of another `method`.
        rebuild: as in `prepare`.
        keys: the further keys of `stage: quantize`: `method`, `calibration`, `task`, `metrics`, `accept` ...

    Returns:
        The model; `metrics` has its scores, sizes (bytes) and speeds (tokens/s), and as `base_*` those before.

    Raises:
        HfkitError: as in `finetune`.

    Example:
        >>> small = quantize("runs/int8", "runs/model", "runs/data", {"load_in_8bit": True})
        >>> small.metrics["size_bytes"] < small.metrics["base_size_bytes"]
        True
    """
    return _run("quantize", output_dir, rebuild, {"model": model, "data": data, "quantization": quantization}, keys)


def prune(
    output_dir: str | Path,
    model: Place,
    data: Place,
    pruning: Section,
    *,
    rebuild: bool = False,
    **keys: Any,
) -> Result:
    """Prune a model's weights, layers or width, let it recover, and measure what that cost on data.

    Args:
        output_dir: folder of the pruned model.
        model: as in `quantize`.
        data: what the model is scored on before and after, and learns from.
        pruning: what goes, such as `{"method": "depth", "drop_layers": 1}`.
        rebuild: as in `prepare`.
        keys: the further keys of `stage: prune`: `calibration`, `recover`, `train`, `accept` ...

    Returns:
        As `quantize`.

    Raises:
        HfkitError: as in `finetune`.

    Example:
        >>> sparse = prune("runs/sparse", "runs/model", "runs/data", {"method": "magnitude", "sparsity": 0.5})
        >>> round(sparse.metrics["zeros"], 1)
        0.5
    """
    return _run("prune", output_dir, rebuild, {"model": model, "data": data, "pruning": pruning}, keys)


def evaluate(output_dir: str | Path, model: Place, data: Place, *, rebuild: bool = False, **keys: Any) -> Result:
    """Score a model on a split of a data set.

    Args:
        output_dir: folder of the scores and of each row's answer.
        model: a result, a folder, or an id on the Hub.
        data: as in `train_tokenizer`.
        rebuild: as in `prepare`.
        keys: the further keys of `stage: evaluate`: `task`, `metrics`, `split`, `against`, `generation` ...

    Returns:
        The evaluation; `metrics` has each score with `_low` and `_high`, its 95 % interval.

    Raises:
        HfkitError: as in `prepare`.

    Example:
        >>> scores = evaluate("runs/scores", "runs/model", "runs/data", task="text", metrics=["bits_per_byte"])
        >>> scores.metrics["bits_per_byte_low"] < scores.metrics["bits_per_byte"]
        True
    """
    return _run("evaluate", output_dir, rebuild, {"model": model, "data": data}, keys)


def compare(
    output_dir: str | Path,
    models: Sequence[Place],
    data: Place,
    *,
    rebuild: bool = False,
    **keys: Any,
) -> Result:
    """Measure models side by side on the same rows: quality, size, memory and speed.

    Args:
        output_dir: folder of the report.
        models: two or more; the first is what the others are compared with.
        data: as in `train_tokenizer`.
        rebuild: as in `prepare`.
        keys: the further keys of `stage: compare`: `task`, `metrics`, `split`, `prompts`, `accept` ...

    Returns:
        The comparison; `metrics["models"]` has a row for each.

    Raises:
        HfkitError: as in `finetune`.

    Example:
        >>> found = compare("runs/both", ["runs/model", "runs/int8"], "runs/data", task="text")
        >>> sorted(found.metrics["models"])
        ['int8', 'model']
    """
    return _run("compare", output_dir, rebuild, {"models": list(models), "data": data}, keys)


def generate(model: Place, prompts: Sequence[str], *, trust_remote_code: bool = False, **generation: Any) -> list[str]:
    """What a model writes after prompts, in their order.

    Args:
        model: a result, a folder, or an id on the Hub; with an adapter or quantized, too.
        prompts: texts.
        trust_remote_code: run the code that comes with the model.
        generation: arguments of `GenerationConfig`, such as `max_new_tokens`. Greedy without `do_sample`.

    Raises:
        HfkitError: if the model cannot be opened, or there is a prompt without a token.

    Example:
        >>> len(generate("runs/model", ["the cat", "a dog"], max_new_tokens=4))
        2
    """
    import torch

    from hfkit.data.tokenizer import load_tokenizer
    from hfkit.inference.generation import generate as generate_texts
    from hfkit.model.loading import base_quantization, load_model

    place = _plain(model)
    opened: Any = load_model(place, quantization=base_quantization(place), trust_remote_code=trust_remote_code)
    if getattr(opened.config, "quantization_config", None) is None:
        opened.to(torch.accelerator.current_accelerator() or "cpu")
    tokenizer: Any = load_tokenizer(place, "generate")
    ids = [tokenizer(text)["input_ids"] for text in prompts]
    ids = [row[:-1] if len(row) > 1 and row[-1] == tokenizer.eos_token_id else row for row in ids]
    for number, row in enumerate(ids, 1):
        if not row:
            raise HfkitError(f"prompts: number {number} is without a token; leave it out, or give it a word")
    return generate_texts(opened.eval(), tokenizer, ids, len(ids), generation)


def _run(stage: str, output_dir: str | Path, rebuild: bool, values: Section, keys: Section) -> Result:
    folder = Path(output_dir)
    recipe = {"stage": stage, "output_dir": str(folder), **_plain(values), **_plain(keys)}
    runner.run(Source(folder, recipe), rebuild=rebuild)
    return Result(folder, json.loads((folder / "metrics.json").read_text(encoding="utf-8")))


def _plain(value: Any) -> Any:
    """A value as YAML would have it: of an object of a library what differs from its defaults."""
    if isinstance(value, Result | Path):
        return str(value.folder if isinstance(value, Result) else value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(_changed(value))
    if hasattr(value, "to_diff_dict"):
        told = value.to_diff_dict()
        names = ("model_type", "transformers_version", "architectures", "quant_method")
        return _plain({name: each for name, each in told.items() if name not in names})
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value


def _changed(value: Any) -> dict[str, Any]:
    """The arguments of a dataclass that are not its defaults, which may be made in `__post_init__`."""
    fields = [each for each in dataclasses.fields(value) if each.init]
    needed = {each.name: getattr(value, each.name) for each in fields if _is_needed(each)}
    default = type(value)(**needed)
    changed = {each.name: getattr(value, each.name) for each in fields if each.name not in OWN}
    return {name: each for name, each in changed.items() if each != getattr(default, name)}


def _is_needed(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
