"""Texts generated for many prompts: in batches of like length, on all processes, exactly one for each prompt."""

from typing import TYPE_CHECKING, Any

from hfkit.evaluation.batches import in_batches, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
