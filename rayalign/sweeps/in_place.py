"""Trials that share processes: a trial of one worker runs in the process that Ray Tune started for it, and Tune gives that
process one trial after another. Python, torch, transformers, the base model and its processor are then loaded once a process.

The steps are those of any other worker (`training.worker`), so the trial's model is that of the same flags run alone.
"""

import dataclasses
import functools
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.tune
import torch

from rayalign.cluster import result_of
from rayalign.config.config import Config
from rayalign.config.flags import flags_of
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import RunData
from rayalign.data.sampler import StepSampler
from rayalign.data.store import PreparedData
from rayalign.data.stream import read_pairs
from rayalign.policy.kept_base import KeptBase
from rayalign.storage import Store
from rayalign.sweeps.handover import pack
from rayalign.sweeps.search_space import ALGORITHM, SearchSpace, class_of
from rayalign.training.driver import Result, finish
from rayalign.training.group import Group
from rayalign.training.lease import Lease
from rayalign.training.run_times import Stopwatch, begin_start
from rayalign.training.worker import train_worker

OF_THE_UPDATE = frozenset(
    {
        *(ALGORITHM, "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2"),
        *("adam_epsilon", "max_grad_norm", "seed", "lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    }
)
"""Searched flags that change neither the records nor the reference, nor which of them a trial needs; an algorithm's own flags
don't, either."""


def why_apart(space: SearchSpace) -> str | None:
    """Why a sweep's trials can't share processes, in words; None where they can."""
    cluster = space.base.cluster
    if cluster.num_workers != 1:
        return f"--num_workers is {cluster.num_workers}, and a process is one worker"
    if cluster.shards_models or cluster.spreads_models:
        return f"--strategy is {cluster.strategy}, and a process has a whole model on one device"
    if space.base.model.torch_compile:
        return "--torch_compile compiles for the first shapes that a process meets"
    own = {flag.name for name in space.algorithms for flag in flags_of(class_of(space.base, name))}
    others = [name for name in space.ranges if name not in OF_THE_UPDATE | own]
    if others:
        return f"--search {others[0]}: trials may need other records or another reference, for which there must be room"
    return None


def resources_of(config: Config) -> ray.tune.PlacementGroupFactory:
    """What the process of a trial holds: what a train worker holds elsewhere, on the same nodes."""
    cluster = config.cluster
    kind = {f"accelerator_type:{cluster.accelerator_type}": 0.001} if cluster.accelerator_type else {}
    bundle = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker or 0, **kind}
    labels: Any = {"bundle_label_selector": [dict(cluster.worker_labels)]} if cluster.worker_labels else {}
    return ray.tune.PlacementGroupFactory([bundle], **labels)


def fit_in_place(config: Config, data: RunData, group: Group) -> Result:
    """Trains on prepared data in this process, a trial of Ray Tune, which hears of each evaluation before the last step.

    Raises ValueError or FloatingPointError for what the user can fix, and SystemExit where Tune stops the trial.
    """
    watch = Stopwatch()
    begin_start(Store.at(str(config.run.output_dir)), watch)
    data = dataclasses.replace(data, spec=_first_like(data.spec))
    try:
        result = result_of(train_worker(config, data, group))
    finally:
        # The next trial's model must find the room of this one's.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return finish(config, data, result, watch)


@functools.cache
def _kept_base() -> KeptBase:
    """This process's."""
    return KeptBase()


@functools.cache
def _first_like(spec: EncoderSpec) -> EncoderSpec:
    """The first of the specs of this process that are equal, which has loaded its processor."""
    return spec


class InPlace(Group):
    """The only worker of a trial, in the trial's own process."""

    rank, num_workers, num_local_workers = 0, 1, 1

    def __init__(self, config: Config, lease: Lease) -> None:
        self.kept_base = _kept_base()
        self.device = torch.device("cuda", 0) if config.cluster.gpus_per_worker else torch.device("cpu")
        self._lease = lease

    def tables(self, data: PreparedData, sampler: StepSampler, *, start_step: int) -> Iterator[pa.Table]:
        return read_pairs(data, sampler, start_step=start_step)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        self._lease.check()
        ray.tune.report(dict(metrics))

    def saved(self, step: int, whole: Callable[[int], Store]) -> None:
        self._lease.check()

    def preemption(self) -> None:
        return None  # Ray Tune starts the trial again where its machine is lost


class Member(Group):
    """The only worker of a trial of a population: Ray Tune gets its checkpoints with its evaluations, from where other trials
    may go on."""

    rank, num_workers, num_local_workers = 0, 1, 1

    def __init__(self, config: Config, lease: Lease, name: str) -> None:
        self._alone = InPlace(config, lease)
        self.device, self.kept_base = self._alone.device, self._alone.kept_base
        self._lease, self._name = lease, name
        self._evaluated: dict[str, float] | None = None

    def tables(self, data: PreparedData, sampler: StepSampler, *, start_step: int) -> Iterator[pa.Table]:
        return self._alone.tables(data, sampler, start_step=start_step)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        self._evaluated = dict(metrics)  # told with the checkpoint, which follows

    def saved(self, step: int, whole: Callable[[int], Store]) -> None:
        self._alone.saved(step, whole)
        told, self._evaluated = self._evaluated, None
        if told is not None:
            with tempfile.TemporaryDirectory() as temporary:
                pack(whole(step), Path(temporary), name=self._name, step=step)
                ray.tune.report(told, checkpoint=ray.tune.Checkpoint.from_directory(temporary))

    def preemption(self) -> None:
        return None
