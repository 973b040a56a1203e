"""What a task finds wrong with data, as problems of the recipe's keys."""

from hfkit.data import corpus
from hfkit.data.corpus import Row
from hfkit.data.tasks.base import Problems, Task
from hfkit.errors import HfkitError, did_you_mean
from hfkit.recipe.fields import ResolvedInput


def check_data(task: Task, data: ResolvedInput) -> Problems:
    """Yield what is wrong with the data of a task. An id on the Hub is looked at when it is read."""
    if problem := corpus.problem_with(data.path):
        yield "data", problem
        return
    columns = columns_of(data)
    if columns is not None:
        yield from _check_columns(task, columns)


def columns_of(data: ResolvedInput) -> dict[str, str] | None:
    """Return the columns of a data set with their kinds, those that its recipe gives it first; None if not known."""
    return getattr(data.recipe, "columns", None) or corpus.columns_of(data.path)


def _check_columns(task: Task, columns: dict[str, str]) -> Problems:
    """Yield names that the data does not have or has of another kind. A text and a label are of one kind on disk."""
    try:
        for name, (key, kind) in task.columns().items():
            if name not in columns:
                yield key, f"the data has no column {name!r}, {did_you_mean(name, columns)}"
            elif (columns[name] == "messages") != (kind == "messages"):
                is_chat = "is a chat" if columns[name] == "messages" else "is no chat"
                yield key, f"the column {name!r} of the data {is_chat}; name another, or choose another task"
    except HfkitError as error:
        yield "prompt", str(error)
    yield from task.column_problems()


def check_answers(task: Task, rows: list[Row], split: str) -> Problems:
    """Yield rows that give nothing to hold a prediction against."""
    blank = [number for number, row in enumerate(rows, 1) if not any(task.references(row))]
    if blank:
        many = f", as in {len(blank)} of {len(rows)} rows" if len(blank) > 1 else ""
        rule = f"row {blank[0]} of the {split} split has no answer{many}; leave such rows out of the data"
        yield task.answer_key, rule


def is_multi_label(task: Task, data: ResolvedInput) -> bool | None:
    """Return whether the rows of a task have lists of classes; None where that is not known before they are read."""
    if not task.has_classes:
        return False
    if data.recipe is None and corpus.problem_with(data.path):
        return None
    kind = (columns_of(data) or {}).get(task.label)
    return None if kind is None else kind in ("labels", "texts")
