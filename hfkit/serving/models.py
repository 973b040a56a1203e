"""The models that a server answers with: opened once, each with its tokenizer and its window."""

import inspect
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hfkit.artifacts import manifest
from hfkit.data.chat import Tools, Turns, generation_ids, problem_with_template, render
from hfkit.data.tasks.templates import without_end
from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError
from hfkit.inference.batches import padded
from hfkit.inference.classes import is_multi_label
from hfkit.inference.decoding import Batch, Row
from hfkit.inference.generation import plain_decoder
from hfkit.model import loading
from hfkit.model.heads import decoder_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

LONGEST = 4096  # tokens of a window, where the recipe does not set `context_length`
TEXTS_AT_ONCE = 16  # that are classified or embedded in one forward pass
CALIBRATION_TOKENS = 64
PIECES = (16, 512)  # the least and the most tokens of a prompt between two steps
READ_STEPS = 1.5  # that reading a piece may take
PREFIXES = 8


class Limits(NamedTuple):
    """
    Args:
        slots: answers that are written at the same time by a model.
        context_length: tokens that a prompt and its answer may have together; by default what the model takes.
    """

    slots: int = 32
    context_length: int | None = None


class Served:
    """A model with what is needed to answer with it.

    Attributes:
        kind: generate or classify.
        batch: of a decoder, where its answers are written side by side; None where `model.generate` writes them.
        adapter: the name by which PEFT knows the adapter, where others stand on the same base.
        chat_problem: why it cannot answer chats; None if it can.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        model: Any,
        tokenizer: "PreTrainedTokenizerFast",
        is_classifier: bool,
        limits: Limits,
    ):
        self.name, self.model, self.tokenizer, self.slots = name, model, tokenizer, limits.slots
        self.kind = "classify" if is_classifier else "generate"
        self.created = int(time.time())
        self.digest: str | None = (manifest.read_json(Path(folder)) or {}).get("digest")
        window = loading.window_of(model.config, tokenizer)
        self.window = min(window, limits.context_length or LONGEST)
        if limits.context_length is not None and limits.context_length > window:
            raise HfkitError(f"context_length={limits.context_length}: {folder} takes {window} tokens; lower it")
        self.adapter: str | None = None
        self.batch: Batch | None = None
        self.ends: list[int] = []
        self.chat_problem: str | None = "it gives classes, not answers; ask /v1/classify"
        if self.kind == "generate":
            self.chat_problem = problem_with_template(tokenizer)
            ends = generation_ids(tokenizer, is_chat=self.chat_problem is None).get("eos_token_id", [])
            own = model.generation_config.eos_token_id
            self.ends = sorted(
                {*([ends] if isinstance(ends, int) else ends), *([own] if isinstance(own, int) else own or [])}
            )

    def start(self, choose: "Callable[[torch.Tensor, list[Any]], list[int]]") -> None:
        """Write a first token, and measure how much of a prompt can be read between two steps. Call it once.

        Args:
            choose: as in `decoding.Batch`.
        """
        decoder = plain_decoder(self.model) if self.kind == "generate" else None
        if decoder is None:
            self.forward([[self.tokenizer.pad_token_id or 0] * 2])
            return
        pad = self.tokenizer.pad_token_id or 0
        greedy = Batch(decoder, lambda logits, rows: logits.argmax(-1).tolist(), 1, self.window, pad_token_id=pad)
        size = max(1, min(CALIBRATION_TOKENS, self.window // 2))
        for _ in range(2):  # the first warms up
            greedy.add(Row([pad] * size, 4, []))
            seconds = []
            while greedy.is_busy:
                start = time.perf_counter()
                greedy.step()
                seconds.append(time.perf_counter() - start)
        self.batch = Batch(decoder, choose, self.slots, self.window, pad_token_id=pad, prefixes=PREFIXES)
        self.batch.piece = int(
            min(max(READ_STEPS * min(seconds[1:], default=0) * size / seconds[0], PIECES[0]), PIECES[1])
        )

    def ids_of_text(self, text: str) -> list[int]:
        """Return the tokens of a text that is to be continued, or read by an encoder."""
        ids = self.tokenizer(text)["input_ids"]
        return ids if self.model.config.is_encoder_decoder else without_end(ids, self.tokenizer)

    def ids_of_chat(self, turns: Turns, tools: Tools = None) -> list[int]:
        """Return the tokens of a chat up to where the next answer begins.

        Raises:
            HfkitError: if the chat template refuses it.
        """
        text = render(turns, self.tokenizer, tools, is_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def forward(self, texts: list[list[int]], with_states: bool = False) -> torch.Tensor:
        """Return what the model gives to token ids: (texts, classes) or (texts, hidden_size), float32, on the CPU.

        Args:
            with_states: the mean of the last hidden states over a text's tokens; else the logits of its classes.
        """
        results = []
        pad = self.tokenizer.pad_token_id or 0
        self.model.config.pad_token_id = self.model.config.get_text_config().pad_token_id = pad
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            ids, mask = (rows.to(self.model.device) for rows in padded(texts[start : start + TEXTS_AT_ONCE], pad))
            if with_states or self.kind != "classify":
                base = self.model.get_encoder() if self.model.config.is_encoder_decoder else decoder_of(self.model)
                states = base(input_ids=ids, attention_mask=mask).last_hidden_state.float()
                results.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
            else:
                results.append(self.model(input_ids=ids, attention_mask=mask).logits.float())
        return torch.cat(results).cpu()

    def probabilities(self, logits: torch.Tensor) -> list[dict[str, float]]:
        """Return of each row the probability of each label, as the model was trained: of one class, or of several."""
        config = self.model.config
        shares = logits.sigmoid() if is_multi_label(config) else logits.softmax(-1)
        return [{config.id2label[index]: value for index, value in enumerate(row)} for row in shares.tolist()]


def open_all(folders: dict[str, str], limits: Limits, trust_remote_code: bool = False) -> dict[str, Served]:
    """Open models by their names. Adapters on one base share it.

    Raises:
        HfkitError: if one cannot be opened or served.
    """
    served: dict[str, Served] = {}
    bases: dict[str, Served] = {}
    for name, folder in folders.items():
        config = loading.load_config(folder, trust_remote_code)
        is_classifier = bool(loading.is_classifier(folder, config))
        tokenizer = load_tokenizer(folder, "classify" if is_classifier else "generate")
        if not tokenizer.is_fast:
            raise HfkitError(f"{folder}: has no tokenizer.json; convert it with transformers and save it again")
        base = loading.base_of(folder)
        other = bases.get(base)
        if base != folder and other is not None and not is_classifier and len(other.tokenizer) == len(tokenizer):
            model = other.model
            other.adapter = other.adapter or model.active_adapter
            model.load_adapter(folder, adapter_name=name, is_trainable=False)
            model.set_adapter(other.adapter)
        else:
            model, other = loading.open_model(folder, is_classifier, trust_remote_code), None
        if not is_classifier and "input_ids" not in inspect.signature(model.forward).parameters and base == folder:
            raise HfkitError(f"{folder}: reads no token ids, so that it cannot be served; name a model of text")
        served[name] = Served(name, folder, model, tokenizer, is_classifier, limits)
        if other is not None:
            served[name].adapter = name
        elif base != folder:
            bases[base] = served[name]
    return served
