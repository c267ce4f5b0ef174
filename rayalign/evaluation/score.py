"""The verb `score`: numbers for the responses of data sets, by one scorer or several, by a pool of workers."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from rayalign.config.config import Config
from rayalign.config.inference import InferenceConfig
from rayalign.config.inference_verbs import SCORERS, ScoreConfig
from rayalign.config.sections import ModelConfig
from rayalign.data.rows import Sources
from rayalign.evaluation.groups import groups_of_datasets
from rayalign.evaluation.pool import PoolResult, run_pool
from rayalign.evaluation.prompts import PROMPT_FIELDS, prompt_columns
from rayalign.evaluation.scorers.by_function import function_scorer
from rayalign.evaluation.scorers.by_judge import judge_scorer
from rayalign.evaluation.scorers.by_model import KINDS, model_scorer
from rayalign.evaluation.scorers.scorer import Candidate, Scored, ScoreFunction, Scorer
from rayalign.evaluation.start import config_of, files_of_data, on_cluster, pictures_of_rows, sources_of
from rayalign.evaluation.work import Result, Work
from rayalign.formats.columns import renamed
from rayalign.formats.parse import parse_row
from rayalign.formats.records import RecordError, record_errors
from rayalign.sources.whole_paths import whole_model
from rayalign.storage import Store


def run(flags: InferenceConfig, own: ScoreConfig) -> PoolResult:
    """Scores the responses that have no score yet, and returns the folder of all of them.

    Raises ValueError for what the user can fix, and RunFailed where the cluster failed.
    """
    config = config_of(flags)
    scorers, sources = scorers_of(own, config.model), sources_of(config)
    settings = {
        "verb": "score",
        "scorers": [dict(scorer.settings) for scorer in scorers],
        "ensemble": own.ensemble,
        "data": files_of_data(sources),
        **pictures_of_rows(sources),
        "data_seed": flags.data_seed,
        "dtype": flags.dtype,
        "max_length": flags.max_length,
        "max_pixels": flags.max_pixels,
    }
    with on_cluster(config, model=next((scorer.source for scorer in scorers if scorer.source), None)) as config:
        return run_pool(
            groups_of_datasets(sources, seed=flags.data_seed),
            functools.partial(make_scoring, config, sources, scorers, own.ensemble),
            Store.at(str(config.run.output_dir)),
            schema=score_schema(scorers),
            settings=settings,
            cluster=config.cluster,
            what="records",
            overwrite=flags.overwrite,
        )


def scorers_of(own: ScoreConfig, model: ModelConfig) -> tuple[Scorer, ...]:
    """The scorers that the words of --scorer name; `model` is that of --model. Raises ValueError for what is none, and for
    flags that no scorer uses."""
    if not own.scorer:
        raise ValueError(f"No scorer given: pass --scorer with {', '.join(SCORERS)}; --help says more.")
    scorers: list[Scorer] = []
    uses_model = False
    kinds = [word.partition("=")[0] for word in own.scorer]
    for word in own.scorer:
        kind, _, what = word.partition("=")
        if kind == "python":
            scorers.append(function_scorer(what))
        elif kind == "judge":
            judge = judge_scorer(what, model=own.judge_model, prompt_file=own.judge_prompt, pattern=own.judge_pattern)
            scorers.append(judge)
        elif kind in KINDS:
            named = dataclasses.replace(model, model=whole_model(what), model_type=None, adapter=None) if what else model
            uses_model |= not what
            if not (named.model or named.model_type or named.adapter):
                raise ValueError(f"--scorer {kind}: no model given. Write {kind}=FOLDER, or pass --model.")
            try:
                scorers.append(model_scorer(kind, named, beta=own.beta, reference=own.reference))
            except ValueError as error:
                raise ValueError(str(error).replace(f"--model {named.model}:", f"--scorer {word}:")) from None
        else:
            raise ValueError(f"--scorer {word}: must be one of {', '.join(SCORERS)}.")
    unused = {
        "model": (model.model or model.model_type or model.adapter) and not uses_model,
        "beta": own.beta is not None and "implicit_reward" not in kinds,
        "reference": own.reference is not None and "implicit_reward" not in kinds,
        "judge_model": own.judge_model is not None and "judge" not in kinds,
        "judge_prompt": own.judge_prompt is not None and "judge" not in kinds,
        "judge_pattern": own.judge_pattern != ScoreConfig().judge_pattern and "judge" not in kinds,
    }
    for name, is_unused in unused.items():
        if is_unused:
            raise ValueError(f"--{name}: no scorer of --scorer {' '.join(own.scorer)} uses it. Leave it out.")
    if own.ensemble != ScoreConfig().ensemble and len(scorers) == 1:
        raise ValueError(
            f"--ensemble {own.ensemble}: --scorer {own.scorer[0]} is the only scorer. Leave it out, or give another."
        )
    return tuple(scorers)


def names_of(scorers: Sequence[Scorer]) -> list[str]:
    """What the scorers are called in the results: their kinds, numbered where there are several of one."""
    kinds = [scorer.kind for scorer in scorers]
    return [kind if kinds.count(kind) == 1 else f"{kind}_{kinds[:i].count(kind) + 1}" for i, kind in enumerate(kinds)]


def score_schema(scorers: Sequence[Scorer]) -> pa.Schema:
    """A scored response: its prompt and the prompt's id, its number among the prompt's responses (`sample`) and which response
    of a pair it is (`side`), whether it ended by itself, the score, that of each scorer, and what judges wrote."""
    return pa.schema(
        [
            *PROMPT_FIELDS,
            ("prompt_id", pa.string()),
            ("sample", pa.int32()),
            ("side", pa.string()),
            ("response", pa.string()),
            ("is_ended", pa.bool_()),
            ("score", pa.float64()),
            ("scores", pa.struct([(name, pa.float64()) for name in names_of(scorers)])),
            ("judgements", pa.list_(pa.string())),
        ]
    )


def make_scoring(config: Config, sources: Sources, scorers: Sequence[Scorer], ensemble: str) -> Work:
    """What an actor does with records: it scores each of their responses."""
    functions = [scorer.load(config, sources) for scorer in scorers]
    return functools.partial(score_rows, functions, names_of(scorers), sources, ensemble)


def score_rows(
    functions: Sequence[ScoreFunction], names: Sequence[str], sources: Sources, ensemble: str, rows: Sequence[Mapping[str, Any]]
) -> list[Result]:
    """A line of `score_schema` for each response of rows of `groups.FileRows`, or why there is none."""
    candidates: list[tuple[int, Candidate]] = []
    results: dict[int, Any] = {}
    for i, row in enumerate(rows):
        try:
            candidates += [(i, candidate) for candidate in candidates_of(row, sources)]
            results[i] = []
        except RecordError as error:
            results[i] = error
    all_scores = [function([candidate for _, candidate in candidates]) for function in functions]
    for (i, candidate), scores in zip(candidates, zip(*all_scores, strict=True), strict=True):
        line = _line(candidate, scores, names, ensemble)
        if isinstance(results[i], list):
            results[i] = line if isinstance(line, RecordError) else [*results[i], line]
    return [results[i] for i in range(len(rows))]


def candidates_of(row: Mapping[str, Any], sources: Sources) -> Iterable[Candidate]:
    """The responses of a row of `groups.FileRows`, one or a pair's two. Raises RecordError for what is wrong with it."""
    with record_errors():
        raw = renamed(row["row"], sources.columns)
        record = parse_row(raw, id=row["id"])
        columns = prompt_columns(record, row, sources)
        columns |= {"prompt_id": str(raw.get("prompt_id") or raw.get("id") or row["id"]), "sample": _sample(raw.get("sample"))}
        columns["is_ended"] = raw.get("is_ended") is not False
    sides = {"chosen": record.chosen, "rejected": record.rejected} if record.rejected is not None else {None: record.chosen}
    plain = record.model_copy(update={"rejected": None, "label": None})
    return [
        Candidate(plain.model_copy(update={"chosen": text}), row["folder"], {**columns, "side": side, "response": text})
        for side, text in sides.items()
    ]


def _sample(value: Any) -> int:
    """A response's number as `generate` writes it; a column of the user's own that has its name holds anything."""
    return value if type(value) is int and 0 <= value < 2**31 else 0


def _line(
    candidate: Candidate, scores: Sequence[Scored], names: Sequence[str], ensemble: str
) -> Mapping[str, Any] | RecordError:
    values = []
    for score in scores:
        if isinstance(score, RecordError):
            return score
        if not math.isfinite(score.value):
            return RecordError("no score", f"the score is {score.value}")
        values.append(score.value)
    said = [score.said for score in scores if not isinstance(score, RecordError) and score.said is not None]
    together = min(values) if ensemble == "min" else sum(values) / len(values)
    named = dict(zip(names, values, strict=True))
    return {**candidate.columns, "score": together, "scores": named, "judgements": said or None}
