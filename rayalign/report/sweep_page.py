"""The page of a sweep: its table, its trials as lines across the searched flags (parallel coordinates), how much comes with
each flag, what a good metric cost, the trials' curves, and which were stopped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from rayalign.report.charts import Frame, Point, axes, axis_over, figure, format_number, is_drawable
from rayalign.report.drawn_trial import COLOURS, WORDS, DrawnTrial
from rayalign.report.markup import section, table
from rayalign.report.page import html_page
from rayalign.report.sweep_curves import curves_section, faint_where_crowded

WIDTH, HEIGHT, SIDE, TOP, BOTTOM = 900.0, 300.0, 70.0, 40.0, 16.0
LOG_FROM = 20
"""Numbers above 0 of which the highest is so many times the lowest are drawn on a logarithmic scale."""

NAME_ROOM = 14.0
"""Of dots that are nearer to each other, in units of the picture, only one has its name beside it."""

CHARACTER = 6.2
"""Width of a letter of an axis's labels, about, in units of the picture."""

LONGEST_LABEL = 36


@dataclass(frozen=True)
class DrawnSweep:
    """What the page is made of: `trials`, the best first; `heads` and `rows` of the table; `words` that are said above all;
    `importance`: the share of the metric's variance that each flag explains; `cost_name`: the metric that trials' costs are;
    `is_log`: of flags that were drawn from a range, whether by their logarithm."""

    title: str
    metric: str
    mode: str
    words: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    trials: Sequence[DrawnTrial]
    importance: Mapping[str, float]
    cost_name: str
    is_log: Mapping[str, bool] = field(default_factory=dict)


def render_sweep(sweep: DrawnSweep) -> str:
    """The page as a string."""
    trials = sweep.trials
    body = [
        f'<header><h1>{escape(sweep.title)}</h1><p class="soft">{escape(sweep.words)}</p></header>',
        section("Settings, best first", "", f'<div class="panel">{table(sweep.heads, sweep.rows)}</div>'),
        parallel_section(trials, sweep.metric, is_log=sweep.is_log),
        importance_section(sweep.importance, sweep.metric),
        frontier_section(trials, sweep.metric, sweep.cost_name, mode=sweep.mode),
        curves_section(trials, sweep.metric),
        stopped_section(trials, sweep.metric, mode=sweep.mode),
    ]
    return html_page(sweep.title, body)


def importance_section(shares: Mapping[str, float], metric: str) -> str:
    """A bar for each flag; empty where nothing is known."""
    if not shares:
        return ""
    rows = [
        f'<tr><td>{escape(name)}</td><td class="number">{share:.0%}</td><td class="bars"><svg viewBox="0 0 200 10" '
        f'preserveAspectRatio="none" aria-hidden="true"><rect class="blue" x="0" y="0" width="{200 * share:.1f}" height="10"/>'
        "</svg></td></tr>"
        for name, share in shares.items()
    ]
    words = (
        f"The share of the variance of {metric} that each flag explains by itself, at the last step that all trials reached. "
        "What flags do only together is in none of them; of few trials it is a rough guess."
    )
    return section("Which flags matter", words, f'<div class="panel times"><table>{"".join(rows)}</table></div>')


def frontier(trials: Sequence[DrawnTrial], *, mode: str) -> list[DrawnTrial]:
    """Of the trials that finished, those that none beats in both metric and cost; the cheapest first."""
    sign = -1 if mode == "max" else 1
    finished = [t for t in trials if t.state == "finished" and t.value is not None and t.cost is not None]
    ordered = sorted(finished, key=lambda t: (t.cost or 0.0, sign * (t.value or 0.0)))
    kept: list[DrawnTrial] = []
    for trial in ordered:
        if not kept or sign * (trial.value or 0.0) < sign * (kept[-1].value or 0.0):
            kept.append(trial)
    return kept


def frontier_section(trials: Sequence[DrawnTrial], metric: str, cost_name: str, *, mode: str) -> str:
    """The metric against what it cost, a dot a trial; empty where fewer than two have both."""
    found = [(t, t.cost, t.value) for t in trials if t.cost is not None and t.value is not None]
    drawn = [(t, cost, value) for t, cost, value in found if is_drawable(cost) and is_drawable(value)]
    if len(drawn) < 2:
        return ""
    costs, values = [cost for _, cost, _ in drawn], [value for _, _, value in drawn]
    frame = Frame(axis_over(costs, count=6, outward=True), axis_over(values, count=4, outward=True))
    best = frontier(trials, mode=mode)
    corners = [f"{frame.left(t.cost or 0.0):.1f} {frame.top(t.value or 0.0):.1f}" for t in best]
    parts = [axes(frame, f"size of {cost_name}", "", marks=())]
    if len(corners) > 1:
        parts.append(f'<path class="line thin blue" d="M{"L".join(corners)}"/>')
    named: list[Point] = []
    for trial, cost, value in drawn:
        x, y, is_best = frame.left(cost), frame.top(value), any(trial is other for other in best)
        colour = "blue" if is_best else COLOURS["finished" if trial.state == "finished" else "stopped"]
        hover = escape(f"{trial.name}\n{metric} {format_number(value)}\n{cost_name} {format_number(cost)}")
        parts.append(f'<circle class="point {colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{hover}</title></circle>')
        if is_best and all(math.dist((x, y), other) > NAME_ROOM for other in named):
            named.append((x, y))
            number = escape(trial.short_name.removeprefix("Trial "))
            parts.append(f'<text class="tick halo" x="{x + 6:.1f}" y="{y - 5:.1f}">{number}</text>')
    kinds = {"grey": "finished", "orange": "stopped or failed, as far as they came"}
    used = {COLOURS["finished" if t.state == "finished" else "stopped"] for t, _, _ in drawn}
    keys = [("no trial beats them in both", "dot blue", 0)] if best else []
    keys += [(words, f"dot {colour}", 0) for colour, words in kinds.items() if colour in used]
    lead = f"{metric} against the size of {cost_name}: what a trial won, and what it paid for it."
    return section("What it cost", lead, f'<div class="charts wide">{figure(metric, keys, parts)}</div>')


def stopped_section(trials: Sequence[DrawnTrial], metric: str, *, mode: str) -> str:
    """What the scheduler stopped, when, and where it stood among the trials at that step; empty where nothing was stopped."""
    sign = -1 if mode == "max" else 1
    rows = []
    for trial in sorted((t for t in trials if t.state == "stopped" and t.points), key=lambda t: t.points[-1][0]):
        step, value = trial.points[-1]
        others = [found for other in trials if (found := dict(other.points).get(step)) is not None]
        place = 1 + sum(sign * other < sign * value for other in others)
        steps = f"{step:.0f}" if trial.num_steps is None else f"{step:.0f} of {trial.num_steps}"
        rows.append((trial.name, steps, format_number(value), f"{place} of {len(others)}"))
    if not rows:
        return ""
    heads = ("trial", "stopped at step", f"{metric} there", "its place among all trials there")
    return section("What was stopped", "", f'<div class="panel">{table(heads, rows)}</div>')


def parallel_section(trials: Sequence[DrawnTrial], metric: str, *, is_log: Mapping[str, bool] | None = None) -> str:
    """A line for each trial that has the metric, across an axis for each flag that differs, of whose values `is_log` may tell
    how they were drawn; empty where there is nothing to compare."""
    drawn = [trial for trial in trials if trial.value is not None and is_drawable(trial.value)]
    names = list(dict.fromkeys(name for trial in drawn for name in trial.flags))
    columns = {name: [trial.flags.get(name) for trial in drawn] for name in names}
    differing = {name: values for name, values in columns.items() if len({str(value) for value in values}) > 1}
    scales = {name: places(values, is_log=(is_log or {}).get(name)) for name, values in differing.items()}
    if not scales or len(drawn) < 2:
        return ""
    values = {**columns, metric: [trial.value for trial in drawn]}
    scales[metric] = places(values[metric])
    first = max(len(words) for words, _ in _labels(values[next(iter(scales))], next(iter(scales.values()))))
    left = max(SIDE, CHARACTER * first + 12)
    gap = (WIDTH - left - SIDE) / (len(scales) - 1)
    parts, labels = [], []
    for k, (name, heights) in enumerate(scales.items()):
        x = left + k * gap
        parts.append(f'<path class="mark" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="label middle" x="{x:.1f}" y="14">{escape(name)}</text>')
        # Lines leave the first axis to the right; on the others they run below the labels.
        css, beside = ("tick end", x - 6) if k == 0 else ("tick halo", x + 6)
        room = LONGEST_LABEL if k == 0 else int(gap / CHARACTER) - 2
        for words, height in _labels(values[name], heights, longest=room):
            labels.append(f'<text class="{css}" x="{beside:.1f}" y="{_top(height) + 3.5:.1f}">{escape(words)}</text>')
    for index, trial in reversed(list(enumerate(drawn))):
        kind = trial.kind(trials[0])
        corners = [f"{left + k * gap:.1f} {_top(heights[index]):.1f}" for k, heights in enumerate(scales.values())]
        stroke = "marked" if kind == "best" else faint_where_crowded("thin", len(drawn))
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


def places(values: Sequence[Any], *, is_log: bool | None = None) -> list[float]:
    """A height from 0 to 1 for each value: numbers by their size, or their logarithm (None: over a wide range), others at equal
    distances in the order of their appearance; None is below all."""
    numbers = [value for value in values if _is_number(value)]
    if len(numbers) < sum(value is not None for value in values):
        kinds = list(dict.fromkeys(map(str, values)))
        return [(kinds.index(str(value)) + 0.5) / len(kinds) for value in values]
    if is_log is None:
        is_log = min(numbers) > 0 and max(numbers) >= LOG_FROM * min(numbers)
    scaled = [None if value is None else math.log(value) if is_log else float(value) for value in values]
    known = [value for value in scaled if value is not None]
    low, span = min(known), max(known) - min(known)
    floor = 0.1 if len(known) < len(scaled) else 0.0
    return [0.0 if v is None else floor + (1 - floor) * ((v - low) / span if span else 0.5) for v in scaled]


def _labels(values: Sequence[Any], heights: Sequence[float], *, longest: int = LONGEST_LABEL) -> list[tuple[str, float]]:
    """The values that are written at an axis, cut after some characters: all words and the numbers of a few, else the lowest
    and the highest number."""
    found = {height: _words(value) for value, height in zip(values, heights, strict=True)}
    found = {height: words if len(words) <= longest else f"{words[: longest - 1]}…" for height, words in found.items()}
    are_numbers = all(value is None or _is_number(value) for value in values)
    kept = found if len(found) <= 6 or not are_numbers else {height: found[height] for height in (min(found), max(found))}
    return [(words, height) for height, words in kept.items()]


def _top(height: float) -> float:
    return HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _words(value: Any) -> str:
    if _is_number(value):
        return format_number(value)
    return "-" if value is None else str(value)
