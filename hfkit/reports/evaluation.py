"""An evaluation for a person: on the screen, and in the card of its folder."""

from typing import NamedTuple

from hfkit.artifacts.manifest import Json, Manifest, Metrics
from hfkit.metrics.scoring import best_worst_random
from hfkit.reports.markdown import cell, fenced, number, table

SHOWN_CLASSES = 10
SHOWN_CHARACTERS = 400
SHOWN_REFERENCES = 3
SUFFIXES = ("_low", "_high", "_difference", "_p")


class Score(NamedTuple):
    """A score with its 95 % interval; against another model also what it has over it, and how likely chance is."""

    name: str
    value: float
    interval: tuple[float, float] | None
    difference: tuple[float, float, float] | None
    p_value: float | None


def scores_of(results: Metrics) -> list[Score]:
    """Return the scores in the `metrics.json` of an evaluation; those of benchmarks have a slash in their names."""
    scores = []
    for name, value in results.items():
        if f"{name}_low" in results and not name.endswith("_difference"):
            interval = results[f"{name}_low"], results[f"{name}_high"]
        elif "/" in name and not name.endswith(SUFFIXES):
            interval = None
        else:
            continue
        of_difference = [results.get(f"{name}_difference{end}") for end in ("", "_low", "_high")]
        difference = None if None in of_difference else tuple(of_difference)
        scores.append(Score(name, value, interval, difference, results.get(f"{name}_p")))  # type: ignore[arg-type]
    return scores


def worst_classes(results: Metrics) -> list[tuple[str, float, int]]:
    """Return name, F1 and number of rows of the classes that are told worst."""
    rows = results.get("rows_per_label")
    if rows is None:
        rows = dict(zip(results["confusion"]["labels"], map(sum, results["confusion"]["counts"]), strict=True))
    order = sorted(results["f1_per_label"].items(), key=lambda item: item[1])
    return [(label, value, rows[label]) for label, value in order[:SHOWN_CLASSES]]


def confusions(results: Metrics) -> list[tuple[str, str, int]]:
    """Return class, what it was taken for, and how often, the most frequent first; none where rows have several
    classes."""
    confusion = results.get("confusion", {"labels": [], "counts": []})
    mistakes = [
        (label, other, count)
        for label, row in zip(confusion["labels"], confusion["counts"], strict=True)
        for other, count in zip(confusion["labels"], row, strict=True)
        if count and label != other
    ]
    return sorted(mistakes, key=lambda mistake: -mistake[2])[:SHOWN_CLASSES]


def _in_text(answer: str | list[str]) -> str:
    return answer if isinstance(answer, str) else ", ".join(answer) or "no class"


def _expected(row: Json) -> list[str]:
    """Return what is right for a row, each of several texts; a list of classes is one answer."""
    return row["references"] if isinstance(row["prediction"], str) else [_in_text(row["references"])]


# ---- on the screen


def screen(results: Metrics, predictions: list[Json]) -> str:
    lines = [""]
    width = max((len(score.name) for score in scores_of(results)), default=0)
    for score in scores_of(results):
        line = f"  {score.name:<{width}} {score.value:10.4g}"
        if score.interval is not None:
            line += f"   95 % {score.interval[0]:.4g} to {score.interval[1]:.4g}"
        if score.difference is not None:
            line += f"   {score.difference[0]:+.4g} over the other, p = {score.p_value:.3g}"
        lines.append(line)
    if len(results.get("f1_per_label", {})) > 2:
        lines += ["", "  worst classes by F1"]
        lines += [f"    {value:6.3f}  {label} ({rows} rows)" for label, value, rows in worst_classes(results)]
        lines += ["  most frequent confusions"] if "confusion" in results else []
        lines += [f"    {count:6}  {label} taken for {other}" for label, other, count in confusions(results)]
    if predictions and (key := next(iter(predictions[0]["scores"]), None)):
        lines.append("")
        for kind, rows in best_worst_random(predictions, key).items():
            for row in rows:
                prediction, expected = repr(_in_text(row["prediction"])[:100]), repr(_expected(row)[0][:100])
                lines.append(f"  {kind:<7} {key} {row['scores'][key]:.3g}: {prediction}, expected {expected}")
    return "\n".join([*lines, "", *(f"  {signature}" for signature in results["signatures"])])


# ---- in the card


def card(content: Manifest, predictions: list[Json]) -> str:
    """Return the card's part on what was evaluated, the scores, the answers and how they were scored.

    Args:
        content: of the manifest (`runner._content`), with metrics.
        predictions: the lines of `predictions.jsonl`.
    """
    results, recipe = content["metrics"], content["recipe"]
    parts = [_what(content), "## Results", _score_table(results)]
    if results.get("f1_per_label"):
        parts += ["## Classes", *_classes(results)]
    if predictions and (key := next(iter(predictions[0]["scores"]), None)):
        parts += [f"## Answers\n\nBy `{key}`. All are in `predictions.jsonl`."]
        for kind, rows in best_worst_random(predictions, key).items():
            parts += [f"### {kind.capitalize()}", *(_answer(row, key) for row in rows)]
    if results["signatures"]:
        cut = f" `limit: {recipe['limit']}` took the first rows only." if recipe["limit"] is not None else ""
        parts += [
            f"## How it was scored\n\nQuote a score with its signature.{cut}",
            fenced("\n".join(results["signatures"])),
        ]
    return "\n\n".join(parts)


def _what(content: Manifest) -> str:
    recipe, results = content["recipe"], content["metrics"]
    paths = {key: f"`{entry['place']}`" for key, entry in content["inputs"].items()}
    text = f"The model {paths['model']}"
    if "data" in paths:
        rows = f"{results['rows']:,} rows of the {recipe['split']} split of {paths['data']}"
        text += f" on {rows} (`task: {recipe['task']}`)"
    if recipe["benchmarks"]:
        text += f", {'and ' if 'data' in paths else ''}on {', '.join(f'`{name}`' for name in recipe['benchmarks'])}"
    text += f", beside {paths['against']} on the same rows." if "against" in paths else "."
    if results["cut"]:
        text += (
            f" The prompts of {results['cut']:,} rows were cut to fit into a window of {results['window']:,} tokens."
        )
    return text


def _score_table(results: Metrics) -> str:
    scores = scores_of(results)
    is_compared = any(score.difference is not None for score in scores)
    header = ["score", "value", "95 % interval", *(["difference", "95 % interval", "p"] if is_compared else [])]
    rows = []
    for score in scores:
        row = [f"`{score.name}`", number(score.value), _interval(score.interval)]
        if is_compared and score.difference is not None and score.p_value is not None:
            row += [f"{score.difference[0]:+.4g}", _interval(score.difference[1:]), f"{score.p_value:.3g}"]
        elif is_compared:
            row += ["", "", ""]
        rows.append(row)
    notes = "Intervals are from resampled rows (bootstrap), those of benchmarks from standard errors."
    if is_compared:
        notes += " The difference is this model's score less the other's; p is from a paired randomisation test."
    return f"{table(header, rows)}\n\n{notes}"


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{number(bounds[0])} to {number(bounds[1])}"


def _classes(results: Metrics) -> list[str]:
    classes = [[cell(label), number(value), number(rows)] for label, value, rows in worst_classes(results)]
    parts = [table(["worst classes", "F1", "rows"], classes)]
    if mistakes := confusions(results):
        rows = [[cell(label), cell(other), number(count)] for label, other, count in mistakes]
        parts.append(table(["class", "taken for", "rows"], rows))
    also = ", and `confusion` with what each was taken for" if "confusion" in results else ""
    return [*parts, f"All classes are in `metrics.json`: `f1_per_label`{also}."]


def _answer(row: Json, key: str) -> str:
    """Return the end of the prompt, which is next to the answer, and the beginnings of the others."""
    prompt = row["prompt"]
    parts = [("prompt", f"{'...' if len(prompt) > SHOWN_CHARACTERS else ''}{prompt[-SHOWN_CHARACTERS:]}")]
    parts += [("answer", _beginning(_in_text(row["prediction"])))]
    parts += [("expected", _beginning(reference)) for reference in _expected(row)[:SHOWN_REFERENCES]]
    text = "\n".join(f"[{name}]\n{value.strip()}" for name, value in parts)
    return f"`{key}` {number(row['scores'][key])}\n\n{fenced(text, 'text')}"


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
