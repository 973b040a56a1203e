"""The text of tokens as they come: no character is cut, and no part of a stop string is shown."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Writer:
    """The text of one answer.

    Args:
        stops: the text ends before the first of them.

    Attributes:
        is_stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer.backend_tokenizer, tuple(stops)
        self.stream = DecodeStream(skip_special_tokens=True)
        self.is_stopped = False
        self._held = ""  # may be the beginning of a stop string

    def add(self, token: int) -> str:
        """Take a token; return the text that can be shown now, which may be that of earlier tokens."""
        if self.is_stopped:
            return ""
        new = self._held + (self.stream.step(self.tokenizer, token) or "")
        first = min((place for stop in self.stops if (place := new.find(stop)) >= 0), default=-1)
        if first >= 0:
            self.is_stopped, self._held = True, ""
            return new[:first]
        keep = max((_begun(new, stop) for stop in self.stops), default=0)
        self._held = new[len(new) - keep :]
        return new[: len(new) - keep]

    def end(self) -> str:
        """Return what was held back. A character whose last bytes never came is left out."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text begin a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
