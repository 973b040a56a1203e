"""Texts generated for many prompts: in batches of like length, on all processes, exactly one for each prompt."""

from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from hfkit.ranks import is_main, of_all, rank, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    batch_size: int,
    generation: dict[str, Any],
    title: str = "generating",
) -> list[str]:
    """What the model writes after each prompt, in the order of the prompts. Call it on every process.

    The prompts are sorted by length, so that a batch is hardly padded, and dealt to the processes in turn; the padding
    stands on the left, where it does not part a prompt from its continuation.

    Args:
        prompts: token ids; none may be empty.
        generation: arguments of `GenerationConfig`. Greedy where it does not say `do_sample`.
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))[rank() :: world_size()]
    was_training = model.training
    model.eval()
    found: list[tuple[int, str]] = []
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **generation}
    bar = tqdm(total=len(order), desc=title, leave=False, mininterval=1, disable=not is_main())
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = _left_padded([prompts[index] for index in chosen], tokenizer.pad_token_id)
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=True, **options
        )
        new = output if model.config.is_encoder_decoder else output[:, ids.shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        found += zip(chosen, texts, strict=True)
        bar.update(len(chosen))
    bar.close()
    model.train(was_training)
    texts_of = dict(pair for share in of_all("generated", found) for pair in share)
    return [texts_of[index] for index in range(len(prompts))]


def _left_padded(prompts: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, each (batch, longest)."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad_token_id)
    mask = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask
