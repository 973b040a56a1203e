"""Train a tokenizer on prepared text, and report how well it fits text that it has not seen."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic

from hfkit.artifacts.manifest import Metrics
from hfkit.data import corpus
from hfkit.data.chat import TEMPLATES
from hfkit.errors import HfkitError
from hfkit.recipe.fields import Input, Push, ResolvedInputs, StageRecipe
from hfkit.runtime.bars import Bar
from hfkit.runtime.distributed import is_terminal, say

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, UNK, TURN_START, TURN_END]
REPORT_BYTES = 2_000_000


class Recipe(StageRecipe):
    """A tokenizer trained on the train split of prepared data."""

    MAKES: ClassVar[str] = "tokenizer"
    DISTRIBUTED: ClassVar[bool] = False
    SUMMARY: ClassVar[str] = "A tokenizer, trained on the training split of its data."

    stage: Literal["tokenizer"]
    data: Annotated[str, Input("data set")]
    algorithm: Literal["byte_level_bpe", "bpe", "unigram", "wordpiece", "word", "character"] = pydantic.Field(
        "byte_level_bpe",
        description="byte_level_bpe writes any text and gives it back exactly; the others map what they have not seen "
        "to <unk>.",
    )
    vocab_size: int = pydantic.Field(4096, ge=1, description="Size of the vocabulary, special tokens included.")
    min_frequency: int = pydantic.Field(2, ge=1, description="Merge or keep only what occurs this often.")
    sample_bytes: int = pydantic.Field(
        100_000_000, ge=1, description="Train on about this much text, in bytes, from the beginning."
    )
    add_bos: bool = pydantic.Field(True, description="Begin every encoded text with <bos>.")
    add_eos: bool = pydantic.Field(False, description="End every encoded text with <eos>. Off, so that prompts go on.")
    push: Push | None = None


def check(recipe: Recipe, inputs: ResolvedInputs) -> Iterator[tuple[str, str]]:
    least = len(SPECIAL_TOKENS) + (256 if recipe.algorithm == "byte_level_bpe" else 1)
    if recipe.vocab_size < least:
        what = "256 bytes and" if recipe.algorithm == "byte_level_bpe" else "one symbol and"
        rule = f"must be at least {least} ({what} {len(SPECIAL_TOKENS)} special tokens), got {recipe.vocab_size}"
        yield "vocab_size", rule
    if problem := corpus.problem_with(inputs["data"].path):
        yield "data", problem


def run(recipe: Recipe, inputs: ResolvedInputs, output: Path) -> Metrics:
    backend = train(recipe, limited(corpus.texts(inputs["data"].path, "train"), recipe.sample_bytes))
    tokenizer = wrapped(backend)
    tokenizer.save_pretrained(output)
    _name_the_common_class(output / "tokenizer_config.json")

    metrics = {"vocab_size": len(tokenizer), **report(backend, corpus.texts(inputs["data"].path, "validation"))}
    say(f"  {metrics['vocab_size']:,} tokens; on held-out text {metrics['bytes_per_token']:.2f} bytes a token")
    say(f"  documents given back exactly: {metrics['exact_round_trip']:.1%}; unknown tokens: {metrics['unknown']:.2%}")
    return metrics


def wrapped(backend: "Tokenizer") -> "PreTrainedTokenizerFast":
    """Return a tokenizer as transformers loads it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATES["chatml"]
    return tokenizer


def train(recipe: Recipe, texts: Iterator[str], is_shown: bool = True) -> "Tokenizer":
    """Train a tokenizer of the recipe's kind on `texts`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    common: dict[str, Any] = {
        "vocab_size": recipe.vocab_size,
        "special_tokens": SPECIAL_TOKENS,
        "show_progress": is_shown and is_terminal(),
    }
    room = recipe.vocab_size - len(SPECIAL_TOKENS)
    options: dict[str, Any] = {**common, "min_frequency": recipe.min_frequency}
    if recipe.algorithm == "byte_level_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif recipe.algorithm in ("bpe", "unigram"):
        is_bpe = recipe.algorithm == "bpe"
        tokenizer = Tokenizer(models.BPE(unk_token=UNK) if is_bpe else models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
        trainer = (
            trainers.BpeTrainer(limit_alphabet=room, **options)
            if is_bpe
            else trainers.UnigramTrainer(unk_token=UNK, **common)
        )
    elif recipe.algorithm == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(limit_alphabet=room // 2, **options)  # each stands with ## too
    else:
        unit = r"[\s\S]" if recipe.algorithm == "character" else r"\s+|\w+|[^\w\s]"
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(unit), "isolated")
        tokenizer.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(**options)
    bar = Bar(texts, "training the tokenizer", unit=" documents", leave=True, disable=not is_shown)
    try:
        tokenizer.train_from_iterator(bar, trainer)
    except HfkitError:
        raise
    except Exception as error:
        raise HfkitError(f"vocab_size={recipe.vocab_size}: {error}; raise it or choose byte_level_bpe") from None
    template = " ".join([BOS] * recipe.add_bos + ["$A"] + [EOS] * recipe.add_eos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    )
    return tokenizer


def report(tokenizer: "Tokenizer", texts: Iterator[str]) -> dict[str, float]:
    """Return the bytes a token, the share of documents that decode to themselves, and the share of unknown tokens."""
    documents = tokens = size = exact = unknown = 0
    for text in limited(texts, REPORT_BYTES):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        documents += 1
        tokens += len(ids)
        size += len(text.encode())
        exact += tokenizer.decode(ids, skip_special_tokens=False) == text
        unknown += sum(token_id == tokenizer.token_to_id(UNK) for token_id in ids)
    if not tokens:
        raise HfkitError("data: the validation split is empty; prepare the data again with more documents")
    return {"bytes_per_token": size / tokens, "exact_round_trip": exact / documents, "unknown": unknown / tokens}


def limited(texts: Iterator[str], limit: int) -> Iterator[str]:
    """Yield the texts up to and with the one that passes `limit` bytes of UTF-8."""
    total = 0
    for text in texts:
        yield text
        total += len(text.encode())
        if total >= limit:
            return


def _name_the_common_class(path: Path) -> None:
    """Name the class that every loader opens; transformers 5 names its backend, which others refuse."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
