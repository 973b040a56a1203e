"""The thread that computes: requests join and leave the models' batches between steps."""

import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from hfkit.inference.decoding import Row
from hfkit.inference.sampling import Sampling, choose
from hfkit.serving.models import Served
from hfkit.serving.text import Writer


class Token(NamedTuple):
    """A token of an answer.

    Args:
        logprob: in nats, by the model's own distribution; None where nobody asked.
        top: the likeliest tokens in its place, each with its own.
    """

    id: int
    logprob: float | None
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """What an answer has got: text that can be shown, and tokens.

    Args:
        finish: why it ended: stop or length; error where it could not be finished. None while it goes on.
    """

    text: str
    tokens: list[Token]
    finish: str | None = None
    error: str | None = None


class Answer(Row):
    """An answer to be written, and the writing of it.

    Args:
        deliver: is given each piece, in the engine's thread.
        seed: of the generator that its draws come from.
        top_logprobs: how many of the likeliest tokens are told beside each; None for no log-probabilities.
        seconds: after which it ends as it is.
    """

    def __init__(
        self,
        served: Served,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        deliver: Callable[["Answer", Piece], None],
        stops: tuple[str, ...] = (),
        top_logprobs: int | None = None,
        seconds: float = float("inf"),
    ):
        super().__init__(prompt, max_tokens, served.ends)
        self.served, self.sampling, self.deliver, self.top_logprobs = served, sampling, deliver, top_logprobs
        self.generator = random.Random(seed)
        self.writer = Writer(served.tokenizer, stops)
        self.logprob: Token | None = None  # of the last token, where it is asked for
        self.deadline = time.monotonic() + seconds
        self.is_cancelled = self.is_finished = False


class Engine:
    """The models and their thread.

    Args:
        models: by name.
        observe: is told the seconds of each step.
    """

    def __init__(self, models: dict[str, Served], observe: Callable[[float], None] = lambda _: None):
        self.models, self.observe = models, observe
        self.is_ready = False
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._slow: list[Answer] = []  # of models that only `generate` knows how to run
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Write a first token with each model, then take requests."""
        with torch.inference_mode():
            for served in self.models.values():
                self._use(served)
                served.start(_choose)
        self.is_ready = True
        self._thread.start()

    def stop(self) -> None:
        self.is_ready = False
        self._commands.put(None)
        self._thread.join()

    def submit(self, answer: Answer) -> None:
        self._commands.put(lambda: self._join(answer))

    def cancel(self, answer: Answer) -> None:
        """Let an answer go; its slot is free before the next step."""
        answer.is_cancelled = True
        if answer.served.batch is not None:
            batch = answer.served.batch
            self._commands.put(lambda: batch.drop(answer))

    def forward(self, served: Served, texts: list[list[int]], with_states: bool) -> "Future[torch.Tensor]":
        """Have texts classified or embedded between two steps. See `Served.forward`."""
        future: Future[torch.Tensor] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    self._use(served)
                    future.set_result(served.forward(texts, with_states))
                except Exception as error:  # whoever asked is told
                    future.set_exception(error)

        self._commands.put(work)
        return future

    @property
    def in_use(self) -> int:
        return sum(len(served.batch.rows) for served in self.models.values() if served.batch is not None)

    @property
    def waiting(self) -> int:
        batches = [served.batch for served in self.models.values() if served.batch is not None]
        return sum(len(batch.pending) for batch in batches) + len(self._slow)

    def _join(self, answer: Answer) -> None:
        if answer.is_cancelled:
            return
        if answer.served.batch is None:
            self._slow.append(answer)
        else:
            answer.served.batch.add(answer)

    def _use(self, served: Served) -> None:
        if served.adapter is not None and served.model.active_adapter != served.adapter:
            served.model.set_adapter(served.adapter)

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            busy = [served for served in self.models.values() if served.batch is not None and served.batch.is_busy]
            try:
                while True:
                    command = self._commands.get(block=not busy and not self._slow)
                    if command is None:
                        return
                    command()
                    if not busy:  # what has come may be work
                        break
            except queue.Empty:
                pass
            for served in busy:
                self._step(served)
            if self._slow:
                self._generate(self._slow.pop(0))

    def _step(self, served: Served) -> None:
        batch = served.batch
        assert batch is not None
        start = time.perf_counter()
        try:
            self._use(served)
            written: list[Any] = batch.step()
        except Exception as error:  # such as no memory: the answers of this model fail, the server goes on
            lost: list[Any] = batch.clear()
            for answer in lost:
                answer.deliver(answer, Piece("", [], "error", f"{type(error).__name__}: {error}"))
            return
        self.observe(time.perf_counter() - start)
        for answer in written:
            self._tell(answer)
            if answer.is_finished:
                batch.drop(answer)

    def _tell(self, answer: Answer) -> None:
        """Deliver what the last token of an answer adds, and note whether it ends it."""
        token = answer.tokens[-1]
        text = "" if token in answer.ends else answer.writer.add(token)
        finish = None
        if token in answer.ends or answer.writer.is_stopped:
            finish = "stop"
        elif answer.is_done or time.monotonic() > answer.deadline:
            finish = "length"
        if finish is not None:
            text += answer.writer.end()
            answer.is_finished = True
        answer.deliver(answer, Piece(text, [answer.logprob or Token(token, None, [])], finish))

    def _generate(self, answer: Answer) -> None:
        """Write an answer by `model.generate`, alone: of an encoder-decoder, or a model with another kind of cache."""
        from transformers import StoppingCriteria, StoppingCriteriaList

        served, rule = answer.served, answer.sampling
        if answer.is_cancelled:
            return

        class Told(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                answer.tokens.append(int(input_ids[0, -1]))
                engine._tell(answer)
                return torch.full((1,), answer.is_finished or answer.is_cancelled, device=input_ids.device)

        engine = self
        options: dict[str, Any] = {"do_sample": rule.temperature > 0, "max_new_tokens": answer.room}
        if rule.temperature > 0:
            options |= {"temperature": rule.temperature, "top_p": rule.top_p, "top_k": rule.top_k or None}
        try:
            self._use(served)
            ids = torch.tensor([answer.prompt], device=served.model.device)
            with torch.random.fork_rng():
                torch.manual_seed(answer.generator.getrandbits(63))
                served.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    stopping_criteria=StoppingCriteriaList([Told()]),
                    eos_token_id=served.ends or None,
                    pad_token_id=served.tokenizer.pad_token_id,
                    **options,
                )
            if not answer.is_finished:  # by a rule of the model's own
                answer.deliver(answer, Piece(answer.writer.end(), [], "stop"))
        except Exception as error:
            answer.deliver(answer, Piece("", [], "error", f"{type(error).__name__}: {error}"))


def _choose(logits: torch.Tensor, answers: list[Any]) -> list[int]:
    """Return the next token of each answer, and keep its log-probability where it is asked for."""
    tokens = choose(logits, [answer.sampling for answer in answers], [answer.generator for answer in answers])
    for row, (answer, token) in enumerate(zip(answers, tokens, strict=True)):
        if answer.top_logprobs is not None:
            shares = logits[row].log_softmax(-1)
            top = shares.topk(min(answer.top_logprobs, len(shares))) if answer.top_logprobs else None
            pairs = [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            answer.logprob = Token(token, shares[token].item(), pairs)
    return tokens
