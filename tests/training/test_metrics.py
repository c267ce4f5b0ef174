from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch

from rayalign.algorithms import LossOutput
from rayalign.data.batch import assemble
from rayalign.data.store import EncodedPair
from rayalign.models.family import ImageInputs, RowLayout
from rayalign.storage import Store
from rayalign.training.metrics import Clock, MetricsLog, MetricSums, Unlogged, read_metrics


def output(loss: float, rewards: list[float], nll: float, tokens: int) -> LossOutput:
    return LossOutput(
        loss=torch.tensor(loss, requires_grad=True),
        pair_metrics={"rewards/chosen": torch.tensor(rewards)},
        mean_metrics={"nll_loss": (torch.tensor(nll), torch.tensor(tokens))},
    )


def test_a_pairs_mean_weighs_every_pair_the_same_and_a_tokens_mean_every_token() -> None:
    sums = MetricSums()
    sums.add(output(0.25, [1.0], nll=6.0, tokens=2))
    sums.add(output(0.5, [3.0, 4.0, 8.0], nll=4.0, tokens=8))
    # 16 over four pairs, not the mean of 1 and 5; 10 over ten tokens, not the mean of 3 and 0.5.
    assert sums.reduce(steps=1) == {"loss": 0.75, "rewards/chosen": 4.0, "nll_loss": 1.0}


def test_the_loss_is_per_step_however_many_micro_batches_a_step_has() -> None:
    sums = MetricSums()
    for share in (0.25, 0.5, 0.75):
        sums.add(output(share, [0.0], nll=0.0, tokens=1))
    assert sums.reduce(steps=2)["loss"] == 0.75


def test_a_worker_without_work_has_a_loss_of_zero_and_no_other_metrics() -> None:
    assert MetricSums().reduce(steps=3) == {"loss": 0.0}


def test_a_metric_that_counts_nothing_is_left_out() -> None:
    sums = MetricSums()
    sums.add(output(1.0, [2.0], nll=0.0, tokens=0))
    assert sums.reduce(steps=1) == {"loss": 1.0, "rewards/chosen": 2.0}


def with_missing(values: list[float], missing: list[bool]) -> LossOutput:
    return LossOutput(
        loss=torch.tensor(0.5),
        pair_metrics={"rewards/chosen": torch.tensor(values), "logps/chosen": torch.tensor(values)},
        missing={"rewards/chosen": torch.tensor(missing)},
    )


def test_a_pair_that_has_no_value_does_not_weigh_on_the_mean() -> None:
    sums = MetricSums()
    sums.add(with_missing([1.0, 0.0, 3.0], [False, True, False]))
    sums.add(with_missing([8.0, 0.0], [False, True]))
    # 12 over three pairs; without the word of what is missing over all five.
    assert sums.reduce(steps=1) == {"loss": 1.0, "rewards/chosen": 4.0, "logps/chosen": pytest.approx(12 / 5)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -123.0])
def test_whatever_stands_where_a_value_is_missing_is_not_counted(value: float) -> None:
    sums = MetricSums()
    sums.add(with_missing([2.0, value], [False, True]))
    assert sums.reduce(steps=1)["rewards/chosen"] == 2.0


def test_a_metric_that_every_pair_misses_is_left_out() -> None:
    sums = MetricSums()
    sums.add(with_missing([7.0, 8.0], [True, True]))
    assert sums.reduce(steps=1) == {"loss": 0.5, "logps/chosen": 7.5}


def test_no_graph_outlives_the_micro_batch() -> None:
    sums = MetricSums()
    given = output(1.0, [2.0], nll=0.0, tokens=1)
    sums.add(given)
    assert not any(total.requires_grad for total, _ in sums._sums.values())


@pytest.fixture(params=["path", "file URL"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.at(str(tmp_path / "metrics.jsonl") if request.param == "path" else f"file://{tmp_path}/metrics.jsonl")


def test_a_line_can_be_read_as_soon_as_it_is_written(file: Store) -> None:
    log = MetricsLog(file, start_step=0)
    log.append({"step": 5, "loss": 0.5})
    log.append({"step": 10, "loss": 0.25})
    assert read_metrics(file) == log.lines == [{"step": 5, "loss": 0.5}, {"step": 10, "loss": 0.25}]


def test_a_resumed_run_forgets_the_lines_after_its_checkpoint_and_a_line_cut_short(file: Store) -> None:
    file.write_bytes(b'{"step": 5, "loss": 1}\n{"step": 10, "loss": 2}\n{"step": 15, "loss": 3}\n{"step": 20, "lo')
    assert [line["step"] for line in read_metrics(file)] == [5, 10, 15]
    log = MetricsLog(file, start_step=10)
    log.append({"step": 15, "loss": 4})
    assert read_metrics(file) == [{"step": 5, "loss": 1}, {"step": 10, "loss": 2}, {"step": 15, "loss": 4}]


def test_on_an_object_store_a_checkpoint_finds_all_lines_up_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "local_path", property(lambda store: None))
    monkeypatch.setattr(Store, "resolve", lambda store: (pafs.LocalFileSystem(), store.location))
    file = Store(str(tmp_path / "metrics.jsonl"))
    log = MetricsLog(file, start_step=0)
    log.append({"step": 5, "loss": 0.5, "num_tokens": 100})
    assert read_metrics(file) == []  # as each line would be an upload
    log.keep()
    log.append({"step": 10, "loss": 0.25, "num_tokens": 200})
    assert MetricsLog(file, start_step=5).lines == [{"step": 5, "loss": 0.5, "num_tokens": 100}]


def test_an_evaluation_made_again_after_a_kill_stands_once(file: Store) -> None:
    log = MetricsLog(file, start_step=0)
    lines = [{"step": 10, "loss": 1}, {"step": 10, "eval_loss": 2}, {"step": 12, "loss": 3}, {"step": 12, "eval_loss": 4}]
    for line in lines:
        log.append(line)
    again = MetricsLog(file, start_step=12)  # killed after the last step
    again.append({"step": 12, "eval_loss": 4.5})
    assert read_metrics(file) == again.lines == [*lines[:3], {"step": 12, "eval_loss": 4.5}]
    again.append({"step": 13, "eval_loss": 5})
    assert read_metrics(file) == again.lines
    assert len(again.lines) == 5


def test_a_run_without_metrics_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(Store(str(tmp_path / "nothing.jsonl"))) == []


def test_the_share_of_padding_in_what_the_model_runs_over_is_told() -> None:
    pairs = [EncodedPair("a", [5, 6], [7, 2], [8], [], []), EncodedPair("b", [4], [9], [], [], [])]  # 5 and 2 tokens
    batch = assemble(pairs, layout=RowLayout(pad_token_id=0), process_images=lambda contents, alone: ImageInputs())
    clock = Clock(0, lambda batch: batch.input_ids.numel())
    assert list(clock.waited_for(iter([batch, batch]))) == [batch, batch]
    clock.count(pairs=4, tokens=2 * batch.num_tokens)
    assert clock.reduce()["padding_fraction"] == pytest.approx(3 / 10)
    list(clock.waited_for(iter([batch])))  # and anew after each line
    clock.count(pairs=2, tokens=batch.num_tokens)
    assert clock.reduce()["padding_fraction"] == pytest.approx(3 / 10)


def test_what_was_not_logged_is_counted_on_by_any_number_of_workers() -> None:
    workers = [Unlogged(3, 1, {"loss": (0.1, 0.0), "a": (1.0, 2.0)}, 10, 12), Unlogged(3, 1, {"loss": (0.2, 0.0)}, 5, 6)]
    assert [Unlogged.of(workers, rank, 2) for rank in range(2)] == workers
    whole = Unlogged(3, 1, {"loss": (0.1 + 0.2, 0.0), "a": (1.0, 2.0)}, 15, 18)
    assert Unlogged.of(workers, 0, 1) == Unlogged.of(workers, 0, 3) == whole
    assert Unlogged.of(workers, 2, 3) == Unlogged(3, 1)
    assert Unlogged.of([], 0, 1) == Unlogged.of([], 1, 2) == Unlogged()
