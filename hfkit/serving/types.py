"""What requests may say. A field that is not here is refused by its name; so is one that has no effect here.

The names are those of OpenAI's API (https://platform.openai.com/docs/api-reference). Numbers and lists have limits, so
that no request costs more than it is worth.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

MOST_STOPS, LONGEST_STOP, MOST_CHOICES, MOST_MESSAGES, MOST_INPUTS = 4, 256, 8, 512, 256

# Of OpenAI's API, with the values at which they change nothing. Others are refused: an answer would not be what was
# asked for.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "verbosity": (None,),
    "web_search_options": (None,),
}

HINTS = {"prompt_cache_key", "safety_identifier"}  # of any value; they never change an answer

Text = Annotated[str, StringConstraints(strict=True)]
Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
Stop = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=LONGEST_STOP)]


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character, which no text has; leave it out")
    return text


Prompt = Annotated[Text, pydantic.AfterValidator(_no_nul)]


class Body(BaseModel):
    """A request: closed, and strict about types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        """Take away what changes nothing, and name what would have to and cannot."""
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields or name not in {*WITHOUT_EFFECT, *HINTS}:
                kept[name] = value
            elif name in WITHOUT_EFFECT and not any(_is_same(value, neutral) for neutral in WITHOUT_EFFECT[name]):
                raise _problem(name, f"{name} is not supported here; leave it out")
        return kept


def _is_same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _problem(param: str, message: str) -> PydanticCustomError:
    """Return an error of a parameter that is found out where several are looked at."""
    return PydanticCustomError("unsupported_parameter", "{message}", {"message": message, "param": param})


class StreamOptions(Body):
    include_usage: bool = Field(False, description="Send the number of tokens before the end.")
    include_obfuscation: bool = Field(False, description="Has no effect: nothing is padded.")


class Sampled(Body):
    """What requests for text have in common."""

    model: Name = Field(description="A name of /v1/models.")
    n: int = Field(1, ge=1, le=MOST_CHOICES, description="Answers to the same prompt.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token. By default 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Sample from the likeliest tokens of this probability.")
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="Sample from so many tokens; 0 for all of them.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed gives the same answer.")
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = Field(
        None, description="The answer ends before the first of these."
    )
    stream: bool | None = Field(None, description="Send the answer as it is written, as server-sent events.")
    stream_options: StreamOptions | None = None
    user: Name | None = Field(None, description="Who asks. Only its hash is kept.")
    store: bool | None = Field(None, description="false keeps the texts of this request out of the log.")
    metadata: dict[Name, Annotated[str, StringConstraints(max_length=512)]] | None = Field(None, max_length=16)

    @pydantic.model_validator(mode="after")
    def _options_of_a_stream(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise _problem("stream_options", "stream_options need stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(Sampled):
    """A text to be continued."""

    prompt: Prompt | Annotated[list[int], Field(min_length=1, max_length=1_000_000)] = Field(
        description="A text, or the ids of tokens."
    )
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="Of an answer. By default 16.")
    logprobs: int | None = Field(None, ge=0, le=5, description="So many of the likeliest tokens beside each token.")


class Part(Body):
    """A part of a message. Text alone is understood."""

    type: Literal["text"]
    text: Prompt


class Message(Body):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Prompt | Annotated[list[Part], Field(max_length=64)] | None = None
    name: Name | None = None
    tool_calls: list[dict[str, Any]] | None = Field(None, max_length=64)
    tool_call_id: Name | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""


class ChatRequest(Sampled):
    """A chat to be answered."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="The older name of the next.")
    max_completion_tokens: int | None = Field(
        None, ge=1, le=1_000_000, description="Of an answer. By default what the window leaves."
    )
    logprobs: bool | None = Field(None, description="Tell the log-probability of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="So many of the likeliest tokens beside each.")
    tools: list[dict[str, Any]] | None = Field(None, max_length=128, description="Where the chat template has tools.")

    @pydantic.model_validator(mode="after")
    def _one_with_the_other(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise _problem("top_logprobs", "top_logprobs need logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise _problem("max_tokens", "max_tokens and max_completion_tokens are the same; give one")
        for index, message in enumerate(self.messages):
            if message.role != "assistant" and message.content is None:
                raise _problem(f"messages.{index}.content", "a message of this role needs content")
            if message.tool_calls is not None and message.role != "assistant":
                raise _problem(f"messages.{index}.tool_calls", "only the assistant calls tools")
        if self.messages[-1].role == "assistant":
            raise _problem("messages", "the last message is the assistant's; ask something after it")
        return self


class Inputs(Body):
    """Texts to be turned into numbers."""

    model: Name
    input: (
        Prompt
        | Annotated[list[Prompt], Field(min_length=1, max_length=MOST_INPUTS)]
        | Annotated[list[int], Field(min_length=1, max_length=1_000_000)]
    ) = Field(description="A text, several, or the ids of tokens.")
    user: Name | None = None
    store: bool | None = None

    @property
    def several(self) -> list[Any]:
        is_several = isinstance(self.input, list) and isinstance(self.input[0], str)
        return self.input if is_several else [self.input]  # type: ignore[return-value]


class EmbeddingRequest(Inputs):
    """Texts to be embedded: the mean of the last hidden states over their tokens."""

    encoding_format: Literal["float", "base64"] = "float"


class ClassifyRequest(Inputs):
    """Texts to be classified."""


class FeedbackRequest(Body):
    """What somebody thinks of an answer. Sent again, it takes the place of what was sent before."""

    request_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = Field(
        description="The `id` of the answer."
    )
    rating: Literal[-1, 0, 1] | None = None
    correction: Annotated[Prompt, Field(max_length=100_000)] | None = Field(None, description="The better answer.")
    label: Name | None = Field(None, description="The right label.")
    comment: Annotated[Prompt, Field(max_length=10_000)] | None = None

    @pydantic.model_validator(mode="after")
    def _something(self) -> "FeedbackRequest":
        if all(value is None for value in (self.rating, self.correction, self.label, self.comment)):
            raise _problem("rating", "give a rating, a correction, a label or a comment")
        return self
