"""The recipe keys that describe a task."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hfkit.data.tasks import TASKS, Task, about_tasks, trained_by
from hfkit.recipe.fields import StageRecipe

if TYPE_CHECKING:
    TaskName = str
    FinetunedTask = str
    DistilledTask = str
else:
    TaskName = Literal[tuple(TASKS)]
    FinetunedTask = Literal[tuple(task.name for task in trained_by("finetune"))]
    DistilledTask = Literal[tuple(task.name for task in trained_by("distill"))]


class TaskRecipe(StageRecipe):
    """The keys that describe a task. `prompt` and `completion` are templates: `{column}` is a column of the data."""

    task: TaskName = Field(description=about_tasks("finetune"))
    prompt: str | None = Field(
        None,
        min_length=1,
        description="Template of the prompt, or of the text to classify. By default {prompt} or {text}.",
    )
    completion: str = Field("{completion}", min_length=1, description="Template of what is to be generated.")
    messages: str = Field("messages", description="Column with the chat.")
    tools: str = Field("tools", description="Column with the tools of a chat, as JSON schemas, if the data has it.")
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="How a chat becomes text: plain, chatml, a file, or the template. By default the tokenizer's own.",
    )
    label: str = Field("label", description="Column with the class, or with a list of classes (multi-label).")

    def as_task(self) -> Task:
        """Return the task that the keys describe."""
        return TASKS[self.task](
            self.prompt, self.completion, self.messages, self.tools, self.chat_template, self.label
        )
