"""A whole training with benchmarks beside it, in this process: one that is cut short and goes on has the same weights, and each
of its checkpoints is judged once."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from rayalign.algorithms import DPO
from rayalign.config.config import Config, config_from_mapping
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import RunData
from rayalign.data.sampler import StepSampler
from rayalign.data.store import EncodedPair, PreparedData
from rayalign.data.stream import read_pairs
from rayalign.models.source import ModelSource
from rayalign.storage import Store
from rayalign.training import benchmarks
from rayalign.training.benchmarks import judged_beside
from rayalign.training.checkpoint_folder import Checkpoint
from rayalign.training.group import Group
from rayalign.training.metrics import read_metrics
from rayalign.training.worker import train_worker
from rayalign.training.worker_result import WorkerResult
from tests.tiny_models import encode_pair

STEPS, EVERY, CUT_AT = 12, 3, 6


class Alone(Group):
    """The only worker of a run; its process is killed once the checkpoint of a step is whole and another thing has happened."""

    rank, num_workers, num_local_workers = 0, 1, 1
    device = torch.device("cpu")
    kept_base = None

    def __init__(self, *, killed_at: int | None = None, after: threading.Event | None = None) -> None:
        self._killed_at, self._after = killed_at, after

    def tables(self, data: PreparedData, sampler: StepSampler, *, start_step: int) -> Iterator[pa.Table]:
        return read_pairs(data, sampler, start_step=start_step)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        pass

    def saved(self, step: int, whole: Callable[[int], Store]) -> None:
        whole(step)
        if step == self._killed_at:
            assert self._after is not None
            assert self._after.wait(60)
            raise SystemExit("killed")

    def preemption(self) -> None:
        return None


@pytest.fixture
def data(prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData], model_folder: Callable[..., Path]) -> RunData:
    folder = model_folder("llava")
    pairs = [encode_pair(folder, str(n), "Which digit is it?", f"It is {n}.", f"a cat, or {n} dogs") for n in range(24)]
    return RunData(ModelSource(str(folder)), EncoderSpec(str(folder), "both"), prepare_pairs(pairs), None)


def config_for(data: RunData, folder: Path, **flags: Any) -> Config:
    own = {"max_steps": STEPS, "save_steps": EVERY, "save_total_limit": 1, "batch_size": 2, "gradient_accumulation_steps": 1}
    sent = {"report_to": "none", "dataset_test_ratio": 0, "learning_rate": 1e-3, "gpus_per_worker": 0}
    return config_from_mapping(DPO, {"model": data.source.base, "output_dir": str(folder), **own, **sent, **flags})


def train(config: Config, data: RunData, **group: Any) -> WorkerResult:
    result = train_worker(config, data, Alone(**group))
    assert isinstance(result, WorkerResult)
    return result


def test_a_run_with_benchmarks_that_is_killed_goes_on_to_the_same_weights_and_judges_each_checkpoint_once(
    tmp_path: Path, data: RunData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks, "LOOK_SECONDS", 0.01)
    plain, folder = tmp_path / "plain", tmp_path / "judged"
    train(config_for(data, plain), data)

    config = config_for(data, folder, eval_benchmarks="pope:here", metric_for_best_model="pope/accuracy")
    asked: list[int] = []
    first = threading.Event()

    def judge(checkpoint: Checkpoint, is_over: Callable[[], bool]) -> Mapping[str, float]:
        """It comes to the first checkpoint before the kill, and to the others behind the training."""
        while asked and not (folder / "model" / "adapter_model.safetensors").exists():
            if is_over():
                raise RuntimeError("nobody waits for it")
        assert (folder / "checkpoints" / checkpoint.store.name / "trainable.safetensors").exists()
        asked.append(checkpoint.step)
        first.set()
        return {"pope/accuracy": {3: 0.25, 6: 0.75, 9: 0.5, 12: 0.75}[checkpoint.step]}

    with pytest.raises(SystemExit), judged_beside(config, judge):
        train(config, data, killed_at=CUT_AT, after=first)
    assert asked == [3]
    with judged_beside(config, judge):
        train(config, data)

    assert asked == [3, 6, 9, 12]
    lines = read_metrics(Store(str(folder / "metrics.jsonl")))
    told = [(line["step"], line["eval_pope/accuracy"]) for line in lines if "eval_pope/accuracy" in line]
    assert told == [(3, 0.25), (6, 0.75), (9, 0.5), (12, 0.75)]
    assert json.loads((folder / "best.json").read_text())["step"] == 6
    weights, expected = (load_file(place / "model" / "adapter_model.safetensors") for place in (folder, plain))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
