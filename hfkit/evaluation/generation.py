"""Texts generated for many prompts: in batches of like length, on all processes, exactly one for each prompt."""

from typing import TYPE_CHECKING, Any

from hfkit.data.tasks import prompt_ids
from hfkit.evaluation.batches import in_batches, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 64


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    batch_size: int,
    generation: dict[str, Any],
    title: str = "generating",
) -> list[str]:
    """What the model writes after each prompt, in the order of the prompts. Call it on every process.

    The padding stands on the left, where it does not part a prompt from its continuation.

    Args:
        prompts: token ids; none may be empty.
        generation: arguments of `GenerationConfig`. Greedy where it does not say `do_sample`.
    """
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **generation}

    def of_batch(chosen: list[int]) -> list[str]:
        ids, mask = padded([prompts[index] for index in chosen], tokenizer.pad_token_id, "left")
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=True, **options
        )
        new = output if model.config.is_encoder_decoder else output[:, ids.shape[1] :]
        return tokenizer.batch_decode(new, skip_special_tokens=True)

    return in_batches(model, prompts, of_batch, batch_size, title)


def answers(
    recipe: Any,
    rows: list[dict[str, Any]],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    window: int,
) -> list[str]:
    """What the model answers to each row of a task; nothing where the prompt has no room. Call it on every process.

    Args:
        recipe: a `TaskRecipe` with `generation:`, arguments of `GenerationConfig`.
        window: tokens that prompt and answer have together.
    """
    generation = {"max_new_tokens": min(NEW_TOKENS, window // 2), **recipe.generation}
    if recipe.task == "chat":  # an answer ends where the template ends a turn
        generation.setdefault("eos_token_id", _ends_of_turn(tokenizer))
    prompts = [prompt_ids(recipe, row, tokenizer, window - generation["max_new_tokens"])[0] for row in rows]
    kept = [index for index, prompt in enumerate(prompts) if prompt]
    found = generate(model, tokenizer, [prompts[index] for index in kept], batch_size, generation)
    texts = dict(zip(kept, found, strict=True))
    return [texts.get(index, "").strip() for index in range(len(rows))]


def _ends_of_turn(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special tokens after an answer, and EOS."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    answered = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(answered[len(asked) :], add_special_tokens=False)["input_ids"]
    return sorted({each for each in ids if each in tokenizer.all_special_ids} | {tokenizer.eos_token_id})
