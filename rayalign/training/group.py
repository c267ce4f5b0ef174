"""The workers of a run as one of them sees them: its place among them, where its pairs come from, and who hears of its
evaluations and checkpoints. `OfRayTrain` is what Ray Train started; a sweep's trial may be the only worker of its own run."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import pyarrow as pa
import ray.train
import ray.train.torch
import torch

from rayalign.data.sampler import StepSampler
from rayalign.data.store import PreparedData
from rayalign.data.stream import fetch_pairs
from rayalign.policy.kept_base import KeptBase
from rayalign.storage import Store


class Group(Protocol):
    """What a worker needs of those who started it. Every worker calls each method, at the same steps."""

    rank: int
    num_workers: int
    num_local_workers: int
    """How many of them are on this worker's machine."""
    device: torch.device
    kept_base: KeptBase | None
    """What this process loads once for several runs, where it does one after another."""

    def tables(self, data: PreparedData, sampler: StepSampler, *, start_step: int) -> Iterator[pa.Table]:
        """This worker's pairs from a step on, in tables as `fetch_pairs` makes them."""

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Tells of an evaluation; whoever hears of it may end the run there."""

    def saved(self, step: int, whole: Callable[[int], Store]) -> None:
        """Tells of the checkpoint of a step, which may still be written; `whole` waits for it, in rank 0."""

    def preemption(self) -> Any:
        """What is known of machines that will be taken away, as Ray Train says it; None: of none."""


class OfRayTrain(Group):
    """A worker that Ray Train started. `hears`: Ray Train is told of evaluations and of the steps of checkpoints."""

    kept_base = None

    def __init__(self, *, hears: bool) -> None:
        context = ray.train.get_context()
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.num_local_workers = context.get_local_world_size()
        self.device = ray.train.torch.get_device()
        self._hears = hears

    def tables(self, data: PreparedData, sampler: StepSampler, *, start_step: int) -> Iterator[pa.Table]:
        return fetch_pairs(data, sampler, rank=self.rank, start_step=start_step)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        if self._hears:
            ray.train.report(dict(metrics))

    def saved(self, step: int, whole: Callable[[int], Store]) -> None:
        if self._hears:
            ray.train.report({"step": step})

    def preemption(self) -> Any:
        return ray.train.get_preemption_info()
