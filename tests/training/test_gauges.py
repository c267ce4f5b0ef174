"""Gauges without a cluster: which ones are set, and that the dashboard shows no others. An integration test reads them from
Ray's exporter."""

import json
import re
from pathlib import Path

import pytest

from rayalign.training import gauges
from rayalign.training.gauges import EXPORTED, Gauges, gauge_name
from rayalign.training.sinks import sink_name

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "rayalign.json"

METRICS = (
    *("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "learning_rate", "pairs_per_second", "tokens_per_second"),
    *("data_wait_fraction", "padding_fraction", "mfu", "eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"),
    *("eval_accuracy/likelihood", "eval_logps/chosen", "eval_logps/rejected"),
)
"""Metrics of DPO, by their names in metrics.jsonl."""


class Gauge:
    """A fake of Ray's, which keeps its values by tag."""

    made: dict[str, dict[tuple[str, ...], float]]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._tag_keys = tag_keys
        self._values = self.made.setdefault(name, {})

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._values[tuple(tags[key] for key in self._tag_keys)] = value


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[tuple[str, ...], float]]:
    Gauge.made = {}
    monkeypatch.setattr(gauges, "Gauge", Gauge)
    return Gauge.made


def test_a_gauge_has_the_newest_value_of_a_metric_with_run_and_rank(made: dict[str, dict[tuple[str, ...], float]]) -> None:
    sink = Gauges("first", 0)
    sink.open("first", {})
    sink.log(5, {"train/loss": 2.0})
    sink.log(10, {"train/loss": 1.0, "train/rewards/margins": 0.5})
    Gauges("first", 1).idle(3.5)
    assert made == {
        "rayalign_train_step": {("first", "0"): 10},
        "rayalign_train_loss": {("first", "0"): 1.0},
        "rayalign_train_rewards_margins": {("first", "0"): 0.5},
        "rayalign_worker_idle_seconds": {("first", "1"): 3.5},
    }


def test_the_dashboard_shows_gauges_that_a_run_sets(made: dict[str, dict[tuple[str, ...], float]]) -> None:
    sink = Gauges("first", 0)
    sink.log(1, {sink_name(name): 0.0 for name in METRICS})
    sink.idle(0.0)
    dashboard = json.loads(DASHBOARD.read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {match[1] for expression in shown if (match := re.fullmatch(rf'{EXPORTED}(\w+)\{{run=~"\$run"\}}', expression))}
    assert len(shown) == len(names)
    assert names == made.keys()
    assert dashboard["templating"]["list"][1]["definition"] == f"label_values({EXPORTED}{gauges.IDLE}, run)"


def test_a_name_has_only_what_prometheus_takes() -> None:
    assert gauge_name(sink_name("eval_accuracy/per_token/shuffled")) == "rayalign_eval_accuracy_per_token_shuffled"
