"""Pairs under the scorers of --scorer, in a model's place: what each one makes of both responses.

Runs in the actors of `pool`; `preferences` makes metrics of the results.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from rayalign.config.config import Config
from rayalign.data.rows import Sources
from rayalign.evaluation.groups import Row
from rayalign.evaluation.score import candidates_of, names_of
from rayalign.evaluation.score_columns import scored_column
from rayalign.evaluation.scorers.scorer import Candidate, Score, Scored, ScoreFunction, Scorer
from rayalign.evaluation.work import Result, Work
from rayalign.formats.records import RecordError


def make_work(config: Config, sources: Sources, scorers: Sequence[Scorer]) -> Work:
    """Called once in each actor: loads what the scorers need."""
    functions = dict(zip(names_of(scorers), (scorer.load(config, sources) for scorer in scorers), strict=True))
    return functools.partial(_score_rows, functions, sources)


def _score_rows(functions: Mapping[str, ScoreFunction], sources: Sources, rows: Sequence[Row]) -> list[Result]:
    """One line of `score_columns.scored_schema` for each row, or the RecordError of one that is no pair, or that a scorer has
    no score for."""
    results: list[Result | None] = [None] * len(rows)
    pairs: dict[int, Sequence[Candidate]] = {}
    for number, row in enumerate(rows):
        try:
            pairs[number] = _pair_of(row, sources)
        except RecordError as error:
            results[number] = error
    candidates = [candidate for pair in pairs.values() for candidate in pair]
    scores = {name: iter(function(candidates)) for name, function in functions.items()}
    for number, pair in pairs.items():
        results[number] = _line(pair, {name: [next(those) for _ in pair] for name, those in scores.items()})
    return [result for result in results if result is not None]


def _pair_of(row: Row, sources: Sources) -> Sequence[Candidate]:
    pair = list(candidates_of(row, sources))
    if len(pair) == 1:
        raise RecordError("missing field", "the record has one response, and a pair has two", field="rejected_response")
    return pair


def _line(pair: Sequence[Candidate], scores: Mapping[str, Sequence[Scored]]) -> Result:
    line: dict[str, Any] = {"num_images": len(pair[0].record.images)}
    for position, candidate in enumerate(pair):
        side = candidate.columns["side"]
        line[f"{side}_characters"] = len(candidate.columns["response"])
        said = []
        for name, both in scores.items():
            score = both[position]
            if not isinstance(score, Score):
                return score
            line[scored_column(name, side)] = score.value
            said += [] if score.said is None else [score.said]
        line[f"{side}_judgements"] = said or None
    return [line]
