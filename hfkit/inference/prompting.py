"""Texts from a model and prompts, with nothing else to prepare."""

import os
from collections.abc import Sequence
from typing import Any

from hfkit.data.tasks.templates import without_end
from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError
from hfkit.inference.generation import generate as generate_texts
from hfkit.model.loading import open_model


def generate(
    model: "str | os.PathLike[str]", prompts: Sequence[str], *, trust_remote_code: bool = False, **generation: Any
) -> list[str]:
    """What a model writes after prompts, in their order.

    Args:
        model: a result of a stage, a folder, or an id on the Hub; with an adapter or quantized, too.
        prompts: texts.
        trust_remote_code: run the code that comes with the model.
        generation: arguments of `GenerationConfig`, such as `max_new_tokens`. Greedy without `do_sample`.

    Raises:
        HfkitError: if the model cannot be opened, or there is a prompt without a token.

    Example:
        >>> len(generate("runs/model", ["the cat", "a dog"], max_new_tokens=4))
        2
    """
    place = os.fspath(model)
    opened = open_model(place, trust_remote_code=trust_remote_code)
    tokenizer: Any = load_tokenizer(place, "generate")
    ids = [without_end(tokenizer(text)["input_ids"], tokenizer) for text in prompts]
    for number, row in enumerate(ids, 1):
        if not row:
            raise HfkitError(f"prompts: number {number} is without a token; leave it out, or give it a word")
    return generate_texts(opened, tokenizer, ids, len(ids), generation)
