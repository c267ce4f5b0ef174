"""The curves of all trials of a sweep in one picture, in which the best ones have names."""

from collections.abc import Sequence
from html import escape

from rayalign.report.charts import Axis, Frame, Point, axes, axis_over, figure, format_number, is_drawable
from rayalign.report.drawn_trial import COLOURS, DrawnTrial
from rayalign.report.markup import section

NAMED = 5
"""So many of the best trials have their number at the end of their curve, and their flags in the legend."""

CROWDED = 20
"""Of more curves than these, those that have no name are drawn faintly."""

NAME_ROOM = 0.04
"""What the names take of the picture's width, behind the last step."""

NAME_HEIGHT = 7.5
"""The least distance between names, in units of the picture."""


def curves_section(trials: Sequence[DrawnTrial], metric: str) -> str:
    """A line for each trial, the best first, from its first evaluation to its last; empty where fewer than two evaluations can
    be drawn."""
    found = [(trial, sorted(p for p in trial.points if is_drawable(p[0]) and is_drawable(p[1]))) for trial in trials]
    drawn = [(trial, points) for trial, points in found if points]
    places = [point for _, points in drawn for point in points]
    if len(places) < 2:
        return ""
    x = axis_over([step for step, _ in places], count=6, outward=False)
    wider = Axis(x.low, x.high + NAME_ROOM * (x.high - x.low), x.ticks, x.step)
    frame = Frame(wider, axis_over([value for _, value in places], count=4, outward=True))
    named = [(trial, points) for trial, points in drawn if trial.state != "failed"][:NAMED]
    others = [(trial, points) for trial, points in drawn if not any(trial is other for other, _ in named)]
    parts = [axes(frame, "step", "", marks=(0.0,))]
    stroke = faint_where_crowded("thin", len(drawn))
    for trial, points in reversed(others):
        parts.append(_curve(frame, trial, points, f"{stroke} {_colour(trial)}"))
    for trial, points in reversed(named):
        parts.append(_curve(frame, trial, points, "marked blue" if trial is trials[0] else "thin blue"))
    ends = [(frame.left(step), frame.top(value)) for step, value in (points[-1] for _, points in named)]
    for (trial, _), (left, _), height in zip(named, ends, _apart(ends), strict=True):
        number = escape(trial.short_name.removeprefix("Trial "))
        parts.append(f'<text class="tick halo" x="{left + 3:.1f}" y="{height + 2.2:.1f}">{number}</text>')
    keys = [(trial.name, "line marked blue" if trial is trials[0] else "line thin blue", 0) for trial, _ in named]
    words = {"grey": "others that finished", "orange": "others, stopped or failed"}
    used = {_colour(trial) for trial, _ in others}
    keys += [(words[colour], f"line thin {colour}", 0) for colour in words if colour in used]
    lead = f"{metric} of each trial at each evaluation; the best {len(named)} have their numbers." if others else ""
    return section("Evaluations", lead, f'<div class="charts single">{figure(metric, keys, parts)}</div>')


def faint_where_crowded(stroke: str, lines: int) -> str:
    """The class of a line that has no name, among so many in a picture."""
    return f"{stroke} noisy" if lines > CROWDED else stroke


def _curve(frame: Frame, trial: DrawnTrial, points: Sequence[Point], css: str) -> str:
    """A line that tells its trial under the pointer, or a dot where there is one evaluation."""
    step, value = points[-1]
    hover = f"<title>{escape(trial.name)}\n{format_number(value)} at step {format_number(step)}</title>"
    corners = [f"{frame.left(x):.1f} {frame.top(y):.1f}" for x, y in points]
    if len(corners) > 1:
        return f'<path class="line {css}" d="M{"L".join(corners)}">{hover}</path>'
    x, y = corners[0].split()
    return f'<circle class="dot {css.split()[-1]}" cx="{x}" cy="{y}" r="1.5">{hover}</circle>'


def _colour(trial: DrawnTrial) -> str:
    return COLOURS["finished" if trial.state == "finished" else "stopped"]


def _apart(ends: Sequence[Point]) -> list[float]:
    """The heights of curves' ends, moved down where those of the same step would be nearer to each other than NAME_HEIGHT."""
    moved = [height for _, height in ends]
    last: dict[float, float] = {}
    for index in sorted(range(len(ends)), key=lambda index: ends[index][1]):
        left, height = ends[index]
        moved[index] = last[left] = max(height, last.get(left, -NAME_HEIGHT) + NAME_HEIGHT)
    return moved
