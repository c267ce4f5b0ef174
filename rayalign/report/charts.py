"""Line charts, histograms and scatter plots as inline SVG: pure functions from numbers to markup, for the page of `report`.

Colours and strokes are classes that report.css defines. Values show on hover through <title>, so no script is needed.
Numbers that are not finite are left out and counted in the legend.
"""

import bisect
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Point = tuple[float, float]
Colour = Literal["blue", "orange", "grey"]

MAX_POINTS = 500
MAX_DOTS = 1500
WIDTH, HEIGHT = 420.0, 232.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 12.0, 10.0, 38.0
LARGEST = 1e100


@dataclass(frozen=True)
class Series:
    """A named curve; thin for what is logged often and is noisy, marked for the few points that matter."""

    name: str
    points: Sequence[Point]
    colour: Colour
    stroke: Literal["thin", "marked"] = "thin"


@dataclass(frozen=True)
class Sample:
    """Named values, for a histogram."""

    name: str
    values: Sequence[float]
    colour: Colour


@dataclass(frozen=True)
class Axis:
    """A range of values with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    step: float

    def label(self, tick: float) -> str:
        """The tick as text, with as many decimals as the distance between ticks needs."""
        largest = max(abs(self.low), abs(self.high))
        if tick == 0:
            return "0"
        if largest >= 1e6 or largest < 1e-3:
            return f"{tick:.3g}"
        decimals = max(0, -math.floor(math.log10(self.step)))
        return f"{tick:,.{decimals + (round(self.step * 10**decimals, 6) % 1 != 0)}f}"


@dataclass(frozen=True)
class Frame:
    """The positions of values in the picture."""

    x: Axis
    y: Axis

    def left(self, value: float) -> float:
        return LEFT + (value - self.x.low) / (self.x.high - self.x.low) * (WIDTH - LEFT - RIGHT)

    def top(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y.low) / (self.y.high - self.y.low) * (HEIGHT - TOP - BOTTOM)


def is_drawable(value: float) -> bool:
    """Whether a value is a number, and small enough that axis arithmetic stays finite."""
    return abs(value) < LARGEST


def format_number(value: float) -> str:
    """A number as a person reads it: four digits, thousands separated."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or (float(value).is_integer() and abs(value) < 1e9):
        return f"{value:,.0f}"
    if abs(value) < 1e-4 or abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def round_step(span: float, count: int) -> float:
    """The round number (1, 2, 2.5 or 5 times a power of ten) that cuts a span into about `count` parts."""
    raw = span / count
    power: float = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)


def axis_over(values: Sequence[float], *, count: int, outward: bool) -> Axis:
    """An axis over the drawable values; `outward` widens it to whole ticks, else it ends where the values end, and between
    whole numbers, such as steps, no ticks stand."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-50):
        pad = abs(low) * 0.1 if abs(low) > 1e-50 else 1.0
        low, high = low - pad, high + pad
    step = round_step(high - low, count)
    if not outward and all(float(value).is_integer() for value in values):
        step = max(step, 1.0)
    first, last = low / step, high / step
    if outward:
        ticks = [i * step for i in range(math.floor(first + 1e-6), math.ceil(last - 1e-6) + 1)]
        return Axis(ticks[0], ticks[-1], tuple(ticks), step)
    ticks = [i * step for i in range(math.ceil(first - 1e-6), math.floor(last + 1e-6) + 1)]
    return Axis(low, high, tuple(ticks), step)


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of the points, in order: the ends, and the lowest and highest of equal stretches, so spikes survive."""
    if len(points) <= limit:
        return list(points)
    stretches = (limit - 2) // 2
    inner = range(1, len(points) - 1)
    kept = {0, len(points) - 1}
    for k in range(stretches):
        stretch = inner[k * len(inner) // stretches : (k + 1) * len(inner) // stretches]
        kept.add(min(stretch, key=lambda i: points[i][1]))
        kept.add(max(stretch, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def stretch_means(points: Sequence[Point], count: int = 30) -> list[Point]:
    """The mean point of each of `count` equal stretches: where a noisy curve runs."""
    cuts = [k * len(points) // count for k in range(count + 1)]
    stretches = [points[start:end] for start, end in itertools.pairwise(cuts)]
    return [(statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part)) for part in stretches if part]


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str, y_range: Point | None = None, mark: float | None = None
) -> str:
    """A <figure> of curves, or nothing where no series has a drawable point; `mark` is a horizontal line to compare with. A
    single value, and nothing but zeros, are said in words."""
    drawn = [(s, sorted(p for p in s.points if is_drawable(p[0]) and is_drawable(p[1]))) for s in series]
    curves = [(s, thin(points)) for s, points in drawn if points]
    trends = [(s, stretch_means(points)) for s, points in drawn if s.stroke == "thin" and len(points) >= 100]
    if not curves:
        return ""
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points]
    if len(ys) == 1:
        return _in_words(title, f"{format_number(ys[0])} ({curves[0][0].name}) at {x_label} {format_number(xs[0])}")
    if not any(ys) and y_range is None:
        return _in_words(title, f"0 at all logged {x_label}s")
    frame = Frame(axis_over(xs, count=6, outward=False), axis_over(y_range or ys, count=4, outward=True))
    parts = [axes(frame, x_label, "", marks=(0.0,) if mark is None else (0.0, mark))]
    layers = [*((s.stroke, s, points) for s, points in curves), *(("mean", s, points) for s, points in trends)]
    for css, one, points in sorted(layers, key=lambda layer: ("thin", "mean", "marked").index(layer[0])):
        places = [(frame.left(x), frame.top(y)) for x, y in points]
        if len(places) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            noisy = " noisy" if css == "thin" and any(one is other for other, _ in trends) else ""
            parts.append(f'<path class="line {css}{noisy} {one.colour}" d="{path}"/>')
        if len(places) == 1 or (one.stroke == "marked" and len(places) <= 40):
            parts += [f'<circle class="dot {one.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    values: dict[float, list[str]] = {}
    for one, points in curves:
        for x, y in points:
            values.setdefault(x, []).append(f"{one.name}: {format_number(y)}")
    steps = sorted(values)
    edges = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    for x, start, end in zip(steps, [frame.x.low, *edges], [*edges, frame.x.high], strict=True):
        parts.append(_hover(frame, start, end, [f"{x_label} {format_number(x)}", *values[x]]))
    keys = [(one.name, f"line {one.stroke} {one.colour}", len(one.points) - len(points)) for one, points in drawn if points]
    return figure(title, keys, parts)


def histogram_edges(values: Sequence[float], *, count: int = 30) -> list[float]:
    """Edges of about `count` bins that hold the values; multiples of a round width, so that no bin has zero inside."""
    axis = axis_over(values, count=count, outward=True)
    before = [axis.low - axis.step] if min(values) < axis.low else []
    after = [axis.high + axis.step] if max(values) >= axis.high else []
    return [*before, *axis.ticks, *after]


def histogram_counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """How many values lie in each bin, from its edge up to, not including, the next; none may lie outside."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[bisect.bisect_right(edges, value) - 1] += 1
    return counts


def histogram(title: str, samples: Sequence[Sample], *, x_label: str, y_label: str) -> str:
    """A <figure> of overlaid histograms with common bins, or nothing where no value is drawable."""
    drawn = [(s, [v for v in s.values if is_drawable(v)]) for s in samples]
    filled = [(s, values) for s, values in drawn if values]
    if not filled:
        return ""
    edges = histogram_edges([v for _, values in filled for v in values])
    counted = [(s, histogram_counts(values, edges)) for s, values in filled]
    highest = max(max(counts) for _, counts in counted)
    step = max(1.0, round_step(highest, 4))
    rows = Axis(0.0, math.ceil(highest / step) * step, tuple(i * step for i in range(math.ceil(highest / step) + 1)), step)
    labels = axis_over([edges[0], edges[-1]], count=6, outward=False)
    frame = Frame(Axis(edges[0], edges[-1], labels.ticks, labels.step), rows)
    parts = [axes(frame, x_label, y_label, marks=(), upright=(0.0,))]
    for one, counts in counted:
        for start, end, number in zip(edges, edges[1:], counts, strict=False):
            if number:
                x, y = frame.left(start), frame.top(number)
                size = f'width="{frame.left(end) - x:.1f}" height="{frame.top(0) - y:.1f}"'
                parts.append(f'<rect class="bar {one.colour}" x="{x:.1f}" y="{y:.1f}" {size}/>')
    for k, (start, end) in enumerate(itertools.pairwise(edges)):
        found = [f"{one.name}: {counts[k]}" for one, counts in counted]
        parts.append(_hover(frame, start, end, [f"{format_number(start)} to {format_number(end)}", *found]))
    names = [f"{one.name}, mean {format_number(statistics.fmean(values))}" for one, values in filled]
    keys = [(n, f"swatch {one.colour}", len(one.values) - len(values)) for n, (one, values) in zip(names, filled, strict=True)]
    return figure(title, keys, parts)


def scatter(
    title: str, points: Sequence[Point], labels: Sequence[str], *, x_label: str, y_label: str, sign_names: tuple[str, str]
) -> str:
    """A <figure> of dots with their trend; blue above zero and orange below, named by `sign_names`; nothing without dots."""
    found = [(x, y, label) for (x, y), label in zip(points, labels, strict=True) if is_drawable(x) and is_drawable(y)]
    if not found:
        return ""
    shown = [found[k * len(found) // MAX_DOTS] for k in range(MAX_DOTS)] if len(found) > MAX_DOTS else found
    x_axis = axis_over([x for x, _, _ in found], count=6, outward=True)
    frame = Frame(x_axis, axis_over([y for _, y, _ in found], count=4, outward=True))
    parts = [axes(frame, x_label, y_label, marks=(0.0,), upright=(0.0,))]
    for x, y, label in shown:
        colour = "blue" if y > 0 else "orange"
        place = f'cx="{frame.left(x):.1f}" cy="{frame.top(y):.1f}"'
        parts.append(f'<circle class="point {colour}" {place} r="3"><title>{escape(label)}</title></circle>')
    if len({x for x, _, _ in found}) > 1:
        slope, start = statistics.linear_regression([x for x, _, _ in found], [y for _, y, _ in found])
        ends = [(x, start + slope * x) for x in (min(x for x, _, _ in found), max(x for x, _, _ in found))]
        (x1, y1), (x2, y2) = [(frame.left(x), frame.top(min(max(y, frame.y.low), frame.y.high))) for x, y in ends]
        parts.append(f'<path class="trend" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>')
    keys = [(sign_names[0], "dot blue", len(points) - len(found)), (sign_names[1], "dot orange", 0)]
    note = f"{MAX_DOTS:,} of {len(found):,} shown" if len(found) > MAX_DOTS else ""
    return figure(title, keys, parts, note=note)


def axes(frame: Frame, x_label: str, y_label: str, *, marks: Sequence[float], upright: Sequence[float] = ()) -> str:
    """Grid, ticks and labels; `marks` and `upright` are stronger lines at values of y and x, where these are in sight."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def row(css: str, value: float) -> str:
        return f'<path class="{css}" d="M{LEFT} {frame.top(value):.1f}H{right}"/>'

    def text(css: str, x: float, y: float, words: str) -> str:
        return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'

    def in_sight(values: Sequence[float], axis: Axis) -> list[float]:
        return [v for v in values if axis.low <= v <= axis.high]

    parts: list[str] = []
    for tick in frame.y.ticks:
        parts += [row("grid", tick), text("tick end", LEFT - 6, frame.top(tick) + 3.5, frame.y.label(tick))]
    parts += [row("mark", value) for value in in_sight(marks, frame.y)]
    for tick in frame.x.ticks:
        x = frame.left(tick)
        css, at = ("tick end", WIDTH - 1) if x + 3.2 * len(frame.x.label(tick)) > WIDTH else ("tick middle", x)
        parts += [f'<path class="grid" d="M{x:.1f} {bottom}v4"/>', text(css, at, bottom + 15, frame.x.label(tick))]
    parts += [f'<path class="mark" d="M{frame.left(value):.1f} {TOP}V{bottom}"/>' for value in in_sight(upright, frame.x)]
    parts.append(text("label middle", (LEFT + right) / 2, HEIGHT - 5, x_label))
    if y_label:
        middle = (TOP + bottom) / 2
        parts.append(f'<text class="label middle" transform="translate(11 {middle:.1f}) rotate(-90)">{escape(y_label)}</text>')
    return "".join(parts)


def _hover(frame: Frame, start: float, end: float, lines: Sequence[str]) -> str:
    """An invisible strip over the whole height that shows its lines under the pointer."""
    left, right = frame.left(start), frame.left(end)
    size = f'x="{left:.1f}" y="{TOP}" width="{max(right - left, 0.1):.1f}" height="{HEIGHT - TOP - BOTTOM}"'
    return f'<rect class="strip" {size}><title>{escape(chr(10).join(lines))}</title></rect>'


def _in_words(title: str, words: str) -> str:
    """A <figure> that says what a line or a dot would."""
    caption = f"<figcaption><b>{escape(title)}</b></figcaption>"
    return f'<figure class="chart empty">{caption}<p class="words">{escape(words)}</p></figure>'


def figure(title: str, keys: Sequence[tuple[str, str, int]], parts: Sequence[str], *, note: str = "") -> str:
    """A <figure>: the picture under its title and a legend of (name, class, values left out)."""
    draw: dict[str, Callable[[str], str]] = {
        "thin": lambda css: f'<path class="{css}" d="M0 6H18"/>',
        "marked": lambda css: f'<path class="{css}" d="M0 6H18"/><circle cx="9" cy="6" r="3"/>',
        "dot": lambda _: '<circle cx="9" cy="6" r="4"/>',
        "swatch": lambda _: '<rect class="bar" x="3" y="1" width="12" height="10"/>',
    }
    legend = []
    for name, css, left_out in keys:
        kind, colour = css.split()[-2:]
        words = f"{name} ({left_out:,} not finite)" if left_out else name
        sign = f'<svg class="key {colour}" viewBox="0 0 18 12" aria-hidden="true">{draw[kind](css)}</svg>'
        legend.append(f"<span>{sign}{escape(words)}</span>")
    if note:
        legend.append(f"<span>{escape(note)}</span>")
    picture = f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    caption = f'<figcaption><b>{escape(title)}</b><span class="legend">{"".join(legend)}</span></figcaption>'
    return f'<figure class="chart">{caption}{picture}</figure>'
