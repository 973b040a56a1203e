"""Answers in OpenAI's form: whole, or as the chunks of a stream."""

import itertools
import json
import time
from typing import Any, NamedTuple

from hfkit.serving.engine import Answer, Piece, Token

Json = dict[str, Any]


class Form(NamedTuple):
    """How one response is worded.

    Args:
        id: of the response; feedback names it.
        model: its name.
        fingerprint: of the model.
    """

    id: str
    model: str
    fingerprint: str | None
    created: int
    is_chat: bool

    def whole(self, answers: list[Answer], pieces: list[list[Piece]]) -> Json:
        """Return the response of a request that does not stream.

        Args:
            pieces: of each answer.
        """
        choices = []
        for index, (answer, parts) in enumerate(zip(answers, pieces, strict=True)):
            text = "".join(part.text for part in parts)
            logprobs = self._logprobs(answer, [token for part in parts for token in part.tokens])
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self.is_chat
                else {"text": text}
            )
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": parts[-1].finish})
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(answers)}

    def first(self, index: int) -> Json:
        """Return the chunk that begins an answer of a chat."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def chunk(self, index: int, answer: Answer, piece: Piece) -> Json:
        content: Json = {"text": piece.text}
        if self.is_chat:
            content = {"delta": {"content": piece.text} if piece.text or piece.finish is None else {}}
        logprobs = self._logprobs(answer, piece.tokens)
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": piece.finish}
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": [choice]}

    def last(self, answers: list[Answer]) -> Json:
        """Return the chunk that tells the number of tokens."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage(answers)}

    def _head(self, kind: str) -> Json:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.fingerprint}

    def _logprobs(self, answer: Answer, tokens: list[Token]) -> Json | None:
        if answer.top_logprobs is None:
            return None
        text = answer.served.tokenizer.decode

        def entry(token: int, logprob: float | None) -> Json:
            return {"token": text([token]), "logprob": logprob, "bytes": list(text([token]).encode("utf-8"))}

        if self.is_chat:
            content = [
                {**entry(token.id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]}
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        texts = [text([token.id]) for token in tokens]
        offsets = [0, *itertools.accumulate(map(len, texts))][: len(texts)]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{text([other]): value for other, value in token.top} for token in tokens],
            "text_offset": offsets,
        }


def usage(answers: list[Answer]) -> Json:
    """Return the numbers of tokens. A prompt counts once, however many answers it has."""
    prompt, written = len(answers[0].prompt), sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def event(value: Json) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def now() -> int:
    return int(time.time())
