"""What a stage will do, in plain terms: what it reads, trains and writes. Stages say it, `hfkit plan` prices it.

It imports nothing heavy, so that a stage may import it at its top.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

# ---- what the inputs of a stage will be


@dataclasses.dataclass
class Texts:
    """A data set.

    Args:
        rows, bytes: of each split.
        sample: some rows, of whatever split.
        is_exact: whether the counts are those of the data, or estimates.
        place: its folder, if it is there.
        made_of_it: the rows that a recipe before makes of it, as later ones ask for them.
    """

    rows: dict[str, int]
    bytes: dict[str, int]
    sample: list[dict[str, Any]]
    is_exact: bool
    place: str | None = None
    made_of_it: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Tokens:
    """A tokenizer.

    Args:
        vocab_size: of the model that is made for it.
        tokenizer: itself, or one like it that was trained on a sample.
        is_exact: whether it is the one.
    """

    vocab_size: int
    tokenizer: Any
    is_exact: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model by its configuration.

    Args:
        config: a `PretrainedConfig`.
        tokens: its tokenizer, if it is known.
        classes: of a head of classes; 0 for a causal model.
        lora: arguments of an adapter on it.
        method, quantization: how its weights are quantized, see `stages/quantize.py`; "" where they are not.
    """

    config: Any
    tokens: Tokens | None
    classes: int = 0
    lora: dict[str, Any] | None = None
    method: str = ""
    quantization: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """What tells models of other sizes apart."""
        return f"{self.config.to_json_string()} {self.classes} {self.lora} {self.method} {self.quantization}"


Known = Texts | Tokens | Model | None  # None: an id on the Hub that is not in the cache

# ---- what a stage does


@dataclasses.dataclass(frozen=True)
class Chore:
    """Work of one process that no model does.

    Args:
        seconds: on this machine.
        memory: bytes that it leaves behind: the system does not get back all that is freed.
    """

    what: str
    seconds: float
    memory: float = 0.0


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Rows of tokens as they come in a batch: all of one length, or of many that are padded to the longest.

    Args:
        tokens: of some rows that stand for all.
        learned: of the tokens of a row, how many have a loss, on average.
        padded_to: the length of a row that is packed; None where rows are padded to the longest of their batch.
        is_masked: whether a packed row holds documents that do not see each other.
    """

    tokens: tuple[int, ...]
    learned: float
    padded_to: int | None = None
    is_masked: bool = True

    @property
    def mean(self) -> float:
        """Tokens that a row has, padding not counted."""
        return sum(self.tokens) / len(self.tokens)

    @property
    def longest(self) -> int:
        return self.padded_to or max(self.tokens)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A model that reads rows without gradients, logits and all."""

    what: str
    model: Model
    rows: int
    lengths: Lengths
    batch: int


@dataclasses.dataclass(frozen=True)
class Writing:
    """A model that writes texts."""

    what: str
    model: Model
    prompts: int
    prompt_tokens: int
    new_tokens: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Training:
    """A training.

    Args:
        train: the recipe's section, arguments of `TrainingArguments`.
        rows: of the training split.
        at_evaluations: what each evaluation during the training does.
        teacher, losses: of a distillation.
        may: of `lora` and `quantization` the keys that the recipe could have.
    """

    what: str
    model: Model
    train: dict[str, Any]
    rows: int
    lengths: Lengths
    optimizer: str
    attn_implementation: str = "sdpa"
    at_evaluations: tuple[Reading | Writing, ...] = ()
    teacher: Model | None = None
    losses: tuple[Any, ...] = ()
    may: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Measuring:
    """A model measured in a process of its own (`hfkit.evaluation.measuring`): how fast it is, and on some rows."""

    what: str
    model: Model
    does: tuple[Reading | Writing, ...]


Part = Chore | Reading | Writing | Training | Measuring


@dataclasses.dataclass
class Work:
    """What a stage does and makes.

    Args:
        makes: what the result is to the recipes that need it.
        disk: bytes of the result, without checkpoints.
        cache: bytes that stay beside it in `.cache`.
        notes: what is not known, or only about.
        is_exact: whether no number is an estimate of the data's size.
    """

    parts: Sequence[Part]
    makes: Known = None
    disk: float = 0
    cache: float = 0
    notes: tuple[str, ...] = ()
    is_exact: bool = True

    @property
    def left_behind(self) -> float:
        """Bytes that the chores leave behind."""
        return sum(part.memory for part in self.parts if isinstance(part, Chore))

    @property
    def is_light(self) -> bool:
        """Whether no model has a part in it."""
        return all(isinstance(part, Chore) for part in self.parts)


# ---- what a training takes


@dataclasses.dataclass(frozen=True)
class Steps:
    """
    Args:
        of_pass: seconds of a forward and backward pass of one batch.
        of_optimizer: what the optimizer adds to a step.
        before: until the first step: making the model, deciding by measuring, Trainer.
    """

    of_pass: float
    of_optimizer: float
    before: float


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """
    Args:
        steps: of each training.
        peak: most bytes that the process held, or on a GPU torch, libraries included.
        base: bytes before it began: Python and the libraries.
    """

    steps: list[Steps]
    peak: float
    base: float
