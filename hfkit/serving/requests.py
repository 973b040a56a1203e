"""From a request to what the engine takes: which model, which tokens, which rules. And what is wrong with it."""

import hashlib
import re
import secrets
from typing import Any, TypeVar

import pydantic

from hfkit.errors import HfkitError, did_you_mean
from hfkit.inference.sampling import Sampling
from hfkit.serving.errors import ApiError
from hfkit.serving.models import Served
from hfkit.serving.types import Body, ChatRequest, CompletionRequest, Sampled

Parsed = TypeVar("Parsed", bound=Body)
# Of a union, what pydantic puts into the place of an error: no parameter is called so.
_BRANCH = re.compile(r"\W|^(str|int|float|bool|list|dict|Part)$")
COMPLETION_TOKENS = 16  # of a completion that does not say; so it is with OpenAI


def parse(kind: type[Parsed], body: bytes, content_type: str) -> Parsed:
    """Read a body.

    Raises:
        ApiError: that names the first parameter that is wrong, and the rule.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: send the header `Content-Type: application/json`")
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as errors:
        error = max(errors.errors(include_url=False, include_input=False), key=lambda error: _depth(error))
        param = (error.get("ctx") or {}).get("param") or _path(error["loc"])
        if error["type"] == "json_invalid":
            raise ApiError(400, f"the body is no JSON: {error['msg'].removeprefix('Invalid JSON: ')}") from None
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            hint = did_you_mean(str(error["loc"][-1])[:64], kind.model_fields)
            message = f"there is no such parameter, {hint}" if len(error["loc"]) == 1 else "there is no such parameter"
        code = "unsupported_parameter" if error["type"] in ("unsupported_parameter", "extra_forbidden") else None
        text = message if message.startswith(f"{param} ") else f"{param}: {message}" if param else message
        raise ApiError(400, text[:2000], param[:256] or None, code or "invalid_value") from None


def _path(places: tuple[int | str, ...]) -> str:
    return ".".join(str(place) for place in places if not _BRANCH.search(str(place)))


def _depth(error: Any) -> tuple[bool, int]:
    """Of several errors that which is furthest inside says most: what a union tried first is seldom meant."""
    return error["type"] == "unsupported_parameter", len(error["loc"])


def choose_model(
    models: dict[str, Served], shares: dict[str, float], name: str, user: str
) -> tuple[Served, str | None]:
    """Return the model that answers, and its name if a share of the first one's requests goes there.

    Raises:
        ApiError: if there is no such model.
    """
    if name not in models:
        message = f"model: there is no {name[:64]!r} here; there is {', '.join(models)}"
        raise ApiError(404, message, "model", "model_not_found")
    if name == next(iter(models)) and shares:
        place = int.from_bytes(hashlib.sha256(f"share {user}".encode()).digest()[:8], "big") / 2**64
        for other, share in shares.items():
            if place < share:
                return models[other], other
            place -= share
    return models[name], None


def prompt_of(served: Served, body: Sampled) -> list[int]:
    """Return the tokens that a model reads.

    Raises:
        ApiError: if the model cannot answer such a request, or the prompt does not fit.
    """
    if served.kind == "classify":
        raise ApiError(400, f"{served.name} gives classes, not text: ask /v1/classify", "model", "unsupported_model")
    if isinstance(body, ChatRequest):
        return _chat_prompt(served, body)
    assert isinstance(body, CompletionRequest)
    if isinstance(body.prompt, list):
        size = len(served.tokenizer)
        if not all(0 <= token < size for token in body.prompt):
            raise ApiError(400, f"prompt: token ids are from 0 to {size - 1}", "prompt", "invalid_value")
        return body.prompt
    ids = served.ids_of_text(body.prompt)
    if not ids:
        raise ApiError(400, "prompt: is empty, and the model has no token to begin with", "prompt", "invalid_value")
    return ids


def _chat_prompt(served: Served, body: ChatRequest) -> list[int]:
    if served.chat_problem is not None:
        message = f"{served.name} cannot answer chats: {served.chat_problem}; ask /v1/completions"
        raise ApiError(400, message, "model", "unsupported_model")
    template = str(served.tokenizer.chat_template)
    turns = [
        {"role": message.role, "content": message.text}
        | ({"tool_calls": message.tool_calls} if message.tool_calls else {})
        for message in body.messages
    ]
    if body.tools and not re.search(r"\btools\b", template):
        raise ApiError(400, f"tools: the chat template of {served.name} has none", "tools", "unsupported_parameter")
    try:
        return served.ids_of_chat(turns, body.tools or None)
    except HfkitError as error:
        raise ApiError(400, str(error), "messages", "invalid_value") from None


def room_of(served: Served, prompt: list[int], body: Sampled, most: int) -> int:
    """Return how many tokens an answer may have.

    Args:
        most: tokens of an answer that the server allows.

    Raises:
        ApiError: if prompt and answer do not fit into the window together.
    """
    name, asked = "max_tokens", getattr(body, "max_tokens", None)
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        name, asked = "max_completion_tokens", body.max_completion_tokens
    is_apart = served.model.config.is_encoder_decoder  # prompt and answer have a window each
    left = served.window if is_apart else served.window - len(prompt)
    if len(prompt) > served.window or left < 1:
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        message = f"{param}: {len(prompt)} tokens, and {served.name} takes {served.window} with the answer; shorten it"
        raise ApiError(400, message, param, "context_length_exceeded")
    if asked is not None and asked > min(left, most):
        why = f"the server allows {most}" if most < left else f"{len(prompt)} of {served.window} are the prompt's"
        raise ApiError(400, f"{name}: {asked} is more than {min(left, most)}: {why}", name, "context_length_exceeded")
    if asked is None:
        asked = COMPLETION_TOKENS if isinstance(body, CompletionRequest) else left
    return min(asked, left, most)


def sampling_of(body: Sampled, defaults: Sampling) -> Sampling:
    """Return the rules of a request; where it says nothing, those of the server."""
    return Sampling(
        defaults.temperature if body.temperature is None else body.temperature,
        defaults.top_p if body.top_p is None else body.top_p,
        defaults.top_k if body.top_k is None else body.top_k,
    )


def seed_of(seed: int | None) -> int:
    """Return the seed that was asked for, or one of chance."""
    return secrets.randbits(63) if seed is None else seed
