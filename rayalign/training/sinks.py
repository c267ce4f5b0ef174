"""Where a run's metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

`Reporting` hands each line to the sinks in a thread of its own: a service that is slow or gone neither holds up nor ends a run.
"""

import importlib.util
import logging
import os
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rayalign.storage import Store
from rayalign.training.metric_names import EVALUATED
from rayalign.training.sent_lines import Line, LineKey, id_of, key_of, note_id

logger = logging.getLogger(__name__)

EVENTS = "tensorboard"
"""The folder of a run's folder that TensorBoard reads."""

UPLOAD_SECONDS = 30.0
"""Between two copies of the events to an object store, which can't append."""

LONGEST_WAIT_SECONDS = 60.0
"""How long the end of a run waits for its sinks."""

BATCH = 100
"""The most metrics or parameters that MLflow takes at a time."""

LONGEST_PARAMETER = 500
"""Characters of a parameter that every version of MLflow takes."""


class MetricsSink(Protocol):
    """A place that metrics are sent to. All methods may raise whatever goes wrong there."""

    def open(self, run: str, config: Mapping[str, Any]) -> bool:
        """Begins, with the run's name and its flags; returns whether what earlier starts of this run sent is kept there."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends metrics, by the names that `sink_name` gives them."""

    def close(self) -> None:
        """The run has ended well."""


def sink_name(metric: str) -> str:
    """A metric's name in sinks, as transformers' Trainer and so TRL write it: `train/loss`, `eval/rewards/margins`."""
    return f"eval/{metric.removeprefix(EVALUATED)}" if metric.startswith(EVALUATED) else f"train/{metric}"


class TensorBoard:
    """Event files in the run's folder, `tensorboard/`.

    tensorboardX, which Ray Tune requires, writes them; torch.utils.tensorboard asks for the `tensorboard` package, which is
    only needed to look at them. Its SummaryWriter writes in a thread, which dies on a full disk and makes the next flush wait
    for ever; its EventsWriter writes at once and raises.
    """

    def __init__(self, folder: Store) -> None:
        self._target = folder / EVENTS
        self._local = self._target.local_path
        self._temporary = tempfile.TemporaryDirectory()
        """Where the events are written that are copied to an object store."""
        self._uploaded = time.monotonic()

    def open(self, run: str, config: Mapping[str, Any]) -> bool:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        keeps = self._local is not None and self._local.is_dir()
        if self._local is None:
            # Its newest events may never have been copied: they are all written again.
            self._target.delete()
        folder = self._local or Path(self._temporary.name)
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f".{uuid.uuid4().hex[:8]}"  # tells two starts within a second apart
        self._writer = EventsWriter(str(folder / "events"), suffix)
        self._event, self._summary = Event, Summary
        return keeps

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._writer.flush()
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._upload()

    def close(self) -> None:
        self._writer.close()
        self._upload()
        self._temporary.cleanup()

    def _upload(self) -> None:
        if self._local is None:
            self._target.upload(Path(self._temporary.name))
            self._uploaded = time.monotonic()


class WeightsAndBiases:
    """A run of wandb, which takes its project, key, mode and folder from its own WANDB_ variables; the project is rayalign
    where none is set. Without WANDB_DIR its files are in the run's folder, or nowhere that lasts if that is an object store."""

    def __init__(self, folder: Store) -> None:
        self._folder = folder

    def open(self, run: str, config: Mapping[str, Any]) -> bool:
        import wandb

        known = id_of(self._folder, "wandb")
        run_id = known or uuid.uuid4().hex[:8]
        local = self._folder.local_path
        place = os.environ.get("WANDB_DIR") or str(local if local is not None else tempfile.mkdtemp())
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "rayalign",
            name=os.environ.get("WANDB_NAME") or run,
            id=run_id,
            resume="allow",
            config=dict(config),
            dir=place,
            settings=wandb.Settings(console="off", silent=True),
        )
        # A metric may come for a step before the newest one: of the best evaluation, at the end.
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step", step_sync=True)
        note_id(self._folder, "wandb", run_id)
        offline = f"offline; `wandb sync {Path(self._run.dir).parent}` sends them" if self._run.offline else ""
        logger.info("Metrics also go to wandb: %s", offline or self._run.url)
        return known is not None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "train/global_step": step})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME or rayalign. Without the former it is
    kept in the run's folder, in `mlflow.db`, which a run on an object store can't have."""

    def __init__(self, folder: Store) -> None:
        self._folder = folder

    def open(self, run: str, config: Mapping[str, Any]) -> bool:
        import mlflow
        from mlflow.entities import Metric, Param

        client = mlflow.MlflowClient(tracking_uri=self._tracking_uri())
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "rayalign"

        def create() -> str:
            found = client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found is not None else client.create_experiment(experiment)
            return str(client.create_run(experiment_id, run_name=os.environ.get("MLFLOW_RUN_NAME") or run).info.run_id)

        self._client, self._metric = client, Metric
        known = id_of(self._folder, "mlflow")
        self._run_id = known or create()
        if known:
            client.update_run(self._run_id, status="RUNNING")
        else:
            params = [Param(name, str(value)[:LONGEST_PARAMETER]) for name, value in config.items()]
            for first in range(0, len(params), BATCH):
                client.log_batch(self._run_id, params=params[first : first + BATCH])
            note_id(self._folder, "mlflow", self._run_id)
        logger.info("Metrics also go to MLflow: run %s at %s", self._run_id, self._tracking_uri())
        return known is not None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[self._metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)

    def _tracking_uri(self) -> str:
        given, local = os.environ.get("MLFLOW_TRACKING_URI"), self._folder.local_path
        if not given and local is None:
            raise ValueError(
                f"MLFLOW_TRACKING_URI is not set where the first worker runs, and MLflow can't write to {self._folder.location}"
            )
        return given or f"sqlite:///{local}/mlflow.db"


SINKS: Mapping[str, Callable[[Store], MetricsSink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
"""By the names that --report_to takes."""

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
"""What each needs to be installed."""


def check_sinks(report_to: Sequence[str]) -> None:
    """Raises ValueError for sinks that are not installed, and for `none` beside others."""
    if "none" in report_to and len(report_to) > 1:
        raise ValueError(f"--report_to {' '.join(report_to)}: none is for no sink at all. Leave it out, or the others.")
    for name in report_to:
        if name != "none" and importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"--report_to {name}: the package {PACKAGES[name]} is not installed. Install it on every node (pip install "
                f"rayalign[{name}]), or leave the name out."
            )


class Reporting:
    """The sinks of a run, fed by a thread: they get every line once, over all starts of the run.

    `lines` are those that the run goes on from, `sent` the keys of all that earlier starts wrote: a sink that has kept what it
    got is not sent these again, any other gets `lines` first. A sink that fails is warned of once and left out from then on.
    """

    def __init__(
        self,
        sinks: Mapping[str, MetricsSink],
        *,
        run: str,
        config: Mapping[str, Any],
        lines: Iterable[Line] = (),
        sent: Iterable[LineKey] = (),
    ) -> None:
        self._sinks = dict(sinks)
        self._sent: dict[str, frozenset[LineKey]] = {}
        self._queue: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._work, args=(run, config, list(lines), frozenset(sent)), name="sinks", daemon=True
        )
        self._thread.start()

    def log(self, line: Line) -> None:
        """Sends a line to every sink, without waiting for it."""
        self._queue.put(dict(line))

    def close(self) -> None:
        """All lines are sent and the sinks closed; waits for that, but not for ever."""
        self._queue.put(None)
        self._thread.join(LONGEST_WAIT_SECONDS)
        if self._thread.is_alive():
            logger.warning(
                "Warning: %s did not take all metrics within %.0f s; metrics.jsonl has them", self._names, LONGEST_WAIT_SECONDS
            )

    @property
    def _names(self) -> str:
        return " and ".join(self._sinks)

    def _work(self, run: str, config: Mapping[str, Any], lines: list[Line], sent: frozenset[LineKey]) -> None:
        def begin(name: str, sink: MetricsSink) -> None:
            keeps = sink.open(run, config)
            self._sent[name] = sent if keeps else frozenset()
            for line in () if keeps else lines:
                _send(sink, line)

        self._each(begin)
        while (line := self._queue.get()) is not None:
            self._each(lambda name, sink, line=line: None if key_of(line) in self._sent[name] else _send(sink, line))  # type: ignore[misc]
        self._each(lambda name, sink: sink.close())

    def _each(self, work: Callable[[str, MetricsSink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                work(name, sink)
            except Exception as error:  # noqa: BLE001  # whatever goes wrong there, the run goes on
                del self._sinks[name]
                logger.warning(
                    "Warning: no more metrics go to %s (%s: %s); metrics.jsonl has them", name, _type(error), _first(error)
                )


def reporting_of(
    report_to: Sequence[str],
    folder: Store,
    config: Mapping[str, Any],
    *,
    lines: Iterable[Line],
    sent: Iterable[LineKey],
    others: Mapping[str, MetricsSink] | None = None,
) -> Reporting:
    """The sinks that --report_to names and some others, for the run in a folder, whose name is the run's."""
    sinks = {**(others or {}), **{name: SINKS[name](folder) for name in dict.fromkeys(report_to) if name != "none"}}
    return Reporting(sinks, run=folder.name, config=config, lines=lines, sent=sent)


def _send(sink: MetricsSink, line: Line) -> None:
    sink.log(int(line["step"]), {sink_name(name): float(value) for name, value in line.items() if name != "step"})


def _type(error: Exception) -> str:
    return type(error).__name__


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")
