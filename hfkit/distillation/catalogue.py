"""Every loss of a distillation, an entry each, which recipes, checks and the objective read. Imports nothing heavy."""

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple


class LossSpec(NamedTuple):
    """What hfkit knows of a loss.

    Args:
        name: in recipes.
        about: what it compares, for the recipe's help.
        compares: with the `data`, with the teacher's `logits`, or `layers` of both.
        arguments: those that it takes in a recipe, beside `weight`.
        function: of `hfkit.distillation.losses`, or `module:name`; of layers none, there is one for each kind. Takes
            logits (tokens, vocabulary), then targets (tokens,) or the teacher's logits (tokens, vocabulary), then its
            arguments, and gives (tokens,).
        kinds: of layers, how they are compared; the first is the default.
        sparse: of the teacher's logits, the function for some probabilities of each token (ids, probabilities).
        is_across_tokenizers: whether teacher and student have different tokens.
    """

    name: str
    about: str
    compares: Literal["data", "logits", "layers"]
    arguments: tuple[str, ...] = ()
    function: str = ""
    kinds: tuple[str, ...] = ()
    sparse: str = ""
    is_across_tokenizers: bool = False


OF_DISTRIBUTIONS = "between the distributions of teacher and student"
OF_LAYERS = "between layers"
LOSSES = {
    each.name: each
    for each in (
        LossSpec("cross_entropy", "with the data's own tokens", "data", function="cross_entropy"),
        LossSpec(
            "forward_kl",
            OF_DISTRIBUTIONS,
            "logits",
            ("temperature",),
            "forward_kl",
            sparse="sparse_forward_kl",
        ),
        LossSpec("reverse_kl", OF_DISTRIBUTIONS, "logits", ("temperature",), "reverse_kl"),
        LossSpec("jsd", OF_DISTRIBUTIONS, "logits", ("temperature", "beta"), "jsd"),
        LossSpec("logit_mse", "between their logits", "logits", (), "logit_mse"),
        LossSpec(
            "uld",
            "between sorted probabilities, for different tokenizers",
            "logits",
            ("temperature",),
            "uld",
            is_across_tokenizers=True,
        ),
        LossSpec(
            "hidden_states", OF_LAYERS, "layers", ("kind", "layers", "projection"), kinds=("mse", "cosine")
        ),
        LossSpec(
            "attention", OF_LAYERS, "layers", ("kind", "layers", "relation_heads"), kinds=("relations", "maps")
        ),
    )
}  # fmt: skip


def about_losses() -> str:
    """Return what each loss is, in a sentence for those that are alike."""
    names: dict[str, list[str]] = {}
    for loss in LOSSES.values():
        names.setdefault(loss.about, []).append(loss.name)
    return " ".join(f"{', '.join(alike)}: {about}." for about, alike in names.items())


def function_of(reference: str) -> Callable[..., Any]:
    """Return the function that an entry names."""
    module, _, name = reference.rpartition(":")
    return getattr(importlib.import_module(module or "hfkit.distillation.losses"), name)
