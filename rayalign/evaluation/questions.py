"""A benchmark's questions as rows for a pool, and the pool's results as answers and metrics.

An option is scored as a response to the question: two options share a row, and so their prompt.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayalign.evaluation.benchmarks.answers import option_in
from rayalign.evaluation.benchmarks.benchmark import Benchmark, Contents, Item, Metrics, Preferred, Said
from rayalign.evaluation.preferences import REWARD_MODEL, Pairs
from rayalign.evaluation.score_columns import ASKS, SCORES
from rayalign.storage import Store

BY_LOGP, BY_TEXT = "log-probs", "text"
"""How an option is chosen: the likeliest one, or what the model's own greedy text means. A reward model chooses the one of the
highest value, by REWARD_MODEL."""

PLACEHOLDER = "."
"""Stands for the response of a question that has none, and is not scored."""


@dataclass(frozen=True)
class Answers:
    """What a model made of a benchmark's questions: by how it was chosen, the options; by scorer, the margins; its own texts,
    and what a judge says to each; and the ids of the questions that it could not be asked, which are in none of these."""

    choices: Mapping[str, Sequence[Said]] = field(default_factory=dict)
    preferred: Mapping[str, Sequence[Preferred]] = field(default_factory=dict)
    texts: Sequence[Said] = ()
    judged: Sequence[Said] = ()
    unanswered: Sequence[str] = ()


def draw(items: Sequence[Item], count: int | None, *, seed: int) -> tuple[Item, ...]:
    """At most so many of the questions, drawn with a seed, in their order: whole units, of which the first may be larger."""
    if count is None or count >= len(items):
        return tuple(items)
    units: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        units.setdefault(item.unit or item.id, []).append(number)
    places = list(units.values())
    order = np.random.default_rng([seed, 0xBE9C]).choice(len(places), min(count, len(places)), replace=False)
    chosen: list[int] = []
    for own in (places[place] for place in order.tolist()):
        if not chosen or len(chosen) + len(own) <= count:
            chosen += own
    return tuple(items[number] for number in sorted(chosen))


def rows_of(items: Sequence[Item], benchmark: Benchmark, images: Store) -> list[dict[str, Any]]:
    """The rows of some questions, as `pair_scores.PairScorer` takes them."""
    rows: list[dict[str, Any]] = []
    for item in items:
        for number, (chosen, rejected) in enumerate(_pairs_of(item)):
            row: dict[str, Any] = {"query": item.query, "images": list(item.images), "response": chosen}
            if rejected is not None:
                row["rejected_response"] = rejected
            writes = number == 0 and item.kind != "pair"
            scores = {"choice": "options", "pair": "pair", "open": ""}[item.kind]
            asks = benchmark.max_new_tokens if writes else 0
            rows.append({"id": _row_id(item, number), "folder": images.location, "row": row, ASKS: asks, SCORES: scores})
    return rows


def _pairs_of(item: Item) -> list[tuple[str, str | None]]:
    """The responses of a question two by two; the last one of an odd number stands beside the first once more."""
    if item.kind == "open":
        return [(PLACEHOLDER, None)]
    options = [*item.responses, *item.responses[:1]] if len(item.responses) % 2 else list(item.responses)
    return list(zip(options[::2], options[1::2], strict=True))


def _row_id(item: Item, number: int) -> str:
    return f"{item.id}#{number}"


def fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """What tells some rows from all others, for the settings of a pool."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(sorted(row.items())).encode())
    return digest.hexdigest()[:16]


def answers_of(items: Sequence[Item], lines: Mapping[str, Mapping[str, Any]], pairs: Pairs | None) -> Answers:
    """The answers in a pool's results: `lines` by row, and the `pairs` of those questions that are pairs."""
    best, by_text, texts, unanswered = [], [], [], []
    preferred: dict[str, list[Preferred]] = {}
    margins = {} if pairs is None else pairs.margins()
    places = {} if pairs is None else {own: place for place, own in enumerate(pairs.ids)}
    for item in items:
        own = [_row_id(item, number) for number in range(len(_pairs_of(item)))]
        if item.kind == "pair":
            if own[0] not in places:
                unanswered.append(item.id)
                continue
            for scorer, values in margins.items():
                preferred.setdefault(scorer, []).append(Preferred(item, float(values[places[own[0]]])))
            continue
        found = [lines.get(name) for name in own]
        said = None if found[0] is None else found[0]["text"]
        if item.kind == "open":
            if said is None:
                unanswered.append(item.id)
            else:
                texts.append(Said(item, said))
            continue
        scores = [line[side] for line in found if line is not None for side in ("chosen", "rejected")][: len(item.responses)]
        if None in found or not all(score is not None and math.isfinite(score) for score in scores):
            unanswered.append(item.id)
            continue
        best.append(Said(item, item.responses[int(np.argmax(scores))]))
        if said is not None:
            by_text.append(Said(item, option_in(said, item)))
    by_score = REWARD_MODEL if any(line.get("is_reward_model") for line in lines.values()) else BY_LOGP
    choices = {name: said for name, said in ((by_score, best), (BY_TEXT, by_text)) if said}
    return Answers(choices, preferred, texts, unanswered=unanswered)


def metrics_of(benchmark: Benchmark, contents: Contents, answers: Answers) -> dict[str, Metrics]:
    """The benchmark's metrics of some answers, by how they were found: the choice's way, the scorer, or `text`."""
    found: dict[str, Metrics] = {}
    if benchmark.of_choices is not None:
        found |= {way: benchmark.of_choices(said) for way, said in answers.choices.items()}
    if benchmark.of_pairs is not None:
        found |= {scorer: benchmark.of_pairs(preferred) for scorer, preferred in answers.preferred.items()}
    texts = answers.judged or answers.texts
    if benchmark.of_texts is not None and texts:
        found[BY_TEXT] = {**found.get(BY_TEXT, {}), **benchmark.of_texts(texts, contents.shared)}
    return found


def rights(benchmark: Benchmark, answers: Answers) -> dict[str, dict[str, float]]:
    """By the way of an answer, and by question: 1 where it is right, else 0; one half for a tie."""
    found = {way: {one.item.id: float(benchmark.is_right(one)) for one in said} for way, said in answers.choices.items()}
    for scorer, preferred in answers.preferred.items():
        found[scorer] = {one.item.id: (math.copysign(1, one.margin) + 1) / 2 if one.margin else 0.5 for one in preferred}
    return found
