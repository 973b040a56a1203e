"""What is known of an input that is there already: a folder, or an id on the Hub that is in the cache."""

import contextlib
import itertools
from pathlib import Path
from typing import Any

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import ADAPTER, is_adapter
from hfkit.data import corpus
from hfkit.errors import HfkitError
from hfkit.planning.work import Known, Model, Texts, Tokens

SAMPLE_ROWS = 400
LONGEST_LOOK = 20_000_000  # bytes of a file: of a larger one only the beginning is looked at
LORA_KEYS = ("r", "target_modules", "modules_to_save", "bias")


def known_of(place: str, kind: str) -> Known:
    """What stands at a place; None where that is an id on the Hub that is not in the cache. It asks no network."""
    folder = local(place)
    if folder is None:
        return None
    try:
        return {"data set": _texts, "tokenizer": _tokens, "model": _model}[kind](folder)
    except HfkitError:  # `check` has told what matters; what a plan only looks at may be missing
        return None


def local(place: str) -> str | None:
    """The folder of a place: itself, or where the cache of the Hub keeps it."""
    if Path(place).is_dir():
        return place
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", ADAPTER, "tokenizer.json"):
        found = try_to_load_from_cache(place, name)
        if isinstance(found, str):
            return str(Path(found).parent)
    return None


def reached(folder: Path, stage: str) -> float | None:
    """Return the share of this machine's measured peak that a training in a folder of results reached: the last one of
    the stage, or of any; None where there was none."""
    of_stage: float | None = None
    of_any: float | None = None
    for path in sorted(folder.glob(f"*/{manifest.MANIFEST}"), key=lambda path: path.stat().st_mtime):
        made = manifest.read_json(path.parent) or {}
        if mfu := (made.get("metrics") or {}).get("mfu"):
            of_any, of_stage = mfu, mfu if made["stage"] == stage else of_stage
    return of_stage or of_any


def _texts(place: str) -> Texts | None:
    if corpus.problem_with(place):
        return None
    import pyarrow.parquet

    told = ((manifest.read_json(Path(place)) or {}).get("metrics") or {}).get("splits") or {}
    rows, sizes = {}, {}
    train = Path(place) / "train.parquet"
    stride = 1
    for split in corpus.SPLITS:
        file = pyarrow.parquet.ParquetFile(Path(place) / f"{split}.parquet")
        rows[split] = file.metadata.num_rows
        groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
        sizes[split] = told.get(split, {}).get("bytes") or sum(group.total_byte_size for group in groups)
    if train.stat().st_size < LONGEST_LOOK:
        stride = max(rows["train"] // SAMPLE_ROWS, 1)
    sample = list(itertools.islice(corpus.rows(place, "train"), 0, SAMPLE_ROWS * stride, stride))
    return Texts(rows, sizes, sample, is_exact=True, place=place)


def _tokens(place: str) -> Tokens:
    from hfkit.data.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(place, "classify")
    return Tokens(len(tokenizer), tokenizer, is_exact=True)


def _model(place: str) -> Model:
    from hfkit.model.loading import base_quantization, is_classifier, load_config

    config: Any = load_config(place)
    classes = config.num_labels if is_classifier(place, config) else 0
    tokens = None
    with contextlib.suppress(HfkitError):
        tokens = _tokens(place)
    lora = quantization = None
    if is_adapter(place):
        told = manifest.read_json(Path(place), ADAPTER) or {}
        lora = {key: told[key] for key in LORA_KEYS if told.get(key) is not None}
        quantization = base_quantization(place)
    method = "bitsandbytes" if quantization else ""
    of_config = getattr(config, "quantization_config", None)
    if of_config is not None:
        quantization = of_config if isinstance(of_config, dict) else of_config.to_dict()
        method = str(quantization.get("quant_method", "bitsandbytes"))
        del config.quantization_config  # it is told by `quantization`: the sizes are those of the whole model
    return Model(config, tokens, classes, lora, method, quantization)
