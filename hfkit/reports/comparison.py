"""A comparison for a person: on the screen, as Markdown, and as one HTML page with a picture."""

import html
import io
from collections.abc import Callable
from typing import Any

from hfkit.artifacts.manifest import Json
from hfkit.evaluation.comparison import is_better
from hfkit.metrics.catalogue import is_lower_better
from hfkit.reports.markdown import cell, fenced, table

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters": ("parameters", lambda value: f"{value:,}"),
    "size_bytes": ("MB on disk", lambda value: f"{value / 1e6:,.2f}"),
    "memory_bytes": ("MB of memory", lambda value: f"{value / 1e6:,.0f}"),
    "load_seconds": ("s to load", lambda value: f"{value:.2f}"),
    "first_token_seconds": ("ms to first token", lambda value: f"{value * 1e3:,.1f}"),
    "tokens_per_second": ("tokens/s", lambda value: f"{value:,.0f}"),
    "tokens_per_second_batch_8": ("tokens/s, batch 8", lambda value: f"{value:,.0f}"),
    "training_seconds": ("s of training", lambda value: f"{value:,.0f}"),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c2024 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left; white-space: nowrap }
pre { background: #f5f6f7; padding: .7rem; margin: 0; text-align: left }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
td:has(pre) { width: 100% }
.scroll { overflow-x: auto } svg { width: 100%; height: auto } small { color: #666 }
"""


def score_names(row: Json) -> list[str]:
    """Return the scores of a row: what has an interval."""
    return [name for name in row if f"{name}_low" in row and not name.endswith("_difference")]


def cells(results: Json) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table: name, each score with its interval and difference, and the costs."""
    names = score_names(results["models"][0])
    header = ["model", *(name.replace("_", " ") for name in names), *(title for title, _ in COLUMNS.values())]
    rows = []
    for row in results["models"]:
        scores = [_score(row, name) for name in names]
        costs = ["-" if row[key] is None else form(row[key]) for key, (_, form) in COLUMNS.items()]
        rows.append([row["name"] + (" *" if row["name"] in results["undominated"] else ""), *scores, *costs])
    return header, rows


def _score(row: Json, name: str) -> str:
    text = f"{row[name]:.4g} ({row[f'{name}_low']:.4g} to {row[f'{name}_high']:.4g})"
    if f"{name}_difference" in row:
        text += f", {row[f'{name}_difference']:+.3g} (p = {row[f'{name}_p']:.2g})"
    return text


def notes(results: Json, shown: Callable[[str], str] = str) -> list[str]:
    """Return what must be known to read the table; `shown` makes names and marks fit where they stand."""
    quality = results["quality"].replace("_", " ")
    better = "lower" if is_lower_better(results["quality"]) else "higher"
    names, first = shown(", ".join(results["undominated"])), shown(results["models"][0]["name"])
    return [
        f"{shown('*')} Nothing dominates {names}: no other model here is at least as good in {quality} ({better} is "
        f"better), size and speed, and better in one.",
        f"On {results['rows']:,} rows. Scores with their 95 % interval and, after the comma, the difference from "
        f"{first} on the same rows, p from a paired randomisation test. Speeds are those of greedy writing, the "
        f"median of several; each model ran in a process of its own, whose memory is what it took more than at "
        f"its start. Training includes that of the models it was made from.",
        f"The comparison took {results['seconds']:.0f} s, {results['model_seconds']:.0f} s of them the "
        "models themselves.",
    ]


# ---- on the screen


def screen(results: Json) -> str:
    """Return one line a measure and one column a model, which fits where a table of many columns does not."""
    models, lines = results["models"], [""]
    scores = score_names(models[0])
    width = max(14, *(len(row["name"]) + 2 for row in models))
    lines.append(" " * 22 + "".join(f"{row['name']:>{width}}" for row in models))
    for name in scores:
        lines.append(f"  {name:<20}" + "".join(f"{row[name]:>{width}.4g}" for row in models))
        if any(f"{name}_p" in row for row in models):
            tested = [f"{row[f'{name}_difference']:+.3g}" if f"{name}_p" in row else "" for row in models]
            lines.append(f"  {'  over the first':<20}" + "".join(f"{text:>{width}}" for text in tested))
    known = {key: value for key, value in COLUMNS.items() if any(row[key] is not None for row in models)}
    for key, (title, form) in known.items():
        values = ["-" if row[key] is None else form(row[key]) for row in models]
        lines.append(f"  {title:<20}" + "".join(f"{value:>{width}}" for value in values))
    return "\n".join([*lines, ""])


# ---- as Markdown


def markdown(results: Json, title: str) -> str:
    header, rows = cells(results)
    parts = [
        f"# {cell(title)}",
        table(header, [[cell(value) for value in row] for row in rows]),
        *notes(results, cell),
    ]
    samples = _samples(results)
    if samples:
        parts.append("## What they write\n\nThe same prompts, greedily; `>>>` is where a model goes on.")
    for prompt, texts in samples:
        parts += [
            fenced(f"{prompt} >>>", "text"),
            *(f"{cell(name)}\n\n{fenced(text, 'text')}" for name, text in texts),
        ]
    return "\n\n".join([*parts, fenced("\n".join(results["signatures"]))]) + "\n"


def _samples(results: Json) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return, of each prompt, what every model writes after it."""
    prompts = [prompt for prompt, _ in results["models"][0]["samples"]]
    return [
        (prompt, [(row["name"], row["samples"][index][1]) for row in results["models"]])
        for index, prompt in enumerate(prompts)
    ]


# ---- as one page


def page(results: Json, title: str) -> str:
    """Return HTML that needs no other file and loads nothing."""
    header, rows = cells(results)
    head = "".join(f"<th>{html.escape(value)}</th>" for value in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row) + "</tr>" for row in rows)
    parts = [f"<h1>{html.escape(title)}</h1>", picture(results)]
    parts += [f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>']
    parts += [f"<p><small>{html.escape(note)}</small></p>" for note in notes(results)]
    for prompt, texts in _samples(results):
        lines = "".join(
            f"<tr><td>{html.escape(name)}</td><td><pre>{html.escape(text)}</pre></td></tr>" for name, text in texts
        )
        parts.append(f"<h3>After</h3><pre>{html.escape(prompt)}</pre><table>{lines}</table>")
    parts.append(f"<p><small>{'<br>'.join(map(html.escape, results['signatures']))}</small></p>")
    start = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{start}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def picture(results: Json) -> str:
    """Plot quality against size and against speed, as SVG; a line joins the models that no other is better than in
    both."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    quality = results["quality"]
    lower, labels = is_lower_better(quality), []
    for number, (key, label, factor) in enumerate(
        (("size_bytes", "MB on disk", 1e-6), ("tokens_per_second", "tokens/s", 1.0))
    ):
        axes = figure.add_subplot(1, 2, number + 1)
        points = [(row[key] * factor, row[quality], row["name"]) for row in results["models"] if row[key]]
        front = sorted(_front(points, smaller_is_better=key == "size_bytes", lower_is_better=lower))
        axes.plot([x for x, *_ in front], [y for _, y, *_ in front], color="#bbb", linewidth=1, zorder=1)
        for x, y, name in points:
            axes.scatter(x, y, color="#0b6e99" if (x, y, name) in front else "#999", s=36, zorder=2)
        axes.set(xlabel=label, ylabel=f"{quality.replace('_', ' ')} ({'lower' if lower else 'higher'} is better)")
        axes.margins(0.2)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        labels.append([_label(axes, *point) for point in sorted(points, key=lambda point: point[1])])
    figure.draw_without_rendering()  # from here on places are known
    for of_axes in labels:
        _part(of_axes)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hfkit"}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


def _label(axes: Any, x: float, y: float, name: str) -> Any:
    return axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, 5), fontsize=9, parse_math=False)


def _part(labels: list[Any]) -> None:
    """Move each label up until it covers neither a point nor a label before it."""
    from matplotlib.transforms import Bbox

    positions = [label.axes.transData.transform(label.xy) for label in labels]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in positions]
    for label in labels:
        while any(label.get_window_extent().overlaps(box) for box in taken):
            label.xyann = (label.xyann[0], label.xyann[1] + 1)
        taken.append(label.get_window_extent())


def _front(
    points: list[tuple[float, float, str]], smaller_is_better: bool, lower_is_better: bool
) -> list[tuple[float, float, str]]:
    """Return the points that no other is at least as good as in both, and better in one."""

    def as_gain(point: tuple[float, float, str]) -> tuple[float, float]:
        return (-point[0] if smaller_is_better else point[0]), (-point[1] if lower_is_better else point[1])

    return [point for point in points if not any(is_better(as_gain(other), as_gain(point)) for other in points)]
