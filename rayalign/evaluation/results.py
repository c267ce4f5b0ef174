"""What comes out of an evaluation: metrics.json, records.parquet with every record's own values, the page, the table."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayalign.evaluation.benchmarks.benchmark import LeftOut, Metrics
from rayalign.evaluation.benchmarks.shelf import BENCHMARKS
from rayalign.evaluation.preferences import (
    SCORERS,
    Comparison,
    Groups,
    Metric,
    Pairs,
    compare,
    group_metrics,
    preference_metrics,
)
from rayalign.evaluation.questions import Answers, rights
from rayalign.evaluation.statistics import Discordant, Estimate, mcnemar
from rayalign.storage import Store

METRICS, RECORDS, QUESTIONS = "metrics.json", "records.parquet", "questions.parquet"


@dataclass(frozen=True)
class DatasetResult:
    """A model on preference data; `dropped` has the number of records that could not be used, by reason."""

    pairs: Pairs
    metrics: Mapping[str, Metric]
    groups: Groups
    dropped: Mapping[str, int]

    @classmethod
    def of(cls, pairs: Pairs, dropped: Mapping[str, int], *, seed: int) -> "DatasetResult":
        if not pairs.ids:
            raise ValueError(f"No record of {len(pairs.not_finite)} has a score that is a number. Is the model damaged?")
        if pairs.not_finite:
            dropped = {**dropped, "score is no number": len(pairs.not_finite)}
        return cls(pairs, preference_metrics(pairs, seed=seed), group_metrics(pairs, seed=seed), dropped)


@dataclass(frozen=True)
class BenchmarkResult:
    """A model on a benchmark: `num_questions` were asked, `left_out` rows of the files could not be, `dropped` gave nothing."""

    name: str
    title: str
    answers: Answers
    metrics: Mapping[str, Metrics]
    num_questions: int
    left_out: Sequence[LeftOut]
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class ModelResult:
    """All results of one model; `role` is `model`, `compare` for the second one, or `scorer` for the scorers of --scorer."""

    role: str
    name: str
    reference: str | None
    dataset: DatasetResult | None
    benchmarks: Mapping[str, BenchmarkResult]


def write_results(output: Store, results: Sequence[ModelResult], *, flags: Mapping[str, Any], seed: int) -> None:
    """Writes the files of an evaluation of one model, or of two, in the place of those of an earlier one."""
    tables = {RECORDS: records_table(results), QUESTIONS: questions_table(results)}
    for name in tables:
        (output / name).delete()
    (output / METRICS).write_json(as_json(results, flags=flags, seed=seed))
    for name, table in tables.items():
        if table.num_rows:
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink)
            (output / name).write_bytes(sink.getvalue().to_pybytes())


def as_json(results: Sequence[ModelResult], *, flags: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The whole evaluation as JSON: an estimate as its value, interval and number of records; a number that is none as null."""
    found: dict[str, Any] = {"flags": dict(flags)}
    for result in results:
        own: dict[str, Any] = {"name": result.name, "reference": result.reference}
        if result.dataset is not None:
            own["dataset"] = {
                "records": len(result.dataset.pairs.ids),
                "dropped": result.dataset.dropped,
                "chief_scorer": result.dataset.pairs.chief,
                "metrics": result.dataset.metrics,
                "groups": result.dataset.groups,
            }
        own["benchmarks"] = {name: _benchmark_json(one) for name, one in result.benchmarks.items()}
        found[result.role] = own
    if len(results) == 2:
        found["comparison"] = {
            "dataset": comparison_of(results, seed=seed),
            "benchmarks": benchmark_comparisons(results),
        }
    jsonable: dict[str, Any] = json.loads(json.dumps(_plain(found)))
    return jsonable


def _benchmark_json(result: BenchmarkResult) -> dict[str, Any]:
    return {
        "questions": result.num_questions,
        "unanswered": len(result.answers.unanswered),
        "left_out": [dataclasses.asdict(row) for row in result.left_out],
        "dropped": result.dropped,
        "metrics": result.metrics,
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def comparison_of(results: Sequence[ModelResult], *, seed: int) -> Comparison | None:
    """The first model against the second on the preference data; None where there is only one model, or no such data."""
    sets = [result.dataset for result in results if result.dataset is not None]
    return compare(sets[0].pairs, sets[1].pairs, seed=seed) if len(sets) == 2 else None


def benchmark_comparisons(results: Sequence[ModelResult]) -> dict[str, dict[str, Discordant]]:
    """By benchmark and way of answering: McNemar's test of the questions that both models answered."""
    first, second = results
    found: dict[str, dict[str, Discordant]] = {}
    for name in first.benchmarks:
        one, other = (rights(BENCHMARKS[name], model.benchmarks[name].answers) for model in (first, second))
        for way in (way for way in one if way in other):
            both = sorted(one[way].keys() & other[way].keys())
            if both:
                tested = mcnemar([one[way][own] for own in both], [other[way][own] for own in both])
                found.setdefault(name, {})[way] = tested
    return found


def records_table(results: Sequence[ModelResult]) -> pa.Table:
    """Every record of the preference data that any model scored: the columns of the scores and the margins, those of a second
    model behind `compare_`."""
    sets = {("compare_" if r.role == "compare" else ""): r.dataset.pairs for r in results if r.dataset is not None}
    ids = list(dict.fromkeys(own for pairs in sets.values() for own in pairs.ids))
    columns: dict[str, pa.Array] = {"id": pa.array(ids, pa.string())}
    for prefix, pairs in sets.items():
        places = {own: place for place, own in enumerate(pairs.ids)}
        take = np.array([places.get(own, -1) for own in ids], dtype=np.int64)
        margins = {f"margin_{name}": values for name, values in pairs.margins().items()}
        for name, values in {**pairs.columns, **margins}.items():
            taken = np.where(take >= 0, values[take], np.nan) if len(values) else np.full(len(ids), np.nan)
            columns[prefix + name] = pa.array(taken, pa.float64(), from_pandas=True)
    return pa.table(columns)


def questions_table(results: Sequence[ModelResult]) -> pa.Table:
    """Every question of the benchmarks that a model answered, with its answers."""
    rows: list[dict[str, Any]] = []
    for result in results:
        for name, one in result.benchmarks.items():
            judged = {said.item.id: said.text for said in one.answers.judged}
            named = {"model": result.role, "benchmark": name}
            for way, said in one.answers.choices.items():
                rows += [{**named, "id": s.item.id, "way": way, "said": s.text, "answer": s.item.answer} for s in said]
            for scorer, preferred in one.answers.preferred.items():
                rows += [{**named, "id": p.item.id, "way": scorer, "margin": p.margin} for p in preferred]
            rows += [
                {**named, "id": s.item.id, "way": "text", "said": s.text, "judgement": judged.get(s.item.id)}
                for s in one.answers.texts
            ]
            rows += [{**named, "id": own, "way": "unanswered"} for own in one.answers.unanswered]
    names = ("model", "benchmark", "id", "way", "said", "answer", "judgement")
    schema = pa.schema([*((name, pa.string()) for name in names), ("margin", pa.float64())])
    return pa.Table.from_pylist(rows, schema=schema)


def rows_of_metrics(results: Sequence[ModelResult]) -> list[tuple[str, list[Metric | None]]]:
    """Each metric with its value of each model: those of the data first, then those of the benchmarks."""
    by_model: list[dict[str, Metric]] = []
    for result in results:
        own: dict[str, Metric] = dict(result.dataset.metrics) if result.dataset is not None else {}
        for name, one in result.benchmarks.items():
            own |= {f"{name} ({way}): {metric}": value for way, inner in one.metrics.items() for metric, value in inner.items()}
        by_model.append(own)
    names = dict.fromkeys(name for own in by_model for name in own)
    return [(name, [own.get(name) for own in by_model]) for name in names]


def in_words(metric: Metric | None) -> str:
    """A metric as the table and the page show it."""
    if metric is None:
        return "-"
    if isinstance(metric, Estimate) and metric.records > 1:  # one record tells of no spread
        return f"{_number(metric.value)} [{_number(metric.low)}, {_number(metric.high)}]"
    return _number(metric.value if isinstance(metric, Estimate) else metric)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def table_text(results: Sequence[ModelResult], *, seed: int) -> str:
    """All metrics as lines for a terminal."""
    rows = [(name, *map(in_words, values)) for name, values in rows_of_metrics(results)]
    heads = ("metric [95 % interval]", *(result.role for result in results))
    widths = [max(len(row[k]) for row in (heads, *rows)) for k in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.append("")
    lines += [f"{r.role}: {r.name}" + (f", reference {r.reference}" if r.reference else "") for r in results]
    lines += _dropped_lines(results)
    if len(results) == 2:
        lines += ["", *comparison_lines(results, seed=seed)]
    return "\n".join(lines) + "\n"


def _dropped_lines(results: Sequence[ModelResult]) -> list[str]:
    lines = []
    for result in results:
        if result.dataset is not None:
            dropped = sum(result.dataset.dropped.values())
            lines.append(f"{result.role}: {len(result.dataset.pairs.ids)} records, {dropped} dropped")
        for one in result.benchmarks.values():
            unanswered, left_out = len(one.answers.unanswered), len(one.left_out)
            lines.append(
                f"{result.role}: {one.title}: {one.num_questions} questions, {unanswered} unanswered, {left_out} rows left out"
            )
    return lines


def comparison_lines(results: Sequence[ModelResult], *, seed: int) -> list[str]:
    """The paired tests in sentences."""
    lines = []
    found = comparison_of(results, seed=seed)
    if found is not None:
        for scorer, test in found.accuracies.items():
            lines.append(f"{SCORERS.get(scorer, scorer)}, {found.records} records: {_test_in_words(test)}")
            if scorer in found.margins:
                margin = found.margins[scorer]
                interval = f"[{margin.low:+.3f}, {margin.high:+.3f}]"
                lines[-1] += f"; margin of the first {margin.value:+.3f} {interval} higher, p = {margin.p_value:.2g}"
    for name, by_way in benchmark_comparisons(results).items():
        lines += [f"{name} ({way}): {_test_in_words(test)}" for way, test in by_way.items()]
    return lines


def _test_in_words(test: Discordant) -> str:
    return f"only the first right {test.only_first}, only the second {test.only_second}, McNemar p = {test.p_value:.2g}"
