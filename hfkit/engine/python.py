"""What the recipes do, from Python: a function for each stage, with the classes as arguments that the sections name.

    from hfkit import prepare, pretrain, train_tokenizer

    data = prepare("runs/data", sources=[{"builtin": "python-stdlib"}])
    tokenizer = train_tokenizer("runs/tokenizer", data, vocab_size=4096)
    model = pretrain("runs/model", data, tokenizer, HfkitConfig(hidden_size=128), TrainingArguments(max_steps=100))
    print(model.metrics["bits_per_byte"], model.folder)

A call is a recipe without its file: checked as a whole before anything runs, up to date where it was run before,
resumed where it was interrupted, and written whole or not at all. Its arguments stand in the folder's `hfkit.json`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkit.artifacts.result import Result
from hfkit.engine import runner
from hfkit.recipe.plain import plain
from hfkit.recipe.yaml_source import Source

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, TrainingArguments

Section = Mapping[str, Any]


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


def _run(stage: str, output_dir: str | Path, rebuild: bool, values: Section, keys: Section) -> Result:
    folder = Path(output_dir)
    recipe = {"stage": stage, "output_dir": str(folder), **plain(values), **plain(keys)}
    runner.run(Source(folder, recipe), rebuild=rebuild)
    return Result.of(folder)
