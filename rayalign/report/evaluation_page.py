"""The page of an evaluation: accuracies with their intervals, groups of records, benchmarks, two models side by side, and
what was left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rayalign.report.charts import Colour, Sample, axis_over, histogram, is_drawable
from rayalign.report.markup import flags_section, header, section, table, tiles
from rayalign.report.page import html_page
from rayalign.report.pairs import ScoredPair, length_bias

WIDTH, LEFT, RIGHT, ROW, TOP, BOTTOM = 900.0, 300.0, 20.0, 22.0, 8.0, 30.0
COLOURS: tuple[Colour, ...] = ("blue", "orange")
OFFSET = 4.0
"""Of the second model's mark below the row's middle, and of the first one's above it."""

MOST_LISTED = 50


@dataclass(frozen=True)
class Cell:
    """A metric of one model: in words, and as a number with its interval where it has one."""

    words: str
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Section:
    """A table of metrics, each with a cell for each model; those `drawn` are in a chart above it, from 0 to 1."""

    title: str
    lead: str
    rows: Mapping[str, Sequence[Cell]]
    drawn: Sequence[str]


@dataclass(frozen=True)
class EvaluationPage:
    """What the page shows. `pairs` are the first model's, whose lengths are in `length_unit`s; `dropped` counts records by
    reason, `left_out` names rows of benchmarks' files with theirs."""

    title: str
    facts: Mapping[str, str]
    models: Sequence[str]
    tiles: Mapping[str, str]
    sections: Sequence[Section]
    comparison: Sequence[str]
    pairs: Sequence[ScoredPair]
    score_name: str
    length_unit: str
    dropped: Mapping[str, int]
    left_out: Mapping[str, str]
    flags: Mapping[str, Any]


def render_evaluation(page: EvaluationPage) -> str:
    """The page as a string."""
    body = [
        header(page.title, page.facts),
        tiles(page.tiles),
        _comparison(page.comparison),
        *(_section(one, page.models) for one in page.sections),
        _distributions(page.pairs, score_name=page.score_name),
        length_bias(page.pairs, page.length_unit),
        _left_out(page),
        flags_section(page.flags),
    ]
    return html_page(page.title, body)


def _distributions(pairs: Sequence[ScoredPair], *, score_name: str) -> str:
    sides = [
        Sample("chosen", [pair.reward_chosen for pair in pairs], "blue"),
        Sample("rejected", [pair.reward_rejected for pair in pairs], "orange"),
    ]
    margins = [Sample("margin", [pair.margin for pair in pairs], "blue")]
    charts = histogram(f"Distribution of {score_name}", sides, x_label=score_name, y_label="responses")
    charts += histogram("Distribution of margins", margins, x_label="margin", y_label="pairs")
    return section("Scores", f"{len(pairs):,} pairs.", f'<div class="charts wide">{charts}</div>') if charts else ""


def _comparison(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    lead = "On the same records: exact tests of accuracy, and the paired bootstrap of margins."
    return section("The first model against the second", lead, f'<div class="panel"><ul>{items}</ul></div>')


def _section(one: Section, models: Sequence[str]) -> str:
    drawn = {name: one.rows[name] for name in one.drawn if any(cell.value is not None for cell in one.rows[name])}
    chart = interval_chart(one.title, drawn, models) if drawn else ""
    rows = [(name, *(cell.words for cell in cells)) for name, cells in one.rows.items()]
    content = f'{chart}<details class="panel"{"" if chart else " open"}><summary>All values</summary>'
    return section(one.title, one.lead, f"{content}{table(('metric', *models), rows)}</details>")


def interval_chart(title: str, rows: Mapping[str, Sequence[Cell]], models: Sequence[str]) -> str:
    """A <figure> with a row for each metric: a mark for each model's value on a line over its interval, from 0 to 1."""
    height = TOP + ROW * len(rows) + BOTTOM
    axis = axis_over((0.0, 1.0), count=5, outward=True)

    def left(value: float) -> float:
        return LEFT + (value - axis.low) / (axis.high - axis.low) * (WIDTH - LEFT - RIGHT)

    bottom = height - BOTTOM
    parts = [f'<path class="grid" d="M{left(tick):.1f} {TOP}V{bottom:.1f}"/>' for tick in axis.ticks]
    parts += [
        f'<text class="tick middle" x="{left(tick):.1f}" y="{bottom + 16:.1f}">{escape(axis.label(tick))}</text>'
        for tick in axis.ticks
    ]
    parts.append(f'<path class="mark" d="M{left(0.5):.1f} {TOP}V{bottom:.1f}"/>')
    for number, (name, cells) in enumerate(rows.items()):
        middle = TOP + ROW * (number + 0.5)
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{middle + 3.5:.1f}">{escape(name)}</text>')
        for place, (cell, model) in enumerate(zip(cells, models, strict=True)):
            if cell.value is None or not is_drawable(cell.value):
                continue
            y = middle + (0 if len(models) == 1 else OFFSET * (2 * place - 1))
            colour, hover = COLOURS[place], escape(f"{name}, {model}: {cell.words}")
            low, high = (cell.value if end is None else end for end in (cell.low, cell.high))
            parts.append(f'<path class="line thin {colour}" d="M{left(low):.1f} {y:.1f}H{left(high):.1f}"/>')
            parts.append(
                f'<circle class="dot {colour}" cx="{left(cell.value):.1f}" cy="{y:.1f}" r="3.5"><title>{hover}</title></circle>'
            )
    signs = "".join(
        f'<span><svg class="key {colour}" viewBox="0 0 18 12" aria-hidden="true"><circle cx="9" cy="6" r="4"/></svg>'
        f"{escape(model)}</span>"
        for colour, model in zip(COLOURS, models, strict=False)
    )
    picture = f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption><span class="legend">{signs}</span></figcaption>{picture}</figure>'


def _left_out(page: EvaluationPage) -> str:
    parts = []
    if page.dropped:
        rows = [(reason, f"{count:,}") for reason, count in page.dropped.items()]
        parts.append(table(("dropped", "records"), rows))
    if page.left_out:
        rows = list(page.left_out.items())[:MOST_LISTED]
        parts.append(table(("row of a benchmark's files", "why it is left out"), rows))
        if len(page.left_out) > MOST_LISTED:
            parts.append(f"<p>And {len(page.left_out) - MOST_LISTED:,} more, which metrics.json lists.</p>")
    words = "Not evaluated, and in no figure above." if parts else "Every record and every question was evaluated."
    return section("Left out", words, "".join(parts))
