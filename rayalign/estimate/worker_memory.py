"""What one worker of a run holds, by how many layers gradient checkpointing runs again, and how many these should be."""

from dataclasses import dataclass
from functools import cached_property

from rayalign.config.config import Config
from rayalign.estimate.architecture import Blueprint, Skeleton
from rayalign.estimate.dry_run import DryRuns
from rayalign.estimate.memory import Memory, MicroBatch, memory_of, tower_bytes
from rayalign.estimate.sharding import share_of
from rayalign.estimate.vision import VisionCosts

SPARE = 0.1
"""Share of a GPU's memory that --gradient_checkpointing auto leaves free: as much as the estimate may be wrong by."""


@dataclass(frozen=True)
class WorkerMemory:
    """The memory of one worker of a run, whose micro-batches hold images or not."""

    config: Config
    blueprint: Blueprint
    has_images: bool

    @cached_property
    def skeleton(self) -> Skeleton:
        return self.blueprint.build()

    @cached_property
    def dry_runs(self) -> DryRuns:
        return DryRuns(self.blueprint, sharded=self.config.cluster.shards_models)

    @property
    def most_recomputed(self) -> int:
        """The layers that run again where memory is short."""
        return self.blueprint.num_layers if self.config.model.gradient_checkpointing else 0

    def of(self, batch: MicroBatch, recomputed: int, *, sharded_over: int | None = None) -> Memory:
        """The memory for micro-batches of such rows where so many layers run again; of a model that is sharded over as many
        workers as the run says, or over `sharded_over`."""
        activations = self.dry_runs.activations(batch.shape(), recomputed)
        optim = self.config.optimizer.optim
        memory = memory_of(self.blueprint, self.skeleton, activations, self._vision, batch, optim=optim)
        cluster = self.config.cluster
        if not cluster.shards_models:
            return memory
        num_workers = sharded_over or cluster.num_shards
        quantised = set(self.skeleton.linears()) if self.blueprint.tuner.quant_bits is not None else frozenset()
        below_head = activations.peak - activations.peak_below_head
        return share_of(
            memory,
            self.skeleton,
            self.blueprint,
            num_workers=num_workers,
            below_head=below_head,
            optim=optim,
            sync_each_batch=cluster.sync_each_batch,
            tower=tower_bytes(self._vision, batch, self.blueprint) if self._vision is not None else None,
            quantised=quantised,
        )

    def num_recomputed(self, batch: MicroBatch, gpu_bytes: int) -> int:
        """The layers that run again: what --gradient_checkpointing says; by `auto` as few as fit a GPU, all where none do."""
        if self.config.model.gradient_checkpointing != "auto":
            return self.most_recomputed
        limit = (1 - SPARE) * gpu_bytes
        return next((n for n in range(self.most_recomputed) if self.of(batch, n).total <= limit), self.most_recomputed)

    @cached_property
    def _vision(self) -> VisionCosts | None:
        return VisionCosts(self.skeleton, self.blueprint.config) if self.has_images else None
