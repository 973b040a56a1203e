"""How well a model does its task: texts generated for rows of a split, scored."""

import itertools
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfkit.data import corpus
from hfkit.data.tasks import prompt_ids, reference
from hfkit.evaluation import load_metric
from hfkit.evaluation.generation import generate
from hfkit.ranks import on_main

NEW_TOKENS = 64


class TaskMetrics:
    """ROUGE, BLEU and the share of exact matches of what a model generates.

    Args:
        recipe: with the task; its `generation:` holds arguments of `GenerationConfig`.
        data: the prepared data.
    """

    def __init__(self, recipe: Any, data: str, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        self.recipe, self.data, self.tokenizer, self.batch_size = recipe, data, tokenizer, batch_size
        self.generation = {"max_new_tokens": min(NEW_TOKENS, recipe.sequence_length // 2), **recipe.generation}
        if recipe.task == "chat":  # an answer ends where the template ends a turn
            self.generation.setdefault("eos_token_id", _ends_of_turn(tokenizer))

    def __call__(self, model: Any, split: str, count: int) -> dict[str, float]:
        """Of the first `count` rows of a split. Call it on every process."""
        rows = list(itertools.islice(corpus.rows(self.data, split), count))
        room = self.recipe.sequence_length - self.generation["max_new_tokens"]
        prompts = [prompt_ids(self.recipe, row, self.tokenizer, room)[0] for row in rows]
        kept = [index for index, prompt in enumerate(prompts) if prompt]
        found = generate(model, self.tokenizer, [prompts[index] for index in kept], self.batch_size, self.generation)
        texts = dict(zip(kept, found, strict=True))
        predictions = [texts.get(index, "").strip() for index in range(len(rows))]  # "" where the prompt has no room
        return on_main("task metrics", lambda: score(predictions, [reference(self.recipe, row) for row in rows]))


def score(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """ROUGE (0 to 1), BLEU (0 to 100) and exact match (0 to 1)."""
    rouge = load_metric("rouge").compute(predictions=predictions, references=references) or {}
    bleu = load_metric("sacrebleu").compute(predictions=predictions, references=references) or {}
    first = [each[0] for each in references]
    exact = load_metric("exact_match").compute(predictions=predictions, references=first) or {}
    found = {"rouge1": rouge["rouge1"], "rouge2": rouge["rouge2"], "rougeL": rouge["rougeL"]}
    found |= {"bleu": bleu["score"], "exact_match": exact["exact_match"]}
    return {name: float(value) for name, value in found.items()}


def _ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens after an answer, and EOS."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    answered = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(answered[len(asked) :], add_special_tokens=False)["input_ids"]
    return sorted({each for each in ids if each in tokenizer.all_special_ids} | {tokenizer.eos_token_id})
