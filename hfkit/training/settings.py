"""The recipe keys that every training shares. It imports nothing heavy: recipes are checked before torch is loaded."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer

from hfkit.artifacts.manifest import Json
from hfkit.recipe.fields import RecipePart, Section

# The fields of TrainingArguments that hfkit sets itself, or that would break what it promises.
TRAIN = Section(
    "transformers.TrainingArguments",
    (
        ("output_dir", "it is the recipe's output_dir"),
        ("push_to_hub", "a finished folder is pushed, never a running one"),
        ("hub_token", "a token never stands in a file; it comes from the environment"),
        ("resume_from_checkpoint", "an unfinished run is resumed by running it again"),
        ("enable_jit_checkpoint", "every run commits a checkpoint on SIGTERM"),
        ("save_only_model", "a checkpoint without the optimizer cannot go on"),
        ("ignore_data_skip", "a resumed run goes on with the row it was at"),
        ("auto_find_batch_size", "it would change the batch size unseen; set per_device_train_batch_size"),
        ("logging_nan_inf_filter", "bad steps are left out and told, see bad_steps"),
        ("restore_callback_states_from_checkpoint", "a resumed run goes on where it was"),
    ),
)


class BadSteps(RecipePart):
    """What to do about a step whose numbers are bad. A step with a loss or gradient norm that is not finite never
    reaches the weights."""

    stop_after: int = Field(10, ge=1, description="Stop the run after this many bad steps in a row.")
    spike_sigma: float | None = Field(
        None,
        gt=0,
        description="Also leave a step out whose gradient norm is more than this many standard deviations above the "
        "mean of the last 100 good steps.",
    )


class Optimizer(RecipePart):
    """What updates the weights. `train.learning_rate` and its schedule are for all of them; the rates here begin
    elsewhere and follow the same schedule."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the hidden matrices, AdamW for embeddings, output head and vectors."
    )
    embedding_learning_rate: float | None = Field(
        None, gt=0, description="Learning rate of the embeddings. By default train.learning_rate."
    )
    head_learning_rate: float | None = Field(
        None, gt=0, description="Learning rate of an output head that is not tied. By default train.learning_rate."
    )

    @model_serializer(mode="wrap")
    def _short(self, plain: SerializerFunctionWrapHandler) -> str | Json:
        """Return the name alone where nothing else is set, as a recipe may write it."""
        values = {key: value for key, value in plain(self).items() if value is not None}
        return values if len(values) > 1 else self.name


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class _OrName:
    """Says in the JSON schema that the name alone will do."""

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [handler(core_schema), {"enum": ["adamw", "muon"], "type": "string"}]}


# `optimizer: muon` is short for `optimizer: {name: muon}`.
AnyOptimizer = Annotated[Optimizer, BeforeValidator(_by_name), _OrName()]
