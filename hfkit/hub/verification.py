"""The trial before a push: the card's own lines are run in a process that has no hfkit, and must give what we get."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hfkit.artifacts.kinds import KINDS
from hfkit.artifacts.manifest import Manifest
from hfkit.data.tasks import task_in
from hfkit.errors import HfkitError
from hfkit.privacy import secrets
from hfkit.reports.snippets import beginning, snippet

TOLERANCE = 1e-3  # of the largest logit: another number of threads sums in another order

# Runs the lines in an empty place, then says what they made: rows of data, token ids, or the logits of a text.
_PROGRAM = """
import contextlib, io, json, sys
sys.modules.update({name: None for name in ["hfkit", *sys.modules] if name.split(".")[0] == "hfkit"})
asked, space = json.loads(sys.stdin.read()), {}
with contextlib.redirect_stdout(io.StringIO()):
    exec(asked["lines"], space)
    if "data" in space:
        made = {split: rows.num_rows for split, rows in space["data"].items()}
    else:
        held = space.get("generate") or space.get("classify")
        tokenizer = held.tokenizer if held else space["tokenizer"]
        inputs = tokenizer(asked["text"], return_tensors="pt", return_token_type_ids=False)
        if "model" not in space and held is None:
            made = inputs["input_ids"].tolist()
        else:
            model = held.model if held else space["model"]
            more = {"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {}
            made = model(**inputs, **more).logits.float().flatten().tolist()
print(json.dumps(made))
"""


def try_out(folder: Path, staged: Path, content: Manifest) -> None:
    """
    Args:
        folder: the result, as hfkit reads it.
        staged: its files as they would be pushed; of an adapter, with a base model that is at hand.
        content: its manifest.

    Raises:
        HfkitError: if the lines fail there, or give something else than here.
    """
    text = beginning(content)
    output = _without_hfkit(snippet(staged, content, str(staged)), text, folder)
    expected = _here(folder, content, text)
    if KINDS[content["makes"]].compared_by != "logits":
        same = output == expected
    else:
        largest = max(map(abs, expected), default=0.0)
        distance = max((abs(a - b) for a, b in zip(expected, output, strict=False)), default=0.0)
        same = len(output) == len(expected) and distance <= TOLERANCE * largest
    if not same:
        raise HfkitError(
            f"{folder}: gives something else where hfkit is not installed (for {text!r}); nothing was pushed"
        )


def _without_hfkit(lines: str, text: str, folder: Path) -> Any:
    hidden = secrets.in_environment()
    environment = {name: value for name, value in os.environ.items() if value not in hidden}
    with tempfile.TemporaryDirectory() as empty:
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": f"{empty}/modules",
            "HF_DATASETS_CACHE": f"{empty}/datasets",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONSAFEPATH": "1",
        }
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _PROGRAM],
            input=json.dumps({"lines": lines, "text": text}),
            env=environment,
            cwd=empty,
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise HfkitError(f"{folder}: cannot be used where hfkit is not installed: {last}; nothing was pushed")
    return json.loads(done.stdout.splitlines()[-1])


def _here(folder: Path, content: Manifest, text: str) -> Any:
    by = KINDS[content["makes"]].compared_by
    if by == "rows":
        return {split: split_metrics["rows"] for split, split_metrics in content["metrics"]["splits"].items()}
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if by == "ids":
        return inputs["input_ids"].tolist()
    from hfkit.model.loading import load_model

    recipe = content["recipe"]
    trusted = recipe.get("trust_remote_code", False)
    model = load_model(str(folder), task_in(recipe).has_classes, trust_remote_code=trusted).eval()
    more = {"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(**inputs.to(model.device), **more).logits.float().flatten().tolist()
