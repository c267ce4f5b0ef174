"""The verb evaluate: any model, adapter, reward model or scorer on preference data and on benchmarks, alone or beside a second
one.

Each model runs once over each data set and benchmark, in a pool that goes on where it was ended; metrics are made of the pool's
results here.
"""

import dataclasses
import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from rayalign.config.config import Config
from rayalign.config.evaluate import ALL_CHECKS, EvaluateConfig
from rayalign.config.inference import InferenceConfig
from rayalign.config.sections import ClusterConfig
from rayalign.data.rows import Sources
from rayalign.evaluation import pair_scores, scored_pairs
from rayalign.evaluation.benchmarks.benchmark import Said
from rayalign.evaluation.benchmarks.shelf import BENCHMARKS, parse_benchmarks
from rayalign.evaluation.contenders import Contender, contenders_of
from rayalign.evaluation.exams import Exam, answers_in, read_exam
from rayalign.evaluation.groups import Group, groups_of_datasets, groups_of_rows
from rayalign.evaluation.judge import Judge, judge_all
from rayalign.evaluation.pair_scores import Scoring
from rayalign.evaluation.pool import run_pool
from rayalign.evaluation.pool_folder import DROPPED, read_results
from rayalign.evaluation.preferences import DEFAULT_BETA, Pairs, is_of_reward_model, pairs_of
from rayalign.evaluation.questions import Answers, fingerprint, metrics_of
from rayalign.evaluation.results import METRICS, BenchmarkResult, DatasetResult, ModelResult, table_text, write_results
from rayalign.evaluation.results_page import page_of
from rayalign.evaluation.score import names_of
from rayalign.evaluation.score_columns import SCHEMA, VIEWS, View, scored_schema
from rayalign.evaluation.scorers.by_judge import judge_key
from rayalign.evaluation.start import (
    config_of,
    files_of_data,
    files_of_model,
    is_reward_model_here,
    on_cluster,
    sources_of,
)
from rayalign.evaluation.work import Work
from rayalign.report.evaluation_page import render_evaluation
from rayalign.storage import Store

logger = logging.getLogger(__name__)

SCORES, JUDGEMENTS, PAGE, DATA = "scores", "judgements", "evaluation.html", "dataset"


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its folder, and all metrics as a table in words."""

    folder: Store
    table: str

    @property
    def output_dir(self) -> str:
        """The folder of the results: an absolute path or a URL."""
        return self.folder.location

    @property
    def page(self) -> str:
        """The path or URL of evaluation.html."""
        return (self.folder / PAGE).location

    @property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json says."""
        return (self.folder / METRICS).read_json_object()


@dataclass(frozen=True)
class Suite:
    """What a pool runs over: groups of rows, how their images are found, what tells them from others, the views that are
    wanted, and whether responses are drawn."""

    name: str
    groups: Sequence[Group]
    sources: Sources
    settings: Mapping[str, Any]
    views: tuple[View, ...] = ()
    samples_kl: bool = False


@dataclass(frozen=True)
class Scored:
    """A pool's results, and by reason the number of rows that gave none."""

    table: pa.Table
    dropped: Mapping[str, int] = field(default_factory=dict)


def run(flags: InferenceConfig, evaluation: EvaluateConfig) -> Evaluation:
    """Evaluates, and writes metrics.json, records.parquet and evaluation.html into --output_dir.

    Raises ValueError for models, data, benchmarks and flags that can't be used.
    """
    config = config_of(flags)
    output = Store.at(str(config.run.output_dir))
    exams = [_read_exam(name, place, config, evaluation) for name, place in parse_benchmarks(evaluation.benchmarks).items()]
    if not (config.data.dataset or exams):
        raise ValueError("Nothing to evaluate on: pass --dataset with preference data, --benchmarks, or both.")
    if evaluation.max_questions is not None and not exams:
        raise ValueError("--max_questions: there are no --benchmarks, whose questions it draws. Leave it out.")
    _require_pairs(evaluation, exams)
    if not config.data.dataset:
        _require_no_flags_of_data(evaluation, exams)
    judge = _judge_of(evaluation, exams)
    data_sources = sources_of(config) if config.data.dataset else None
    contenders = contenders_of(config, evaluation)
    _require_writers(contenders, exams)
    found: dict[str, dict[str, Scored]] = {}
    with on_cluster(config, model=contenders[0].source) as placed:
        suites = [_suite_of_exam(exam, config) for exam in exams]
        if data_sources is not None:
            suites.insert(0, _suite_of_data(data_sources, config, evaluation))
        for contender in contenders:
            found[contender.role] = {
                suite.name: _score(suite, contender, placed.cluster, output, overwrite=flags.overwrite) for suite in suites
            }
    if flags.overwrite:
        (output / JUDGEMENTS).delete()
    results = [
        _result(contender, found[contender.role], exams, judge, output, evaluation, config.data.data_seed)
        for contender in contenders
    ]
    used, seed = {**dataclasses.asdict(flags), **dataclasses.asdict(evaluation)}, config.data.data_seed
    write_results(output, results, flags=used, seed=seed)
    (output / PAGE).write_bytes(render_evaluation(page_of(results, flags=used, seed=seed)).encode())
    logger.info("Evaluation: %s", (output / PAGE).location)
    return Evaluation(output, table_text(results, seed=seed))


def _read_exam(name: str, place: str, config: Config, evaluation: EvaluateConfig) -> Exam:
    exam = read_exam(
        name,
        place,
        image_root=config.data.image_root,
        max_questions=evaluation.max_questions,
        seed=config.data.data_seed,
    )
    title, rows = exam.benchmark.title, exam.contents.left_out
    for left_out in rows[:3]:
        logger.warning("%s: left out %s: %s", title, left_out.place, left_out.reason)
    if rows:
        logger.warning("%s: %d rows of its files are left out; metrics.json lists them", title, len(rows))
    return exam


def _require_pairs(evaluation: EvaluateConfig, exams: Sequence[Exam]) -> None:
    """Raises ValueError for a benchmark that scorers have nothing to score in."""
    asking = next((exam.name for exam in exams if exam.benchmark.of_pairs is None), None)
    if evaluation.scorer and asking is not None:
        of_pairs = ", ".join(name for name, benchmark in BENCHMARKS.items() if benchmark.of_pairs is not None)
        raise ValueError(
            f"--benchmarks {asking}: its questions are answered by a model, and --scorer {' '.join(evaluation.scorer)} scores "
            f"pairs. Those of pairs are {of_pairs}; for the others pass --model without --scorer."
        )


def _require_writers(contenders: Sequence[Contender], exams: Sequence[Exam]) -> None:
    """Raises ValueError for a benchmark of texts with a reward model in a folder of this machine; of others the actors find out
    that no row can be used."""
    asking = next((exam.name for exam in exams if all(item.kind == "open" for item in exam.items)), None)
    silent = next((one for one in contenders if one.source and not one.scorers and is_reward_model_here(one.source)), None)
    if asking is not None and silent is not None:
        raise ValueError(
            f"--benchmarks {asking}: asks for texts, and --{silent.role} {silent.name} is a reward model, which scores "
            "responses and writes none. Leave one of them out."
        )


def _require_no_flags_of_data(evaluation: EvaluateConfig, exams: Sequence[Exam]) -> None:
    """Raises ValueError for flags that change nothing where there is no preference data."""
    if evaluation.image_checks not in (ALL_CHECKS, ("none",)):
        raise ValueError(
            f"--image_checks {' '.join(evaluation.image_checks)}: there is no --dataset, whose pairs are scored with wrong "
            "pictures. Leave it out."
        )
    if evaluation.beta is not None and all(exam.benchmark.of_pairs is None for exam in exams):
        raise ValueError(
            f"--beta {evaluation.beta:g}: is the factor of pairs' implicit rewards, and --benchmarks "
            f"{' '.join(exam.name for exam in exams)} without --dataset has none. Leave it out."
        )


def _judge_of(evaluation: EvaluateConfig, exams: Sequence[Exam]) -> Judge | None:
    needing = [exam.name for exam in exams if exam.benchmark.judge_prompt is not None]
    if evaluation.judge_url and evaluation.judge_model:  # (--judge_model alone may name the judge of --scorer)
        if not needing:
            raise ValueError("--judge_url: no benchmark of --benchmarks has answers that a judge rates. Leave it out.")
        judge_key()  # what is wrong with it is told before any work
        return Judge(evaluation.judge_url, evaluation.judge_model)
    if needing:
        raise ValueError(f"--benchmarks {needing[0]}: its answers are rated by a judge. Pass --judge_url and --judge_model.")
    return None


def _suite_of_data(sources: Sources, config: Config, evaluation: EvaluateConfig) -> Suite:
    views = tuple(view for view in VIEWS if view in evaluation.image_checks)
    groups = groups_of_datasets(sources, seed=config.data.data_seed)
    return Suite(
        DATA, groups, sources, {**files_of_data(sources), "data_seed": config.data.data_seed}, views, evaluation.sample_kl
    )


def _suite_of_exam(exam: Exam, config: Config) -> Suite:
    sources = Sources((), None, config.data.allow_image_urls)  # the rows have the folder of their images
    return Suite(exam.name, groups_of_rows(exam.rows), sources, {"questions": fingerprint(exam.rows)})


def _score(suite: Suite, contender: Contender, cluster: ClusterConfig, output: Store, *, overwrite: bool) -> Scored:
    folder = output / SCORES / f"{suite.name}_{contender.role}"
    config = dataclasses.replace(contender.config, cluster=cluster)
    make, schema, settings = _by_scorers(suite, contender, config) if contender.scorers else _by_model(suite, contender, config)
    logger.info("%s: %s", suite.name, contender.name)
    run_pool(
        suite.groups,
        make,
        folder,
        schema=schema,
        settings={**suite.settings, **settings},
        cluster=cluster,
        what=f"rows of {suite.name}",
        overwrite=overwrite,
    )
    reasons = Counter(json.loads(line)["reason"] for line in (folder / DROPPED).read_bytes().decode().splitlines())
    return Scored(pa.concat_tables(read_results(folder)), dict(reasons))


WorkOf = tuple[Callable[[], Work], pa.Schema, Mapping[str, Any]]
"""What makes the work of an actor, the columns of its results, and what these depend on beside the rows."""


def _by_model(suite: Suite, contender: Contender, config: Config) -> WorkOf:
    scoring = Scoring(config, suite.sources, contender.reference, suite.views, suite.samples_kl)
    files = {"model": contender.source, "reference": contender.reference_source}
    settings = {name: files_of_model(source) if source else None for name, source in files.items()}
    return functools.partial(pair_scores.make_work, scoring), SCHEMA, {**settings, **scoring.settings()}


def _by_scorers(suite: Suite, contender: Contender, config: Config) -> WorkOf:
    settings = {
        "scorers": [dict(scorer.settings) for scorer in contender.scorers],
        "dtype": config.model.dtype,
        "max_length": config.data.max_length,
        "max_pixels": config.data.max_pixels,
    }
    make = functools.partial(scored_pairs.make_work, config, suite.sources, contender.scorers)
    return make, scored_schema(names_of(contender.scorers)), settings


def _result(
    contender: Contender,
    scored: Mapping[str, Scored],
    exams: Sequence[Exam],
    judge: Judge | None,
    output: Store,
    evaluation: EvaluateConfig,
    seed: int,
) -> ModelResult:
    """The results of one model, or of the scorers. Raises ValueError where no record has a score."""
    make_pairs = functools.partial(pairs_of, beta=evaluation.beta or DEFAULT_BETA, ensemble=evaluation.ensemble)
    dataset, reference = None, contender.reference_source
    if all(is_of_reward_model(one.table) for one in scored.values()):
        reference = None  # it has no log-probs to compare
    if DATA in scored:
        of_data = scored[DATA]
        dataset = DatasetResult.of(make_pairs(of_data.table), of_data.dropped, seed=seed)
    benchmarks = {exam.name: _benchmark_result(exam, contender, scored[exam.name], judge, output, make_pairs) for exam in exams}
    named = (reference.adapter or reference.base) if reference else None
    return ModelResult(contender.role, contender.name, named, dataset, benchmarks)


def _benchmark_result(
    exam: Exam,
    contender: Contender,
    scored: Scored,
    judge: Judge | None,
    output: Store,
    make_pairs: Callable[[pa.Table], Pairs],
) -> BenchmarkResult:
    answers = answers_in(exam, scored.table, make_pairs)
    if exam.benchmark.judge_prompt is not None and judge is not None:
        answers = _judged(exam, answers, judge, output / JUDGEMENTS / f"{exam.name}_{contender.role}.jsonl")
    return BenchmarkResult(
        name=exam.name,
        title=exam.benchmark.title,
        answers=answers,
        metrics=metrics_of(exam.benchmark, exam.contents, answers),
        num_questions=len(exam.items),
        left_out=exam.contents.left_out,
        dropped=scored.dropped,
    )


def _judged(exam: Exam, answers: Answers, judge: Judge, kept: Store) -> Answers:
    """The answers with what the judge says to each of the model's own texts."""
    make_prompt = exam.benchmark.judge_prompt
    assert make_prompt is not None
    prompts = {said.item.id: make_prompt(said, exam.contents.shared) for said in answers.texts}
    judgements = judge_all(judge, prompts, kept)
    return dataclasses.replace(answers, judged=[Said(said.item, judgements[said.item.id]) for said in answers.texts])
