"""Texts generated for many prompts, on all processes, exactly one for each prompt."""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers import (
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from hfkit.data.chat import generation_ids
from hfkit.data.corpus import Row
from hfkit.data.tasks import Task
from hfkit.errors import HfkitError
from hfkit.inference.batches import Results, dealt, in_batches, padded
from hfkit.inference.decoding import Rules, decode
from hfkit.model.modeling_hfkit import CACHE
from hfkit.recipe.fields import Arguments

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

NEW_TOKENS = 64
# What the loop knows of a GenerationConfig, and with which values other options change nothing.
KNOWN = {"max_new_tokens", "max_length", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p",
         "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}  # fmt: skip
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
           "min_length": 0, "typical_p": 1.0, "use_cache": True}  # fmt: skip


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    batch_size: int,
    generation: Arguments,
    title: str = "generating",
) -> list[str]:
    """What the model writes after each prompt, in the order of the prompts. Call it on every process.

    Plain decoders go through the loop of `decoding`, which keeps its batch full; other models, and options that the
    loop does not know, through `model.generate` in batches of like length. The texts are the same.

    Args:
        prompts: token ids; none may be empty.
        generation: arguments of `GenerationConfig`. Greedy where it does not say `do_sample`.
    """
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **generation}
    if model.generation_config.eos_token_id is None:
        options = {**generation_ids(tokenizer, is_chat=False), **options}
    decoder, rules = plain_decoder(model), rules_of(model, options)

    def of_batch(chosen: list[int]) -> list[str]:
        # Padding does not part a decoder's prompt from its continuation, and moves no token of an encoder.
        side = "right" if model.config.is_encoder_decoder else "left"
        ids, mask = padded([prompts[index] for index in chosen], tokenizer.pad_token_id, side)
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=True, **options
        )
        new = output if model.config.is_encoder_decoder else output[:, ids.shape[1] :]
        return tokenizer.batch_decode(new, skip_special_tokens=True)

    if decoder is None or rules is None:
        return in_batches(model, prompts, of_batch, batch_size, title)

    def of_rows(order: list[int]) -> Results:
        for place, ids in decode(decoder, [prompts[index] for index in order], rules, batch_size):
            yield order[place], tokenizer.decode(ids, skip_special_tokens=True)

    return dealt(model, prompts, of_rows, title)


def plain_decoder(model: "PreTrainedModel") -> Any:
    """The model that the loop can call, without the wrapper of a LoRA adapter; None where only `generate` will do.

    It must be fed and cached as `GenerationMixin` feeds and caches a plain decoder: token ids, mask and positions, and
    the keys and values of all tokens in every layer. That leaves out encoder-decoders, sliding windows, states instead
    of keys, and models whose own code prepares their inputs.
    """
    if not isinstance(model, PreTrainedModel):  # an adapter on one
        from peft import PeftType

        adapter = model.active_peft_config
        if adapter.peft_type != PeftType.LORA or adapter.alora_invocation_tokens:
            return None
        model = model.get_base_model()
    kind = type(model)
    if (
        model.config.is_encoder_decoder
        or kind.generate is not GenerationMixin.generate
        or kind.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
        or not kind._can_compile_fullgraph  # those that do take any cache, and a mask over keys to come
        or not {"position_ids", CACHE, "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys()
    ):
        return None
    layers = DynamicCache(config=model.config).layers
    return model if all(type(layer) is DynamicLayer for layer in layers) else None


def rules_of(model: "PreTrainedModel", generation: Arguments) -> Rules | None:
    """The rules by which `model.generate(**generation)` would go; None where the loop does not know them all."""
    config = copy.deepcopy(model.generation_config)
    for name, value in {"temperature": 1.0, "top_k": 50, "top_p": 1.0}.items():  # of `generate`
        if getattr(config, name) is None:
            setattr(config, name, value)
    left_over = config.update(**generation)
    told = {name: value for name, value in config.to_diff_dict().items() if value is not None and value is not False}
    unknown = [name for name, value in told.items() if name not in KNOWN and NEUTRAL.get(name) != value]
    if left_over or unknown or config.max_new_tokens is None is config.max_length:
        return None
    ends = config.eos_token_id
    return Rules(
        warpers=_warpers(config) if config.do_sample else None,
        ends=[] if ends is None else [ends] if isinstance(ends, int) else list(ends),
        max_new_tokens=config.max_new_tokens,
        max_length=config.max_length,
        min_new_tokens=config.min_new_tokens or 0,
        pad_token_id=config.pad_token_id or 0,
    )


def _warpers(config: "GenerationConfig") -> list[Any]:
    """What changes the logits that are sampled from, in the order of `generate`."""
    warpers: list[Any] = []
    if config.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers


def answers(
    task: Task,
    rows: list[Row],
    generation: Arguments,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    window: int,
) -> list[str]:
    """What the model answers to each row of a task; nothing where the prompt has no room. Call it on every process.

    Args:
        generation: arguments of `GenerationConfig`, see `generation_of`.
        window: tokens that prompt and answer have together.
    """
    generation = generation_of(task, generation, tokenizer, window)
    room = window - generation["max_new_tokens"]
    prompts = [task.prompt_ids(row, tokenizer, room, model.config.is_encoder_decoder)[0] for row in rows]
    return write(model, tokenizer, prompts, batch_size, generation)


@contextlib.contextmanager
def generating_with(model: "PreTrainedModel", config: "GenerationConfig") -> Iterator[None]:
    """Let `model.generate` know of no other configuration while inside: what is left open it takes from there."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def generation_of(task: Task, generation: Arguments, tokenizer: "PreTrainedTokenizerBase", window: int) -> Arguments:
    """What `generation:` of a recipe says; where it does not, how much is written and where a chat's answer ends."""
    ends = generation_ids(tokenizer, is_chat=True) if task.is_chat else {}
    return {**ends, "max_new_tokens": min(NEW_TOKENS, window // 2), **generation}


def write(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    batch_size: int,
    generation: Arguments,
) -> list[str]:
    """`generate`, without the space around a text, and with nothing for a prompt that is empty."""
    kept = [index for index, prompt in enumerate(prompts) if prompt]
    found = generate(model, tokenizer, [prompts[index] for index in kept], batch_size, generation)
    texts = dict(zip(kept, found, strict=True))
    return [texts.get(index, "").strip() for index in range(len(prompts))]


def prompts_of(
    task: Task,
    rows: list[Row],
    tokenizer: "PreTrainedTokenizerBase",
    window: int,
    generation: Arguments,
    is_encoder_decoder: bool,
) -> list[tuple[list[int], bool]]:
    """Of each row the prompt, and whether some of it was cut off. Encoder-decoders have a window for either side.

    Raises:
        HfkitError: if there is no room for any of them.
    """
    room = window if is_encoder_decoder else window - generation["max_new_tokens"]
    found = [task.prompt_ids(row, tokenizer, room, is_encoder_decoder) for row in rows]
    if rows and not any(ids for ids, _ in found):
        told = (
            f"the answer may have {generation['max_new_tokens']} of {window} tokens, and no prompt fits into the rest"
        )
        raise HfkitError(f"generation.max_new_tokens: {told}; lower it, or give shorter rows")
    return found
