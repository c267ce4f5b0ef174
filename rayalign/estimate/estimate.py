"""What a plan tells, computed from a blueprint of the model and the shapes of the data."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from rayalign.config.config import Config
from rayalign.config.plan import PlanConfig
from rayalign.estimate import advice
from rayalign.estimate.advice import Schedule, Time
from rayalign.estimate.architecture import Blueprint, Skeleton
from rayalign.estimate.flops import LanguageCosts, PairFlops, PassOptions, language_costs, pair_flops
from rayalign.estimate.memory import GB, Memory, MicroBatch
from rayalign.estimate.shapes import DataShapes
from rayalign.estimate.worker_memory import WorkerMemory


@dataclass(frozen=True)
class Estimate:
    """What a run will need. `name` is what the user called the model, `origin` where its config came from."""

    config: Config
    plan: PlanConfig
    blueprint: Blueprint
    data: DataShapes
    name: str
    origin: str

    @property
    def skeleton(self) -> Skeleton:
        return self._worker.skeleton

    @property
    def num_trainable(self) -> int:
        """Trainable parameters, a value head's included."""
        head = self.skeleton.head.shape[1] if self.blueprint.needs.head == "value" else 0
        return sum(p.numel() for p in self.skeleton.trainable) + head

    @cached_property
    def adapters(self) -> dict[str, int]:
        """Parameters that a new LoRA of the run's rank would train by --lora_target_modules DEFAULT and ALL."""
        counts = {}
        source = dataclasses.replace(self.blueprint.source, adapter=None)
        for modules in ("DEFAULT", "ALL"):
            tuner = dataclasses.replace(self.config.tuner, sft_type="lora", lora_target_modules=(modules,), stack_adapter=False)
            blueprint = dataclasses.replace(self.blueprint, source=source, tuner=tuner)
            counts[modules] = sum(p.numel() for p in blueprint.build().trainable)
        return counts

    @cached_property
    def batch(self) -> MicroBatch:
        rows = self.config.optimizer.rows_at_a_time(int(self.data.rows.max()))
        return MicroBatch(rows, self.data.longest, self.data.fullest)

    @cached_property
    def recomputed(self) -> int:
        """Layers of the language model that run again in the backward."""
        return self._worker.num_recomputed(self.batch, self.gpu_bytes)

    @cached_property
    def memory(self) -> Memory:
        return self._worker.of(self.batch, self.recomputed)

    @cached_property
    def memory_with_other_checkpointing(self) -> Memory:
        """With gradient checkpointing where the run has none, and without where it has."""
        return self._worker.of(self.batch, 0 if self.recomputed else self.blueprint.num_layers)

    @property
    def gpu_bytes(self) -> int:
        return int(self.plan.gpu_memory_gb * GB)

    @cached_property
    def gpus_per_worker(self) -> int | None:
        if self.config.cluster.shards_models:
            return 1 if self.memory.total <= self.gpu_bytes else None
        return advice.gpus_per_worker(self.memory, self.gpu_bytes)

    @cached_property
    def remedies(self) -> list[tuple[str, Memory]]:
        """Flags that would make a run fit that does not fit one GPU."""
        return advice.remedies(self._memory_with, self.config, self.gpu_bytes)

    @cached_property
    def longest_row(self) -> int:
        worker = self._worker
        return advice.longest_row(lambda batch: worker.of(batch, worker.most_recomputed), self.batch, self.gpu_bytes)

    @cached_property
    def workers_needed(self) -> int | None:
        """The fewest workers, doubled from two on, over which a sharded model fits; None where no number does."""
        most = self._worker.most_recomputed
        counts = (2**n for n in range(1, advice.MOST_DOUBLINGS + 1))
        return next((n for n in counts if self._worker.of(self.batch, most, sharded_over=n).total <= self.gpu_bytes), None)

    @cached_property
    def options(self) -> PassOptions:
        """Those of the run."""
        share = self.recomputed / self.blueprint.num_layers
        return PassOptions(checkpointing=share, reference_known=self.blueprint.reference_known)

    def flops(self, **changed: bool) -> PairFlops:
        """Operations per pair, with some savings changed."""
        return pair_flops(self.data, self._costs, dataclasses.replace(self.options, **changed))

    @cached_property
    def schedule(self) -> Schedule:
        return advice.schedule_of(self.config, self.data)

    @cached_property
    def run_flops(self) -> float:
        """Of the whole run: its steps, its evaluations, which have no backward, and the reference where it is run before."""
        pair = self.flops()
        evaluation = pair.vision + pair.forward + pair.others + pair.head
        return self.schedule.trained * pair.total + self.schedule.evaluated * evaluation + self._beforehand_flops

    @property
    def _beforehand_flops(self) -> float:
        """Of the reference where it is run before the training."""
        return self.data.total * self.reference_flops if self.blueprint.reference_known else 0.0

    @property
    def beforehand_share(self) -> float:
        """What of the run's operations is the reference's before the training, which the trials of a sweep share."""
        return self._beforehand_flops / self.run_flops

    @property
    def reference_flops(self) -> float:
        """Per pair, of the reference's log-probabilities when they are computed before the training."""
        there, known = self.flops(reference_known=False), self.flops(reference_known=True)
        return there.total - known.total + known.vision

    @cached_property
    def time(self) -> Time | None:
        if self.gpus_per_worker is None:
            return None
        return advice.time_of(self.config, self.plan, flops=self.run_flops, per_worker=self.gpus_per_worker)

    @cached_property
    def _worker(self) -> WorkerMemory:
        return WorkerMemory(self.config, self.blueprint, self._has_images)

    @property
    def _has_images(self) -> bool:
        return bool(self.data.has_images.any())

    @cached_property
    def _costs(self) -> LanguageCosts:
        has_head = self.blueprint.needs.head == "language"
        head = self.skeleton.head
        size = head.numel() if has_head else 0
        return language_costs(self._worker.dry_runs, head_size=size, trains_head=head.requires_grad)

    def _memory_with(self, config: Config, rows: int) -> Memory:
        blueprint = dataclasses.replace(self.blueprint, model=config.model, tuner=config.tuner)
        batch = dataclasses.replace(self.batch, rows=min(rows, self.batch.rows))
        worker = WorkerMemory(config, blueprint, self._has_images)
        return worker.of(batch, worker.most_recomputed)
