"""Benchmarks beside the training (--eval_benchmarks): the driver has each checkpoint judged once it is whole, one at a time, in
a process of its own that loads what the checkpoint trains. The workers are not asked and do not wait.

Ray Train's own validation is not used: it judges checkpoints that are reported to it, and the workers could not read what comes
out. `benchmark_results` are the files.
"""

import contextlib
import logging
import pickle
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import ray
from ray import cloudpickle

from rayalign.config.config import Config
from rayalign.data.rows import Sources
from rayalign.evaluation.benchmarks.shelf import parse_benchmarks
from rayalign.evaluation.exams import Exam, answers_in, figures_of, figures_to_come, read_exam
from rayalign.evaluation.groups import GROUP_ROWS
from rayalign.evaluation.pool_folder import ID, POSITION
from rayalign.evaluation.score_columns import SCHEMA
from rayalign.evaluation.work import Work, results_of
from rayalign.formats.records import RecordError
from rayalign.ray_errors import RAY_ERRORS, cause_in_words, user_error_in
from rayalign.ray_lines import quiet_logging
from rayalign.storage import Store
from rayalign.training.benchmark_results import BenchmarkResults, best_of
from rayalign.training.best import is_of_benchmark, metric_name, write_note
from rayalign.training.checkpoint_folder import Checkpoint
from rayalign.training.metric_names import EVALUATED
from rayalign.training.metrics import MetricsLog
from rayalign.training.sent_lines import key_of
from rayalign.training.sinks import reporting_of

logger = logging.getLogger(__name__)

FLAG = "--eval_benchmarks"
LOOK_SECONDS = 5.0
"""Between two looks for new checkpoints."""

MOST_TRIES = 2
"""How often a checkpoint is judged before it is left out."""

SHOWN = 3
"""Metrics of a benchmark that the log's line has; all are in metrics.jsonl."""

ROWS_AT_A_TIME = 8

Judge: TypeAlias = Callable[[Checkpoint, Callable[[], bool]], Mapping[str, float]]
"""What makes metrics of a checkpoint; it gives up once the function that it is given says so."""


def check_benchmarks(config: Config) -> None:
    """Reads the files of --eval_benchmarks. Raises ValueError for what can't be used, and for flags that would wait for their
    metrics."""
    run = config.run
    if not run.eval_benchmarks:
        return
    is_reward_model = config.algorithm.needs.head == "value"
    names: list[str] = []
    for exam in _exams(config):
        own = figures_to_come(exam, is_reward_model=is_reward_model)
        if exam.benchmark.judge_prompt is not None:
            raise ValueError(
                f"{FLAG} {exam.name}: its answers are rated by a judge, which no run waits for. Leave it out; the verb "
                "evaluate takes it, with --judge_url."
            )
        if not own:
            raise ValueError(
                f"{FLAG} {exam.name}: asks for texts, and {config.algorithm.name} trains a model that writes none."
            )
        names += own
    if not is_of_benchmark(run):
        return
    metric_name(run.metric_for_best_model, {EVALUATED + name: 0.0 for name in names})
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(run, name):
            raise ValueError(
                f"--{name} {str(getattr(run, name)).lower()} with --metric_for_best_model {run.metric_for_best_model}: "
                "benchmarks are evaluated beside the training, which does not wait for them. Leave one of the two out; "
                "`rayalign export --checkpoint best` writes the best model."
            )


def _exams(config: Config) -> list[Exam]:
    run, seed = config.run, config.data.data_seed
    return [
        read_exam(name, place, image_root=None, max_questions=run.max_eval_questions, seed=seed, flag=FLAG)
        for name, place in parse_benchmarks(run.eval_benchmarks, flag=FLAG).items()
    ]


@contextlib.contextmanager
def judged_beside(config: Config, judge: Judge, *, check: Callable[[], None] = lambda: None) -> Iterator[BenchmarkResults]:
    """Within it every checkpoint of the run that is whole is judged in a thread; at its end all are, and metrics.jsonl has
    what its workers did not write. `check` is called while that is waited for, and may raise."""
    results = BenchmarkResults(config)
    if not config.run.eval_benchmarks:
        yield results
        return
    jury = _Jury(config, results, judge)
    thread = threading.Thread(target=jury.run, name="benchmarks", daemon=True)
    thread.start()
    try:
        yield results
        jury.is_trained.set()
        waiting = BenchmarkResults(config).waiting()  # not the thread's own
        if waiting:
            logger.info("Benchmarks: waiting for checkpoints that are still to be judged (%d)", len(waiting))
        while thread.is_alive():
            thread.join(0.5)
            check()
    finally:
        jury.is_over.set()
        jury.is_trained.set()
        thread.join(LOOK_SECONDS)  # Ray must not be closed under its hands
    if jury.failure is not None:
        raise jury.failure
    _tell_rest(config, results)


class _Jury:
    """The thread's work. `is_trained`: no more checkpoints come; `is_over`: nobody waits any more."""

    def __init__(self, config: Config, results: BenchmarkResults, judge: Judge) -> None:
        self.is_trained, self.is_over = threading.Event(), threading.Event()
        self.failure: Exception | None = None
        self._config, self._results, self._judge = config, results, judge
        self._tries: Counter[str] = Counter()

    def run(self) -> None:
        try:
            while not self.is_over.is_set():
                is_last = self.is_trained.is_set()
                waiting = self._results.waiting()
                for checkpoint in waiting:
                    self._judge_one(checkpoint)
                if is_last and not waiting:
                    return
                self.is_trained.wait(LOOK_SECONDS)
        except Exception as error:  # noqa: BLE001  # raised again by the thread that waits for this one
            self.failure = error

    def _judge_one(self, checkpoint: Checkpoint) -> None:
        if self.is_over.is_set():
            return
        self._tries[checkpoint.store.name] += 1
        try:
            metrics = {EVALUATED + name: value for name, value in self._judge(checkpoint, self.is_over.is_set).items()}
        except Exception as error:  # noqa: BLE001  # whatever it is, the training is worth more than what is said of it
            if self.is_over.is_set():
                return
            problem = _in_words(error)
            logger.warning("Warning: the benchmarks of the checkpoint of step %d failed: %s", checkpoint.step, problem)
            if self._tries[checkpoint.store.name] >= MOST_TRIES:
                self._results.write(checkpoint, {}, problem=problem)
            return
        self._note_best(checkpoint, metrics)  # first: once it is judged, only the note keeps it
        self._results.write(checkpoint, metrics)
        for name in parse_benchmarks(self._config.run.eval_benchmarks):
            start = f"{EVALUATED}{name}/"
            shown = [f"{name}/{key.removeprefix(start)} {metrics[key]:.4g}" for key in metrics if key.startswith(start)]
            if shown:
                logger.info("Benchmark at step %d  %s", checkpoint.step, "  ".join(shown[:SHOWN]))
            else:
                logger.warning("Warning: %s: no question could be answered by the checkpoint of step %d", name, checkpoint.step)

    def _note_best(self, checkpoint: Checkpoint, metrics: Mapping[str, float]) -> None:
        if is_of_benchmark(self._config.run):
            best = best_of({**self._results.read(), checkpoint.step: metrics}, self._config.run)
            if best.step == checkpoint.step:
                write_note(self._results.folder, best, checkpoint.store.name)


def _in_words(error: Exception) -> str:
    if isinstance(error, RAY_ERRORS):
        return str(user_error_in(error) or cause_in_words(error))
    return f"{type(error).__name__}: {error}"


def _tell_rest(config: Config, results: BenchmarkResults) -> None:
    """Writes and sends the lines that came after the workers' last look."""
    log = MetricsLog(results.folder / "metrics.jsonl", start_step=sys.maxsize)
    told = {key_of(line) for line in log.lines}
    rest = [line for line in results.lines() if key_of(line) not in told]
    if not rest:
        return
    reporting = reporting_of(config.run.report_to, results.folder, config.to_dict(), lines=list(log.lines), sent=log.sent)
    for line in rest:
        log.append(line)
        reporting.log(line)
    log.flush()
    reporting.close()


def judge_on_cluster(config: Config) -> Judge:
    """A judge in tasks of Ray, each with the CPUs and GPUs of a train worker; it waits until there is room for them."""
    cluster = config.cluster
    options: dict[str, Any] = {"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker or 0}
    if cluster.accelerator_type:
        options["accelerator_type"] = cluster.accelerator_type
    if cluster.worker_labels:
        options["label_selector"] = cluster.worker_labels
    job = cloudpickle.dumps(config)

    def judge(checkpoint: Checkpoint, is_over: Callable[[], bool]) -> Mapping[str, float]:
        task = ray.remote(max_calls=1)(_judge_task).options(name="benchmarks", **options).remote(job, checkpoint.store)
        while not ray.wait([task], timeout=1)[0]:
            if is_over():
                ray.cancel(task, force=True)
                raise RuntimeError("nobody waits for it any more")
        return ray.get(task)

    return judge


def _judge_task(job: bytes, checkpoint: Store) -> dict[str, float]:
    quiet_logging()
    return judge_checkpoint(pickle.loads(job), checkpoint)


def judge_checkpoint(config: Config, checkpoint: Store) -> dict[str, float]:
    """The metrics of a checkpoint, BENCHMARK/METRIC and so on: what `rayalign evaluate` tells of its model. Runs on a GPU where
    the run's workers have some."""
    import torch  # here and below: the driver has no use for what models need

    from rayalign.data.encode import Encoder
    from rayalign.data.encoder_spec import EncoderSpec
    from rayalign.evaluation.loaded_model import LoadedModel
    from rayalign.evaluation.pair_scores import PairScorer, Scoring
    from rayalign.models.registry import REGISTERED_MODELS
    from rayalign.models.source import require_model
    from rayalign.training.checkpoint_export import trained_policy
    from rayalign.training.checkpoint_folder import fetch_weights

    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    device = torch.device("cuda" if config.cluster.gpus_per_worker else "cpu")
    model = config.replace({"gradient_checkpointing": False, "torch_compile": False, "batch_size": ROWS_AT_A_TIME})
    with tempfile.TemporaryDirectory() as temporary:
        policy = trained_policy(model, fetch_weights(checkpoint, Path(temporary)), device=device)
    for parameter in policy.trainable.values():
        parameter.requires_grad_(False)
    source, sources = require_model(config.model, REGISTERED_MODELS), Sources((), None, allow_image_urls=False)
    spec = EncoderSpec(
        source.base,
        "both",
        max_length=config.data.max_length,
        max_pixels=config.data.max_pixels,
        trust_remote_code=config.model.trust_remote_code,
    )
    scorer = PairScorer(LoadedModel(policy, Encoder(spec), sources, source), Scoring(model, sources, None, ()))
    return {name: value for exam in _exams(config) for name, value in _figures(exam, scorer).items()}


def _figures(exam: Exam, work: Work) -> dict[str, float]:
    lines: list[dict[str, Any]] = []
    for start in range(0, len(exam.rows), GROUP_ROWS):
        rows = exam.rows[start : start + GROUP_ROWS]
        for number, (row, result) in enumerate(zip(rows, results_of(work, rows), strict=True), start=start):
            if not isinstance(result, RecordError):
                lines += [{ID: row[ID], POSITION: number, **line} for line in result]
    return figures_of(exam, answers_in(exam, _table(lines)))


def _table(lines: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Lines as a pool's files have them."""
    return pa.Table.from_pylist(list(lines), schema=pa.schema([(ID, pa.string()), (POSITION, pa.int64()), *SCHEMA]))
