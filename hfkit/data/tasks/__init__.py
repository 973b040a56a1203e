"""The tasks, by the name that recipes call them. A new one is a file beside these, and its class in `TASKS`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hfkit.data.tasks.base import Example, Task
from hfkit.data.tasks.chat import Chat
from hfkit.data.tasks.classify import Classify
from hfkit.data.tasks.generate import Generate
from hfkit.data.tasks.text import Text

__all__ = ["TASKS", "Example", "Task", "about_tasks", "task_in", "trained_by"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Text, Generate, Chat, Classify)}


def trained_by(stage: str) -> list[type[Task]]:
    """Return the tasks that a stage trains."""
    return [task for task in TASKS.values() if stage in task.trained_by]


def about_tasks(stage: str) -> str:
    """Return what the tasks of a stage are, for the help of its key."""
    return " ".join(f"{task.name}: {task.about}." for task in trained_by(stage))


def task_in(recipe: Mapping[str, Any]) -> Task:
    """Return the task of a recipe as a manifest keeps it; whole documents where it names none."""
    keys = [field.name for field in dataclasses.fields(Task)]
    return TASKS[recipe.get("task") or "text"](**{key: recipe[key] for key in keys if key in recipe})
