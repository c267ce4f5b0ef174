"""Benchmarks as a model is asked them: questions drawn from their files, the rows that a pool runs over, and the metrics of
what came out. `evaluate` asks in a pool of workers; a run asks its checkpoints beside the training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayalign.evaluation.benchmarks.benchmark import Benchmark, Contents, Item, Metrics, Preferred, Said, image_folder
from rayalign.evaluation.benchmarks.shelf import BENCHMARKS
from rayalign.evaluation.preferences import IMPLICIT_REWARD, LIKELIHOOD, PER_TOKEN, REWARD_MODEL, Pairs, pairs_of
from rayalign.evaluation.questions import BY_LOGP, BY_TEXT, Answers, answers_of, draw, metrics_of, rows_of
from rayalign.evaluation.statistics import Estimate
from rayalign.storage import Store

CHIEF_WAYS = (BY_LOGP, REWARD_MODEL, IMPLICIT_REWARD, LIKELIHOOD, PER_TOKEN, BY_TEXT)
"""The ways of answering, the chief one first."""


@dataclass(frozen=True)
class Exam:
    """A benchmark as it is asked: its files' contents, the questions drawn of them, and their rows."""

    name: str
    benchmark: Benchmark
    contents: Contents
    items: Sequence[Item]
    rows: Sequence[Mapping[str, Any]]


def read_exam(
    name: str, place: str, *, image_root: str | None, max_questions: int | None, seed: int, flag: str = "--benchmarks"
) -> Exam:
    """Reads a benchmark's files. Raises ValueError, which begins with the `flag` that named it."""
    benchmark = BENCHMARKS[name]
    try:
        contents = benchmark.read(Store.at(place))
        images = image_folder(contents, Store.at(image_root) if image_root else None)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{flag} {name}:{place}: {error}") from None
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{flag} {name}:{place}: its files hold something else than this benchmark's ({type(error).__name__}: {error}). It "
            f"needs {benchmark.files}."
        ) from error
    items = draw(contents.items, max_questions, seed=seed)
    return Exam(name, benchmark, contents, items, rows_of(items, benchmark, images))


def answers_in(exam: Exam, table: pa.Table, make_pairs: Callable[[pa.Table], Pairs] = pairs_of) -> Answers:
    """The answers to an exam in a pool's results."""
    lines = {line["id"]: line for line in table.to_pylist()}
    pairs = make_pairs(table) if any(item.kind == "pair" for item in exam.items) else None
    return answers_of(exam.items, lines, pairs)


def figures_of(exam: Exam, answers: Answers) -> dict[str, float]:
    """An exam's metrics as numbers, by the names BENCHMARK/METRIC; of a metric that is told in several ways, the chief one's is
    called so (the likeliest option, else the scorer that stands nearest to the training), the others BENCHMARK/WAY/METRIC."""
    by_way: Mapping[str, Metrics] = metrics_of(exam.benchmark, exam.contents, answers)
    found: dict[str, float] = {}
    for way in sorted(by_way, key=CHIEF_WAYS.index):
        for name, value in by_way[way].items():
            short = f"{exam.name}/{name}"
            own = short if short not in found else f"{exam.name}/{way}/{name}"
            found[own] = value.value if isinstance(value, Estimate) else float(value)
    return found


def figures_to_come(exam: Exam, *, is_reward_model: bool) -> list[str]:
    """The names that `figures_of` will give of a model that answers every question."""
    scorers = (REWARD_MODEL,) if is_reward_model else (LIKELIHOOD, PER_TOKEN)
    ways = (REWARD_MODEL,) if is_reward_model else (BY_LOGP, BY_TEXT)
    kinds = {kind: [item for item in exam.items if item.kind == kind] for kind in ("choice", "pair", "open")}
    answers = Answers(
        choices={way: [Said(item, item.responses[0]) for item in kinds["choice"]] for way in ways if kinds["choice"]},
        preferred={name: [Preferred(item, 1.0) for item in kinds["pair"]] for name in scorers if kinds["pair"]},
        texts=[] if is_reward_model else [Said(item, "") for item in kinds["open"]],
    )
    return list(figures_of(exam, answers))
