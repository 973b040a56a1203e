"""A chat in the terminal, with the engine of the server and without a server."""

import queue
from pathlib import Path

from hfkit.errors import HfkitError
from hfkit.inference.sampling import Sampling
from hfkit.serving.engine import Answer, Engine, Piece
from hfkit.serving.models import Limits, Served, open_all
from hfkit.serving.requests import seed_of


def chat(model: str, temperature: float, max_tokens: int, seed: int | None) -> None:
    """Answer what is typed, until the end of the input.

    Args:
        model: a folder, or an id on the Hub. Without a chat template it continues each text.
        max_tokens: of an answer.
    """
    if not 0 <= temperature <= 2:
        raise HfkitError(f"--temperature {temperature}: must be from 0 to 2")
    if max_tokens < 1:
        raise HfkitError(f"--max-tokens {max_tokens}: must be at least 1")
    engine = Engine(open_all({Path(model).name: model}, Limits(slots=1)))
    engine.start()
    (served,) = engine.models.values()
    if served.kind == "classify":
        print(f"{served.name} gives classes: each line is classified. End with Ctrl-D.")
    elif served.chat_problem is None:
        print(f"{served.name}, a chat of {served.window:,} tokens. /new begins another, Ctrl-D ends.")
    else:
        print(f"{served.name} has no chat template: each line is continued. End with Ctrl-D.")
    turns: list[dict[str, str]] = []
    try:
        while True:
            text = input("> ").strip()
            if text == "/new":
                turns = []
            elif text and served.kind == "classify":
                logits = engine.forward(served, [served.tokenizer(text)["input_ids"]], False).result()
                shares = sorted(served.probabilities(logits)[0].items(), key=lambda pair: -pair[1])
                print("\n".join(f"{share:7.1%}  {label}" for label, share in shares[:10]))
            elif text:
                turns.append({"role": "user", "content": text})
                turns.append(
                    {"role": "assistant", "content": _answer(engine, served, turns, temperature, max_tokens, seed)}
                )
    except EOFError:
        print()
    finally:
        engine.stop()


def _answer(
    engine: Engine, served: Served, turns: list[dict[str, str]], temperature: float, max_tokens: int, seed: int | None
) -> str:
    """Print an answer as it is written. The first turns are left out where they do not fit."""
    while True:
        if served.chat_problem is None:
            prompt = served.ids_of_chat([*turns])
        else:
            prompt = served.ids_of_text(turns[-1]["content"])
        if len(prompt) < served.window or served.chat_problem is not None or len(turns) < 3:
            break
        del turns[:2]
    room = min(max_tokens, served.window - len(prompt))
    if room < 1 or not prompt:
        print(f"that is {len(prompt)} tokens, and the model takes {served.window}: write less")
        return ""
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    rules = Sampling(temperature=temperature)
    engine.submit(Answer(served, prompt, room, rules, seed_of(seed), lambda _, piece: pieces.put(piece)))
    texts = []
    while True:
        piece = pieces.get()
        if piece.error is not None:
            raise HfkitError(f"{served.name}: {piece.error}")
        texts.append(piece.text)
        print(piece.text, end="", flush=True)
        if piece.finish is not None:
            print()
            return "".join(texts)
