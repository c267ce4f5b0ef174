"""What the page of `report` shows of the held-out pairs and single responses: how they were scored, whether length explains it,
and the extremes."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from rayalign.report.charts import Colour, Point, Sample, format_number, histogram, is_drawable, scatter
from rayalign.report.conversations import Conversation, card, response, text_block
from rayalign.report.markup import section, table

SHOWN_PAIRS = 8


@dataclass(frozen=True)
class ScoredPair:
    """How the last evaluation scored a held-out pair, or a single response: a side that a record doesn't have has 0 tokens, and
    its reward is nan. Rewards are log-probs per token where an algorithm has no rewards."""

    id: str
    reward_chosen: float
    reward_rejected: float
    tokens_chosen: int
    tokens_rejected: int

    @property
    def has_both(self) -> bool:
        return self.tokens_chosen > 0 and self.tokens_rejected > 0

    @property
    def margin(self) -> float:
        return self.reward_chosen - self.reward_rejected

    @property
    def score(self) -> float:
        """By how much the policy is right: a pair's margin, a good single response's reward, a bad one's times -1."""
        if self.has_both:
            return self.margin
        return self.reward_chosen if self.tokens_chosen else -self.reward_rejected

    @property
    def extra_tokens(self) -> int:
        """How much longer the chosen response is."""
        return self.tokens_chosen - self.tokens_rejected


def what_they_are(pairs: Sequence[ScoredPair]) -> str:
    """`pairs`, or `records` where some have one response only."""
    return "pairs" if pairs and all(pair.has_both for pair in pairs) else "records"


def distributions(pairs: Sequence[ScoredPair], *, score_name: str) -> str:
    """Histograms of the scores of both sides and of the margins, each over the records that have it."""
    chosen = Sample("chosen", [pair.reward_chosen for pair in pairs if pair.tokens_chosen], "blue")
    rejected = Sample("rejected", [pair.reward_rejected for pair in pairs if pair.tokens_rejected], "orange")
    margins = Sample("margin", [pair.margin for pair in pairs if pair.has_both], "blue")
    charts = histogram(f"Distribution of {score_name}", [chosen, rejected], x_label=score_name, y_label="responses")
    charts += histogram("Distribution of margins", [margins], x_label="margin", y_label="pairs")
    words = f"After the last evaluation, {len(pairs):,} {what_they_are(pairs)}."
    return section("Held-out scores", words, f'<div class="charts wide">{charts}</div>') if charts else ""


def correlation(points: Sequence[Point]) -> float:
    """Pearson's coefficient of the drawable points; nan where one of the two does not vary."""
    drawn = [(x, y) for x, y in points if is_drawable(x) and is_drawable(y)]
    try:
        return statistics.correlation([x for x, _ in drawn], [y for _, y in drawn])
    except statistics.StatisticsError:
        return math.nan


def length_bias(pairs: Sequence[ScoredPair], unit: str = "tokens") -> str:
    """Margins against the difference in length, in some unit, and accuracy by which response is longer."""
    known = [pair for pair in pairs if is_drawable(pair.margin)]
    if not known:
        return ""
    points = [(float(pair.extra_tokens), pair.margin) for pair in known]
    labels = [f"{pair.id}: margin {format_number(pair.margin)}, {pair.extra_tokens:+d} {unit}" for pair in known]
    chart = scatter(
        "Margin against length",
        points,
        labels,
        x_label=f"{unit} of chosen - {unit} of rejected",
        y_label="margin",
        sign_names=("prefers chosen", "does not"),
    )
    groups = {
        "longer": [pair.margin for pair in known if pair.extra_tokens > 0],
        "shorter": [pair.margin for pair in known if pair.extra_tokens < 0],
        "equally long": [pair.margin for pair in known if pair.extra_tokens == 0],
    }
    rows = [
        (f"chosen is {name}", f"{len(found):,}", format_number(accuracy_of(found)), format_number(statistics.fmean(found)))
        for name, found in groups.items()
        if found
    ]
    r = correlation(points)
    strength = "cannot be computed: one of the two does not vary" if math.isnan(r) else f"is <b>{r:+.2f}</b>"
    by_length = (len(groups["longer"]) + len(groups["equally long"]) / 2) / len(known)
    accuracy = accuracy_of([pair.margin for pair in known])
    words = (
        f"<p>The correlation of margin and length difference {strength}. Always preferring the longer response would have an "
        f"accuracy of {format_number(by_length)}; the scores have {format_number(accuracy)}.</p>"
    )
    by_group = table(("", "pairs", "accuracy", "mean margin"), rows)
    content = f'<div class="charts wide">{chart}<div class="panel">{by_group}{words}</div></div>'
    return section("Length bias", "Are better responses preferred, or longer ones?", content)


def examples(pairs: Sequence[ScoredPair], conversations: Mapping[str, Conversation], *, score_name: str) -> str:
    """The pairs with the lowest and the highest margin, with all they hold; single responses are ranked by their own score.
    `conversations` has those of `extremes`, by id."""
    worst, best = extremes(pairs)
    if not best:
        return ""
    ranked_by, lead = "margins", f"Margin is the {score_name} of the chosen response less that of the rejected one."
    if not any(pair.tokens_rejected for pair in pairs):
        ranked_by, lead = score_name, f"By the {score_name} of the response."
    elif not all(pair.has_both for pair in pairs):
        ranked_by = "scores"
        lead = (
            f"{lead} The score of a pair is its margin, that of a single good response its {score_name}, that of a single bad "
            f"one its {score_name} times -1."
        )
    lists = []
    for name, found in (("Lowest", worst), ("Highest", best)):
        cards = "".join(_card(pair, conversations[pair.id], score_name=score_name) for pair in found)
        lists.append(f"<h3>{escape(f'{name} {ranked_by}')}</h3>{cards}" if cards else "")
    return section(f"Worst and best {what_they_are(pairs)}", lead, "".join(lists))


def extremes(pairs: Sequence[ScoredPair]) -> tuple[list[ScoredPair], list[ScoredPair]]:
    """The worst pairs, worst first, and the best, best first; none is in both, and those without a finite score in neither."""
    ranked = sorted((pair for pair in pairs if math.isfinite(pair.score)), key=lambda pair: pair.score)
    num_worst = min(SHOWN_PAIRS, len(ranked) // 2)
    return ranked[:num_worst], ranked[num_worst:][-SHOWN_PAIRS:][::-1]


def _card(pair: ScoredPair, shown: Conversation, *, score_name: str) -> str:
    sides: tuple[tuple[str, Colour, str, float, int], ...] = (
        ("chosen", "blue", shown.chosen, pair.reward_chosen, pair.tokens_chosen),
        ("rejected", "orange", shown.rejected, pair.reward_rejected, pair.tokens_rejected),
    )
    score = ""
    if pair.has_both:
        colour = "blue" if pair.margin > 0 else "orange"
        score = f'<span class="score {colour}">margin {"+" if pair.margin > 0 else ""}{format_number(pair.margin)}</span>'
    responses = [
        response(name, colour, text_block(text), note=f" · {score_name} {format_number(value)} · {tokens:,} tokens")
        for name, colour, text, value, tokens in sides
        if tokens
    ]
    return card(f"{score}<code>{escape(pair.id)}</code>", shown, responses)


def accuracy_of(margins: Sequence[float]) -> float:
    """The fraction of pairs whose chosen response has the larger reward; a tie counts one half."""
    return sum((margin > 0) + (margin == 0) / 2 for margin in margins) / len(margins)
