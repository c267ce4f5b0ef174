"""Scores by a Python function of the user's: rules, known answers, programs that check a response."""

import functools
import hashlib
import json
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign.config.config import Config
from rayalign.config.plugins import Plugin, find_plugin
from rayalign.data.rows import Sources
from rayalign.evaluation.scorers.scorer import Candidate, Score, Scored, ScoreFunction
from rayalign.formats.records import RecordError
from rayalign.models.source import ModelSource


@dataclass(frozen=True)
class FunctionScorer:
    """`name` is a function of a module: it takes a list of dicts and returns a number for each, or None where it has none.
    The dicts have `id`, `system`, `query`, `history`, `images` ({"bytes", "path"} each), `response`, `sample`, and `extra`, a
    dict of what else the prompt's row held."""

    module: Plugin
    name: str

    kind = "python"
    source: ModelSource | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        digest = hashlib.sha256(self.module.text).hexdigest()
        return {"kind": self.kind, "module": self.module.name, "function": self.name, "text": digest}

    def load(self, config: Config, sources: Sources) -> ScoreFunction:
        function = getattr(self.module.module, self.name, None)
        if not callable(function):
            raise ValueError(f"--scorer python={self.module.argument}:{self.name}: the module has no function {self.name}.")
        return functools.partial(_score, function)


def _score(function: Any, candidates: Sequence[Candidate]) -> list[Scored]:
    rows = [
        {"id": c.record.id, **c.columns, "extra": json.loads(c.columns["extra"]) if c.columns["extra"] else {}}
        for c in candidates
    ]
    try:
        values = list(function(rows))
    except (Exception, SystemExit) as error:  # an OSError of its own is no failure of our storage
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split())
        raise RecordError(
            "scorer failed",
            f"the scorer raised {type(error).__name__}: {words} ({Path(place.filename).name}, line {place.lineno})",
        ) from error
    if len(values) != len(rows):
        raise RecordError("scorer failed", f"the scorer returned {len(values)} scores for {len(rows)} responses")
    return [_scored(value) for value in values]


def _scored(value: Any) -> Scored:
    try:
        number = math.nan if value is None or isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    return Score(number) if math.isfinite(number) else RecordError("no score", f"the scorer returned {value}")


def function_scorer(argument: str) -> FunctionScorer:
    """The scorer of MODULE:FUNCTION or FILE.py:FUNCTION, whose text goes to all workers. Raises ValueError for what is none."""
    place, sign, name = argument.rpartition(":")
    if not (sign and place and name.isidentifier()):
        raise ValueError(f"--scorer python={argument}: expected MODULE:FUNCTION or FILE.py:FUNCTION.")
    scorer = FunctionScorer(find_plugin(place, flag="--scorer python"), name)
    try:
        module = scorer.module.module
    except ValueError as error:
        raise ValueError(str(error).replace("--plugin", "--scorer python")) from error.__cause__
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--scorer python={argument}: the module has no function {name}.")
    return scorer
