"""What a new language model is shown by: how it goes on with prompts, and the peer of its bits per byte."""

import itertools
import lzma
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hfkit.data import corpus

XZ_LIMIT_BYTES = 4_000_000
PROMPT_TOKENS, NEW_TOKENS = 12, 60


def xz_bits_per_byte(data: str) -> float | None:
    """Return what `xz -9e` needs for the test split: a peer that everyone has. None for a text that would take it
    minutes."""
    text = "".join(corpus.texts(data, "test")).encode()
    if len(text) > XZ_LIMIT_BYTES:
        return None
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def continuations(folder: Path, device: torch.device, prompts: list[str] | None, data: str) -> list[tuple[str, str]]:
    """Return pairs of prompts, by default the beginnings of three test documents, and how the saved model goes on,
    with a fixed seed.

    The model is loaded from the folder as its users will load it.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    if prompts is None:
        beginnings = [tokenizer.tokenize(text[:500]) for text in itertools.islice(corpus.texts(data, "test"), 3)]
        prompts = [tokenizer.convert_tokens_to_string(tokens[:PROMPT_TOKENS]) for tokens in beginnings]
    set_seed(0)
    pairs = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        length = inputs["input_ids"].shape[1]
        room = model.config.max_position_embeddings - length
        output = model.generate(
            **inputs, max_new_tokens=min(NEW_TOKENS, room), do_sample=True, temperature=0.8, top_k=50
        )
        pairs.append((prompt, tokenizer.decode(output[0, length:], skip_special_tokens=True)))
    return pairs
