"""The page of a sweep: its table, its trials as lines across the searched flags (parallel coordinates), and their curves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rayalign.report.charts import Colour, Point, Series, format_number, is_drawable, line_chart
from rayalign.report.markup import section, table
from rayalign.report.page import html_page

WIDTH, HEIGHT, SIDE, TOP, BOTTOM = 900.0, 300.0, 70.0, 40.0, 16.0
LOG_FROM = 20
"""Numbers above 0 of which the highest is so many times the lowest are drawn on a logarithmic scale."""

MOST_CURVES = 10

COLOURS: Mapping[str, Colour] = {"finished": "grey", "stopped": "orange", "best": "blue"}
WORDS = {"best": "the best", "finished": "finished", "stopped": "stopped or failed"}


@dataclass(frozen=True)
class DrawnTrial:
    """A trial as the page draws it: its name, the values of its flags, the metric at its end and at each evaluation."""

    name: str
    state: str
    flags: Mapping[str, Any]
    value: float | None
    points: Sequence[Point]

    def kind(self, best: "DrawnTrial") -> str:
        """What decides its colour."""
        if self is best:
            return "best"
        return "finished" if self.state == "finished" else "stopped"


def render_sweep(
    *, title: str, metric: str, words: str, heads: Sequence[str], rows: Sequence[Sequence[str]], trials: Sequence[DrawnTrial]
) -> str:
    """The page as a string. `heads` and `rows` are the table, `trials` the best first, `words` what is said above all."""
    curves = [
        Series(
            trial.name.partition(" (")[0],
            trial.points,
            COLOURS[trial.kind(trials[0])],
            "marked" if trial is trials[0] else "thin",
        )
        for trial in trials[:MOST_CURVES]
    ]
    first = f"The best {MOST_CURVES} trials." if len(trials) > MOST_CURVES else ""
    chart = line_chart(metric, curves, x_label="step")
    body = [
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(words)}</p></header>',
        section("Settings, best first", "", table(heads, rows)),
        parallel_section(trials, metric),
        section("Evaluations", first, f'<div class="charts">{chart}</div>') if chart else "",
    ]
    return html_page(title, body)


def parallel_section(trials: Sequence[DrawnTrial], metric: str) -> str:
    """A line for each trial that has the metric, across an axis for each flag that differs; empty where there is nothing to
    compare."""
    drawn = [trial for trial in trials if trial.value is not None and is_drawable(trial.value)]
    names = list(dict.fromkeys(name for trial in drawn for name in trial.flags))
    columns = {name: [trial.flags.get(name) for trial in drawn] for name in names}
    axes = {name: places(values) for name, values in columns.items() if len({str(value) for value in values}) > 1}
    if not axes or len(drawn) < 2:
        return ""
    values = {**columns, metric: [trial.value for trial in drawn]}
    axes[metric] = places(values[metric])
    gap = (WIDTH - 2 * SIDE) / (len(axes) - 1)
    parts, labels = [], []
    for k, (name, heights) in enumerate(axes.items()):
        x = SIDE + k * gap
        parts.append(f'<path class="mark" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="label middle" x="{x:.1f}" y="14">{escape(name)}</text>')
        css, beside = ("tick end", x - 6) if k == 0 else ("tick", x + 6)  # lines leave the first axis to the right
        for words, height in _labels(values[name], heights):
            labels.append(f'<text class="{css}" x="{beside:.1f}" y="{_top(height) + 3.5:.1f}">{escape(words)}</text>')
    for index, trial in reversed(list(enumerate(drawn))):
        kind = trial.kind(trials[0])
        corners = [f"{SIDE + k * gap:.1f} {_top(heights[index]):.1f}" for k, heights in enumerate(axes.values())]
        stroke = "marked" if kind == "best" else "thin"
        hover = f"{trial.name}\n{metric} {format_number(trial.value or 0.0)}"
        parts.append(
            f'<path class="line {stroke} {COLOURS[kind]}" d="M{"L".join(corners)}"><title>{escape(hover)}</title></path>'
        )
    shapes = "".join([*parts, *labels])
    picture = f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="Trials across flags">{shapes}</svg>'
    kinds = dict.fromkeys(trial.kind(trials[0]) for trial in drawn)
    signs = [
        f'<span><svg class="key {COLOURS[kind]}" viewBox="0 0 18 12" aria-hidden="true">'
        f'<path class="line thin {COLOURS[kind]}" d="M0 6H18"/></svg>{WORDS[kind]}</span>'
        for kind in kinds
    ]
    caption = f'<figcaption><span class="legend">{"".join(signs)}</span></figcaption>'
    lead = "Each line is a trial: its value of each flag, and what came of it."
    return section("Across the flags", lead, f'<figure class="chart">{caption}{picture}</figure>')


def places(values: Sequence[Any]) -> list[float]:
    """A height from 0 to 1 for each value: numbers by their size (by their logarithm over a wide range), others at equal
    distances in the order of their appearance; None is below all."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < sum(value is not None for value in values):
        kinds = list(dict.fromkeys(map(str, values)))
        return [(kinds.index(str(value)) + 0.5) / len(kinds) for value in values]
    is_log = min(numbers) > 0 and max(numbers) >= LOG_FROM * min(numbers)
    scaled = [None if value is None else math.log(value) if is_log else float(value) for value in values]
    known = [value for value in scaled if value is not None]
    low, span = min(known), max(known) - min(known)
    floor = 0.1 if len(known) < len(scaled) else 0.0
    return [0.0 if v is None else floor + (1 - floor) * ((v - low) / span if span else 0.5) for v in scaled]


def _labels(values: Sequence[Any], heights: Sequence[float]) -> list[tuple[str, float]]:
    """The values that are written at an axis: all of a few, else the lowest and the highest."""
    found = {height: _words(value) for value, height in zip(values, heights, strict=True)}
    kept = found if len(found) <= 6 else {height: found[height] for height in (min(found), max(found))}
    return [(words, height) for height, words in kept.items()]


def _top(height: float) -> float:
    return HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)


def _words(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return format_number(value)
    return "-" if value is None else str(value)
