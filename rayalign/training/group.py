"""The workers of a run as one of them sees them: its place among them, where its pairs come from, and who hears of its
evaluations and checkpoints. `OfRayTrain` is what Ray Train started; a sweep's trial may be the only worker of its own run."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import ray.train
import ray.train.torch
import torch

from rayalign.data.sampler import StepSampler
from rayalign.data.store import PreparedData
from rayalign.data.stream import fetch_pairs
from rayalign.storage import Store


class Group(Protocol):
    """What a worker needs of those who started it. Every worker calls each method, at the same steps."""

    rank: int
    num_workers: int
    device: torch.device

    def tables(self, data: PreparedData, sampler: StepSampler, *, start_step: int) -> Iterator[pa.Table]:
        """This worker's pairs from a step on, in tables as `fetch_pairs` makes them."""

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Tells of an evaluation; whoever hears of it may end the run there."""

    def saved(self, metrics: Mapping[str, float], folder: Path | None, target: Store) -> None:
        """Brings a checkpoint's files from a local folder to where it stays, before it returns; None: this worker has none."""


class OfRayTrain(Group):
    """A worker that Ray Train started. `hears_evaluations`: Ray Train is told of these, too, and not only of checkpoints."""

    def __init__(self, *, hears_evaluations: bool) -> None:
        context = ray.train.get_context()
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._hears_evaluations = hears_evaluations

    def tables(self, data: PreparedData, sampler: StepSampler, *, start_step: int) -> Iterator[pa.Table]:
        return fetch_pairs(data, sampler, rank=self.rank, start_step=start_step)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        if self._hears_evaluations:
            ray.train.report(dict(metrics))

    def saved(self, metrics: Mapping[str, float], folder: Path | None, target: Store) -> None:
        ray.train.report(
            dict(metrics),
            checkpoint=None if folder is None else ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=target.name,
            checkpoint_upload_fn=functools.partial(_upload, target) if target.local_path is None else None,
        )


def _upload(target: Store, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
    """Copies a checkpoint to an object store, each file again where the store fails. (To a disk Ray Train copies it.)"""
    target.upload(Path(checkpoint.path))
    filesystem, path = target.resolve()
    return ray.train.Checkpoint(path, filesystem)
