"""The kinds of things that stages make, a record each: what the Hub calls them, and what a card says of them."""

from typing import Literal, NamedTuple


class Kind(NamedTuple):
    """What all results of a kind have in common.

    Args:
        name: what `Recipe.MAKES` and inputs of recipes call it.
        repository: its type on the Hub; None where it is not pushed.
        compared_by: what a copy is held against before it is pushed: the number of `rows`, the `ids` of a text, or the
            `logits` of one.
        library: that opens it, for the Hub.
        snippet: lines for the card that use it, with {name} (of the folder, quoted), {text} (quoted), {columns} and
            {file}; "" where they depend on the model.
        limits: sentences of the card on what it is for.
    """

    name: str
    repository: Literal["model", "dataset"] | None
    compared_by: Literal["rows", "ids", "logits"] | None = None
    library: str | None = None
    snippet: str = ""
    limits: tuple[str, ...] = ()


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "data set",
            "dataset",
            "rows",
            snippet="from datasets import load_dataset\n\n"
            "data = load_dataset({name})  # columns: {columns}\nprint(data)",
            limits=(
                "For training and testing language models. The rows of one split are not in another.",
                "The texts are those of the sources as they are: their licences, errors, names and opinions go with "
                "them.",
            ),
        ),
        Kind(
            "tokenizer",
            "model",
            "ids",
            "transformers",
            snippet="from transformers import AutoTokenizer\n\ntokenizer = AutoTokenizer.from_pretrained({name})\n"
            "print(tokenizer.tokenize({text}))",
            limits=("For text like that it was trained on; other text takes more tokens.",),
        ),
        Kind("model", "model", "logits", "transformers"),
        Kind(
            "evaluation",
            None,
            snippet='import json\n\nfound = json.load(open("{file}"))',
            limits=(
                "The numbers hold for these rows, this machine and these versions; the intervals for other such rows.",
            ),
        ),
        Kind("log", None, limits=("What people asked is theirs: keep it no longer than it is needed.",)),
    )
}
