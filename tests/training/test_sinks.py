"""The sinks with the real tensorboardX, and with small fakes of wandb and mlflow."""

import importlib.machinery
import logging
import re
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from rayalign.storage import Store
from rayalign.training import sinks
from rayalign.training.metrics import MetricsLog
from rayalign.training.sent_lines import RUN_IDS, key_of
from rayalign.training.sinks import EVENTS, MLflow, Reporting, TensorBoard, WeightsAndBiases, check_sinks, reporting_of

LINES = [{"step": 0, "eval_loss": 3.0}, {"step": 5, "loss": 2.0}, {"step": 10, "loss": 1.0}, {"step": 10, "eval_loss": 0.5}]


class Sink:
    """One that remembers; `fails_at`: the step at which it no longer works."""

    def __init__(self, *, keeps: bool = False, fails_at: int | None = None) -> None:
        self.keeps, self.fails_at = keeps, fails_at
        self.got: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False

    def open(self, run: str, config: Mapping[str, Any]) -> bool:
        self.opened = (run, dict(config))
        return self.keeps

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("no network.\nAnd a second line")
        self.got.append((step, dict(metrics)))

    def close(self) -> None:
        self.is_closed = True


def events(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """The steps and values of all event files, by step; each record's checksums hold."""
    found = []
    for file in sorted((folder / EVENTS).iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack("<Q", content[at : at + 8])
            data = content[at + 12 : at + 12 + size]
            for part, place in ((content[at : at + 8], at + 8), (data, at + 12 + size)):
                assert struct.unpack("<I", content[place : place + 4])[0] == masked(crc32c(part))
            event = Event.FromString(data)
            if event.HasField("summary"):
                found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
            at += size + 16
    return sorted(found, key=lambda event: event[0])


def masked(checksum: int) -> int:
    return (((checksum >> 15) | (checksum << 17 & 0xFFFFFFFF)) + 0xA282EAD8) & 0xFFFFFFFF


def start(folder: Path, lines: list[dict[str, float]], *, from_step: int = 0, **others: Sink) -> MetricsLog:
    """A start of a run from a step, which writes lines and reports them, and ends."""
    log = MetricsLog(Store(str(folder / "metrics.jsonl")), start_step=from_step)
    made = {"tensorboard": TensorBoard(Store(str(folder))), **others}
    reporting = Reporting(made, run="first", config={"beta": 0.1}, lines=log.lines, sent=log.sent)
    for line in lines:
        if log.append(line):
            reporting.log(line)
    reporting.close()
    return log


def test_tensorboard_gets_every_line_at_its_step_by_the_names_of_the_field(tmp_path: Path) -> None:
    start(tmp_path, [{"step": 2, "loss": 0.5, "rewards/margins": 0.25}, {"step": 2, "eval_rewards/margins": 0.125}])
    assert events(tmp_path) == [(2, {"train/loss": 0.5, "train/rewards/margins": 0.25}), (2, {"eval/rewards/margins": 0.125})]


def test_no_step_is_written_twice_after_a_resume(tmp_path: Path) -> None:
    start(tmp_path, LINES)
    # Killed behind the checkpoint of step 5, and an evaluation of an old step made again.
    log = start(tmp_path, [*LINES[2:], {"step": 0, "eval_loss": 3.0}, {"step": 15, "loss": 0.25}], from_step=5)
    assert [line["step"] for line in log.lines] == [0, 5, 10, 10, 15]
    assert [step for step, _ in events(tmp_path)] == [0, 5, 10, 10, 15]


def test_what_was_sent_behind_a_checkpoint_is_not_sent_again_after_several_kills(tmp_path: Path) -> None:
    def lines(first: int, last: int) -> list[dict[str, float]]:
        return [{"step": step, "loss": 1.0} for step in range(first, last + 1, 5)]

    start(tmp_path, lines(5, 90))
    start(tmp_path, lines(55, 60), from_step=50)
    start(tmp_path, lines(55, 70), from_step=50)
    log = start(tmp_path, lines(55, 100), from_step=50)
    assert [step for step, _ in events(tmp_path)] == [line["step"] for line in log.lines] == list(range(5, 101, 5))
    start(tmp_path, lines(105, 110), from_step=100)
    assert [step for step, _ in events(tmp_path)] == list(range(5, 111, 5))


def test_a_damaged_note_of_what_was_sent_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / RUN_IDS).write_text('{"ahead": [[5')
    assert len(start(tmp_path, LINES).lines) == len(LINES)
    assert f"{tmp_path}/{RUN_IDS}: can't be read" in caplog.text


def test_a_sink_that_comes_later_gets_the_lines_before(tmp_path: Path) -> None:
    later, kept = Sink(), Sink(keeps=True)
    start(tmp_path, LINES)
    start(tmp_path, [{"step": 10, "loss": 1.0}, {"step": 15, "loss": 0.25}], from_step=5, later=later, kept=kept)
    assert later.opened == ("first", {"beta": 0.1})
    assert [step for step, _ in later.got] == [0, 5, 10, 15]
    assert [step for step, _ in kept.got] == [15]
    assert later.is_closed


def test_events_of_a_run_on_an_object_store_end_up_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A store without a path of its own, on the disk behind it.
    monkeypatch.setattr(Store, "local_path", property(lambda store: None))
    monkeypatch.setattr(Store, "resolve", lambda store: resolved(store))
    monkeypatch.setattr("rayalign.storage.upload", lambda source, target: Path(target).write_bytes(Path(source).read_bytes()))
    store = Store(str(tmp_path))
    for lines in ([], LINES[:2]):
        reporting = Reporting({"tensorboard": TensorBoard(store)}, run="r", config={}, lines=lines, sent=map(key_of, LINES))
        for line in LINES[len(lines) :]:
            reporting.log(line)
        reporting.close()
        assert [step for step, _ in events(tmp_path)] == [0, 5, 10, 10]


def resolved(store: Store) -> Any:
    import pyarrow.fs as pafs

    return pafs.LocalFileSystem(), store.location


def test_a_sink_that_fails_is_warned_of_once_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = Sink(fails_at=5)
    with caplog.at_level(logging.WARNING):
        start(tmp_path, LINES, broken=broken)
    assert [record.getMessage() for record in caplog.records] == [
        "Warning: no more metrics go to broken (ConnectionError: no network); metrics.jsonl has them"
    ]
    assert [step for step, _ in broken.got] == [0]
    assert [step for step, _ in events(tmp_path)] == [0, 5, 10, 10]


def test_a_sink_that_hangs_does_not_hold_up_the_end_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "LONGEST_WAIT_SECONDS", 0.01)
    release = threading.Event()
    slow = Sink()
    slow.log = lambda step, metrics: release.wait() and None  # type: ignore[method-assign]
    reporting = Reporting({"slow": slow}, run="r", config={})
    reporting.log(LINES[0])
    reporting.close()
    release.set()
    assert "slow did not take all metrics" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that can't be flushed stays open
def test_a_full_disk_ends_the_events_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.flush", full)
    start(tmp_path, LINES)
    assert "no more metrics go to tensorboard (OSError: [Errno 28] No space left on device)" in caplog.text


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was done with a fake of wandb, call by call."""
    calls: list[Any] = []

    def init(**given: Any) -> Any:
        calls.append(("init", given))
        return SimpleNamespace(
            offline=True,
            dir=given["dir"],
            define_metric=lambda name, **how: calls.append(("define", name, how)),
            log=lambda values: calls.append(("log", values)),
            finish=lambda: calls.append(("finish",)),
        )

    fake = ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    vars(fake).update(init=init, Settings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return calls


def report(sink: Any, lines: list[dict[str, float]], *, sent: Any = ()) -> None:
    reporting = Reporting({"sink": sink}, run="first", config={"beta": 0.1}, sent=sent)
    for line in lines:
        reporting.log(line)
    reporting.close()


def test_wandb_gets_one_run_over_all_starts(tmp_path: Path, wandb: list[Any]) -> None:
    store = Store(str(tmp_path))
    report(WeightsAndBiases(store), LINES[:2])
    report(WeightsAndBiases(store), LINES[1:3], sent=map(key_of, LINES[:2]))
    (first, second) = [call[1] for call in wandb if call[0] == "init"]
    assert first["id"] == second["id"]
    assert (first["project"], first["name"], first["resume"]) == ("rayalign", "first", "allow")
    assert (first["config"], first["dir"]) == ({"beta": 0.1}, str(tmp_path))
    assert [call[1] for call in wandb if call[0] == "log"] == [
        {"eval/loss": 3.0, "train/global_step": 0},
        {"train/loss": 2.0, "train/global_step": 5},
        {"train/loss": 1.0, "train/global_step": 10},
    ]
    assert wandb[-1] == ("finish",)


def test_a_service_that_did_not_take_the_run_at_first_gets_all_lines_later(
    tmp_path: Path, wandb: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**given: Any) -> Any:
        raise PermissionError("no API key")

    store, works = Store(str(tmp_path)), sys.modules["wandb"].init
    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    report(WeightsAndBiases(store), LINES[:2])
    monkeypatch.setattr(sys.modules["wandb"], "init", works)
    reporting = Reporting({"sink": WeightsAndBiases(store)}, run="r", config={}, lines=LINES[:2], sent=map(key_of, LINES[:2]))
    reporting.log(LINES[2])
    reporting.close()
    assert [call[1]["train/global_step"] for call in wandb if call[0] == "log"] == [0, 5, 10]


class Client:
    """A fake of mlflow's; `made` are the runs of all clients."""

    made: list[dict[str, Any]]

    def __init__(self, tracking_uri: str) -> None:
        self.uri = tracking_uri

    def get_experiment_by_name(self, name: str) -> None:
        assert name == "rayalign"

    def create_experiment(self, name: str) -> str:
        return name

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.made.append({"name": run_name, "uri": self.uri, "params": {}, "metrics": [], "status": "RUNNING"})
        return SimpleNamespace(info=SimpleNamespace(run_id=str(len(self.made) - 1)))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert max(len(metrics), len(params)) <= 100
        self.made[int(run_id)]["params"].update(params)
        self.made[int(run_id)]["metrics"] += [(name, value, step) for name, value, _, step in metrics]

    def update_run(self, run_id: str, status: str) -> None:
        self.made[int(run_id)]["status"] = status

    def set_terminated(self, run_id: str) -> None:
        self.made[int(run_id)]["status"] = "FINISHED"


@pytest.fixture
def mlflow_runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    Client.made = []
    fake, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    vars(fake).update(MlflowClient=Client, entities=entities)
    vars(entities).update(Metric=lambda *values: values, Param=lambda *values: values)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME"):
        monkeypatch.delenv(name, raising=False)
    return Client.made


def test_mlflow_gets_one_run_over_all_starts(tmp_path: Path, mlflow_runs: list[dict[str, Any]]) -> None:
    store = Store(str(tmp_path))
    report(MLflow(store), LINES[:2])
    report(MLflow(store), LINES[1:3], sent=map(key_of, LINES[:2]))
    assert mlflow_runs == [
        {
            "name": "first",
            "uri": f"sqlite:///{tmp_path}/mlflow.db",
            "params": {"beta": "0.1"},
            "metrics": [("eval/loss", 3.0, 0), ("train/loss", 2.0, 5), ("train/loss", 1.0, 10)],
            "status": "FINISHED",
        }
    ]


def test_mlflow_needs_a_server_where_the_run_is_on_an_object_store(
    mlflow_runs: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    report(MLflow(Store("s3://bucket/run")), LINES)
    assert (
        "MLFLOW_TRACKING_URI is not set where the first worker runs, and MLflow can't write to s3://bucket/run" in caplog.text
    )
    assert mlflow_runs == []


def test_a_sink_that_is_not_installed_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sinks.PACKAGES, "wandb", "no_such_package")
    message = (
        "--report_to wandb: the package no_such_package is not installed. Install it on every node (pip install "
        "rayalign[wandb]), or leave the name out."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sinks(["tensorboard", "wandb"])


def test_none_stands_alone(tmp_path: Path) -> None:
    check_sinks(["none"])
    message = "--report_to none tensorboard: none is for no sink at all. Leave it out, or the others."
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sinks(["none", "tensorboard"])
    reporting = reporting_of(["none"], Store(str(tmp_path)), {}, lines=(), sent=())
    reporting.log(LINES[0])
    reporting.close()
    assert list(tmp_path.iterdir()) == []


def test_what_names_a_sink_can_be_installed_as_an_extra() -> None:
    assert sinks.SINKS.keys() == sinks.PACKAGES.keys()
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert all(f"\n{name} = [" in text for name in sinks.SINKS)
