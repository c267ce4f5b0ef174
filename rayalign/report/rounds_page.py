"""The page of rounds: accuracy after each, scores of its responses, pairs and what was left out, where they come from, and a
few of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rayalign.report.charts import Colour, Sample, Series, format_number, histogram, line_chart
from rayalign.report.conversations import Conversation, card, response, text_block
from rayalign.report.evaluation_page import Cell, interval_chart
from rayalign.report.markup import flags_section, header, section, table, tiles
from rayalign.report.page import html_page


@dataclass(frozen=True)
class ShownPair:
    """A pair to read; of both responses their number among those to the prompt, and their score."""

    prompt: str
    conversation: Conversation
    chosen: tuple[int, float]
    rejected: tuple[int, float]


@dataclass(frozen=True)
class DrawnRound:
    """A round as the page shows it: `accuracies` of its model on held-out records, and what became of them since the round
    before, in words; the scores of all responses and of those in pairs; what was counted; where the responses come from."""

    number: int
    accuracies: Mapping[str, Cell]
    change: str
    scores: Sequence[float]
    chosen_scores: Sequence[float]
    rejected_scores: Sequence[float]
    counts: Mapping[str, int]
    left_out: Mapping[str, int]
    policy: str
    seed: int
    shown: Sequence[ShownPair]

    @property
    def name(self) -> str:
        return f"round {self.number}"


@dataclass(frozen=True)
class RoundsPage:
    """What the page is made of. `start` are the accuracies before the first round; `is_same_data`: all accuracies are of the
    same records."""

    title: str
    num_rounds: int
    facts: Mapping[str, str]
    start: Mapping[str, Cell]
    rounds: Sequence[DrawnRound]
    is_same_data: bool
    flags: Mapping[str, Any]


def render_rounds(page: RoundsPage) -> str:
    """The page as a string."""
    body = [
        header(page.title, page.facts, state=_state(page)),
        tiles(_tiles(page)),
        _accuracies(page),
        _scores(page.rounds),
        _counts(page.rounds),
        _lineage(page.rounds),
        _pairs(page.rounds),
        flags_section(page.flags),
    ]
    return html_page(page.title, body)


def _state(page: RoundsPage) -> str:
    if len(page.rounds) == page.num_rounds:
        return ""
    return f"Round {len(page.rounds)} of {page.num_rounds} is done. This page is written anew after each."


def _tiles(page: RoundsPage) -> dict[str, str]:
    first, last = page.rounds[0], page.rounds[-1]
    found = {name: cell.words for name, cell in list(last.accuracies.items())[:1]}
    for name, cell in list(page.start.items())[:1]:
        found[f"{name} before round 1"] = cell.words
    means = {one.name: _mean(one.scores) for one in (first, last) if one.scores}
    found |= {f"Mean score of {name}\u2019s responses": format_number(value) for name, value in means.items()}
    return {**found, "Pairs": f"{sum(one.counts['pairs'] for one in page.rounds):,} of {len(page.rounds)} rounds"}


def _accuracies(page: RoundsPage) -> str:
    names = list(dict.fromkeys(name for one in page.rounds for name in one.accuracies))
    if not names:
        return section("Accuracy over the rounds", "No records were held out.", "")
    columns = {"start": page.start} if page.start else {}
    columns |= {one.name: one.accuracies for one in page.rounds}
    chief, none = names[0], Cell("-")
    drawn = {name: [cells.get(chief, none)] for name, cells in columns.items()}
    changes = {one.name: one.change or "-" for one in page.rounds}
    rows = [
        (name, *(cells.get(metric, none).words for metric in names), changes.get(name, "-")) for name, cells in columns.items()
    ]
    words = "On held-out pairs, by the model after each round. Bars are 95 % bootstrap intervals."
    words += (
        " The last column compares a round with the one before on the same pairs (McNemar\u2019s exact test)."
        if page.is_same_data
        else " Each round held out pairs of its own, so rounds do not compare: --val_dataset names the same ones for all."
    )
    values = table(("", *names, "against the round before"), rows)
    by_round = f'<details class="panel" open><summary>All values</summary>{values}</details>'
    return section("Accuracy over the rounds", words, interval_chart(chief, drawn, (chief,)) + by_round)


def _scores(rounds: Sequence[DrawnRound]) -> str:
    means = [
        Series("all responses", [(one.number, _mean(one.scores)) for one in rounds if one.scores], "grey", "marked"),
        Series("chosen", [(one.number, _mean(one.chosen_scores)) for one in rounds if one.chosen_scores], "blue", "marked"),
        Series(
            "rejected", [(one.number, _mean(one.rejected_scores)) for one in rounds if one.rejected_scores], "orange", "marked"
        ),
    ]
    charts = line_chart("Mean score", means, x_label="round")
    for one in rounds:
        samples = [
            Sample("all", one.scores, "grey"),
            Sample("chosen", one.chosen_scores, "blue"),
            Sample("rejected", one.rejected_scores, "orange"),
        ]
        charts += histogram(one.name.capitalize(), samples, x_label="score", y_label="responses")
    words = "Of the responses with which a round begins, so of the model before it."
    return section("Scores of the responses", words, f'<div class="charts">{charts}</div>')


def _counts(rounds: Sequence[DrawnRound]) -> str:
    columns = [{**one.counts, **{f"left out: {name}": n for name, n in one.left_out.items()}} for one in rounds]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(f"{column.get(name, 0):,}" for column in columns)) for name in names]
    content = table(("", *(one.name for one in rounds)), rows)
    words = "Of each round, and what was left out on the way to its pairs."
    return section("Pairs", words, f'<div class="panel">{content}</div>')


def _lineage(rounds: Sequence[DrawnRound]) -> str:
    rows = [(one.name, one.policy, str(one.seed)) for one in rounds]
    words = "What gave the responses of each round. Each pair says it too, in its column lineage."
    return section(
        "Lineage", words, f'<div class="panel">{table(("", "model that responded", "seed of its draws"), rows)}</div>'
    )


def _pairs(rounds: Sequence[DrawnRound]) -> str:
    lists = []
    for one in reversed(rounds):
        cards = "".join(_card(pair) for pair in one.shown)
        lists.append(f"<h3>{escape(one.name.capitalize())}</h3>{cards}" if cards else "")
    return section(
        "Some pairs", "The first of each round, in the order of the prompts; the latest round first.", "".join(lists)
    )


def _card(pair: ShownPair) -> str:
    shown = pair.conversation
    sides: tuple[tuple[str, Colour, str, tuple[int, float]], ...] = (
        ("chosen", "blue", shown.chosen, pair.chosen),
        ("rejected", "orange", shown.rejected, pair.rejected),
    )
    responses = [
        response(name, colour, text_block(text), note=f" · score {format_number(score)} · response {sample + 1}")
        for name, colour, text, (sample, score) in sides
    ]
    return card(f"<code>{escape(pair.prompt)}</code>", shown, responses)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
