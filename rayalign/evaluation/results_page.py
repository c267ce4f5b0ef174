"""What the page of an evaluation shows, from its results."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rayalign.evaluation.preferences import IMPLICIT_REWARD, LIKELIHOOD, REWARD_MODEL, SCORERS, Metric, Pairs
from rayalign.evaluation.questions import BY_LOGP, BY_TEXT
from rayalign.evaluation.results import BenchmarkResult, ModelResult, comparison_lines, in_words
from rayalign.evaluation.score_columns import SIDES, VIEWS
from rayalign.evaluation.statistics import Estimate
from rayalign.report.evaluation_page import Cell, EvaluationPage, Section
from rayalign.report.pairs import ScoredPair

CHIEF_WAYS = (REWARD_MODEL, IMPLICIT_REWARD, LIKELIHOOD, BY_LOGP, BY_TEXT)
"""Of a benchmark's metrics those are shown above all that were found in the first of these ways."""


def page_of(results: Sequence[ModelResult], *, flags: Mapping[str, Any], seed: int) -> EvaluationPage:
    """What the page shows."""
    first = results[0]
    facts = {result.role.capitalize(): result.name for result in results}
    facts |= {f"Reference of {result.role}": result.reference for result in results if result.reference}
    if flags.get("dataset"):
        facts["Data"] = " ".join(flags["dataset"])
    sections = []
    if first.dataset is not None:
        sections.append(_accuracy_section(results))
        sections += _group_sections(results)
    for name, one in first.benchmarks.items():
        sections.append(_benchmark_section(name, one, results))
    pairs, score_name = _scored_pairs(first.dataset.pairs) if first.dataset is not None else ([], "")
    dropped: Counter[str] = Counter()
    for result in results:
        of_data = result.dataset.dropped if result.dataset is not None else {}
        for counts in (of_data, *(benchmark.dropped for benchmark in result.benchmarks.values())):
            dropped.update({f"{result.role}: {reason}": count for reason, count in counts.items()})
    return EvaluationPage(
        title="Evaluation",
        facts=facts,
        models=tuple(result.role for result in results),
        tiles=_tiles(first),
        sections=tuple(sections),
        comparison=tuple(comparison_lines(results, seed=seed)) if len(results) == 2 else (),
        pairs=tuple(pairs),
        score_name=score_name,
        length_unit=first.dataset.pairs.unit if first.dataset is not None else "",
        dropped=dropped,
        left_out={f"{one.title}, {row.place}": row.reason for one in first.benchmarks.values() for row in one.left_out},
        flags=flags,
    )


def _tiles(first: ModelResult) -> dict[str, str]:
    tiles: dict[str, str] = {}
    if first.dataset is not None:
        chief = first.dataset.pairs.chief
        names = {
            f"Accuracy, {SCORERS.get(chief, chief)}": f"accuracy/{chief}",
            "Accuracy, likelihood": "accuracy/likelihood",
            "Picture reliance": f"image_reliance/{chief}",
            "Drift": "drift",
        }
        for name, metric in names.items():
            value = first.dataset.metrics.get(metric)
            if isinstance(value, Estimate):
                tiles[name] = in_words(value)
        tiles["Records"] = f"{len(first.dataset.pairs.ids):,}"
    for one in first.benchmarks.values():
        way = next((way for way in CHIEF_WAYS if way in one.metrics), [*one.metrics, ""][0])
        inner = one.metrics.get(way, {})
        for metric, value in list(inner.items())[:1]:
            tiles[f"{one.title}, {metric} ({way})"] = in_words(value)
    return tiles


def _cell(metric: Metric | None) -> Cell:
    if isinstance(metric, Estimate):
        return Cell(in_words(metric), metric.value, metric.low, metric.high)
    return Cell(in_words(metric))


def _accuracy_section(results: Sequence[ModelResult]) -> Section:
    metrics = [result.dataset.metrics if result.dataset is not None else {} for result in results]
    names = dict.fromkeys(name for own in metrics for name in own)
    rows = {name: tuple(_cell(own.get(name)) for own in metrics) for name in names}
    is_checked = any(name.endswith(VIEWS) for name in names)
    pictures = "Shuffled: with the pictures of another record; ablated: with damaged ones. " if is_checked else ""
    return Section(
        "Preferences",
        f"How often a scorer prefers the chosen response; a tie counts one half. {pictures}Bars are 95 % bootstrap intervals.",
        rows,
        drawn=tuple(name for name in names if name.startswith("accuracy/")),
    )


def _group_sections(results: Sequence[ModelResult]) -> list[Section]:
    sections = []
    groups = [result.dataset.groups if result.dataset is not None else {} for result in results]
    for kind, by_name in groups[0].items():
        rows = {
            f"{name}: {metric.removeprefix('accuracy/')}": tuple(
                _cell(own.get(kind, {}).get(name, {}).get(metric)) for own in groups
            )
            for name, inner in by_name.items()
            for metric in inner
        }
        drawn = tuple(row for row in rows if ": margin/" not in row)
        sizes = ", ".join(f"{name} ({next(iter(inner.values())).records:,})" for name, inner in by_name.items())
        sections.append(Section(f"Accuracy by {kind}", f"Records: {sizes}.", rows, drawn=drawn))
    return sections


def _benchmark_section(name: str, one: BenchmarkResult, results: Sequence[ModelResult]) -> Section:
    by_model = [
        {
            f"{metric} ({way})": value
            for way, inner in result.benchmarks[name].metrics.items()
            for metric, value in inner.items()
        }
        for result in results
    ]
    names = dict.fromkeys(metric for own in by_model for metric in own)
    rows = {metric: tuple(_cell(own.get(metric)) for own in by_model) for metric in names}
    lead = f"{one.num_questions:,} questions, {len(one.answers.unanswered):,} unanswered, {len(one.left_out):,} rows left out."
    return Section(one.title, lead, rows, drawn=())


def _scored_pairs(pairs: Pairs) -> tuple[list[ScoredPair], str]:
    """The pairs by the chief scorer, as the report draws them."""
    chosen, rejected = (pairs.scores(side) for side in SIDES)
    lengths = [pairs.lengths(side) for side in SIDES]
    columns = zip(pairs.ids, chosen.tolist(), rejected.tolist(), *(of.astype(int).tolist() for of in lengths), strict=True)
    return [ScoredPair(*row) for row in columns], SCORERS.get(pairs.chief, pairs.chief)
