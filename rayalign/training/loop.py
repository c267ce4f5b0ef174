"""The optimizer step and the run around it, in plain torch: works on one process, under Ray Train, or on a bare GPU machine.

A step runs its micro-batches, sums gradients over workers once, clips, and updates. Nothing hooks into the backward pass, so
any number of forwards, uneven tails and idle workers are fine. Where the loss of a pair depends on the other pairs of the step
(KTO's KL estimate, AOT's ranks), the statistics of all of them are taken before the first gradient.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayalign.algorithms import Algorithm, AlgorithmWithStatistics, LossOutput, StepStatistics
from rayalign.config.sections import OptimizerConfig, RunConfig
from rayalign.data.batch import PairBatch
from rayalign.data.sampler import StepCounts, StepSampler
from rayalign.policy.policy import Policy
from rayalign.training.metrics import Clock, MetricSums, gather

logger = logging.getLogger(__name__)

BUCKET_ELEMENTS = 64 * 2**20
REMEDY = "Lower --learning_rate, or use --dtype float32 or bfloat16."
LOWEST_LOSS_SCALE = 1.0
"""Gradients that overflow float16 at this scale are too large in themselves."""


def make_optimizer(policy: Policy, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable weights; no decay on biases and norms (fewer than two dimensions).

    Raises ValueError where there are none.
    """
    parameters = list(policy.trainable.values())
    if not parameters:
        raise ValueError(
            "Nothing learns: what training starts from has an adapter on parts that are frozen, and on no others. Turn "
            "--freeze_vit, --freeze_aligner or --freeze_llm off."
        )
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=policy.device.type == "cuda",
    )


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of a step (0-based): a linear rise over `warmup_ratio` of the steps, then the decay to 0."""
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    match config.lr_scheduler_type:
        case "linear":
            factor = 1 - progress
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            factor = 1.0
    return config.learning_rate * factor


def sum_over_workers(tensors: Iterable[Tensor]) -> None:
    """Adds each tensor up over all workers, in place; buckets bound the extra memory."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS or bucket[0].dtype != tensor.dtype):
            _sum_bucket(bucket)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([t.reshape(-1) for t in bucket])
    dist.all_reduce(flat)
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def start_alike(policy: Policy) -> None:
    """Gives every worker rank 0's trainable weights."""
    if dist.is_initialized():
        for parameter in policy.trainable.values():
            dist.broadcast(parameter.data, src=0)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a worker's random numbers in a step, so that a resumed run draws the same ones."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


class Trainer:
    """One worker's share of the optimisation: the policy, its optimizer, and the sums behind the next line of metrics.

    `gather` brings a value of every worker together, by rank.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        config: OptimizerConfig,
        *,
        num_steps: int,
        rank: int = 0,
        gather: Callable[[Any], list[Any]] = gather,
    ) -> None:
        self.policy = policy
        self.algorithm = algorithm
        self.config = config
        self.num_steps = num_steps
        self.rank = rank
        self.gather = gather
        self.optimizer = make_optimizer(policy, config)
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)
        # It makes its scale with the first loss, and an idle worker has none.
        self.scaler.scale(torch.zeros((), device=policy.device))
        self.window = MetricSums()
        self.skipped = False
        """Whether the last step changed no weight, since its gradients overflowed float16."""
        self._parameters = list(policy.trainable.values())

    def gradients(self, micro_batches: Iterable[PairBatch], counts: StepCounts) -> int:
        """Fills the gradients of a whole step, summed over workers, times the loss scale; returns this worker's tokens."""
        # Statistics take a pass of their own over every micro-batch, and a stream gives each once.
        batches = list(map(self._with_features, micro_batches)) if self.algorithm.needs.statistics else micro_batches
        tokens = 0
        for batch, output in self._outputs(lambda: batches, counts):
            tokens += batch.num_tokens
            self.scaler.scale(output.loss).backward()
            self.window.add(output)
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sum_over_workers(p.grad for p in self._parameters if p.grad is not None)
        return tokens

    def step(self, step: int, micro_batches: Iterable[PairBatch], counts: StepCounts) -> tuple[Tensor, int]:
        """One optimizer step; returns the gradient norm before clipping [] and the tokens this worker ran.

        In float16 a step whose gradients overflow changes no weight: it halves the loss scale, and its norm is not finite.
        Raises FloatingPointError where they would overflow without a scale, too.
        """
        torch.manual_seed(dropout_seed(self.config.seed, step, self.rank))
        self.optimizer.zero_grad(set_to_none=True)
        tokens = self.gradients(micro_batches, counts)
        # The sums are the same on every worker, and so is what follows from them.
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, self.num_steps)
        self.scaler.step(self.optimizer)
        self._update_scale(step)
        return norm, tokens

    def _update_scale(self, step: int) -> None:
        if not self.scaler.is_enabled():
            return
        before = self.scaler.get_scale()
        self.scaler.update()
        self.skipped = self.scaler.get_scale() < before
        if self.skipped and before <= LOWEST_LOSS_SCALE:
            raise FloatingPointError(
                f"The gradients of step {step + 1} overflow float16 even where the loss is not scaled up. {REMEDY}"
            )

    def statistics(self, batches: Iterable[PairBatch]) -> list[Tensor]:
        """What this worker contributes to the step's statistics, for each of its micro-batches [B, K]."""
        assert isinstance(self.algorithm, AlgorithmWithStatistics)
        with torch.no_grad():
            return [self.algorithm.statistics(self.policy, batch.to(self.policy.device)).cpu() for batch in batches]

    def evaluate(
        self, batches: Callable[[], Iterable[PairBatch]], counts: StepCounts
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Metrics over the held-out pairs of all workers, and each of this worker's pairs' own values by metric.

        `batches` makes the iterable anew each time it is called.
        """
        sums = MetricSums()
        pairs: dict[str, dict[str, float]] = {}
        with torch.no_grad(), _dropout_off(self.policy):
            for batch, output in self._outputs(batches, counts):
                sums.add(output)
                for name, values in output.pair_metrics.items():
                    missing = output.missing[name].tolist() if name in output.missing else [False] * batch.num_pairs
                    for pair_id, value, is_missing in zip(batch.ids, values.tolist(), missing, strict=True):
                        of_pair = pairs.setdefault(pair_id, {})
                        if not is_missing:
                            of_pair[name] = value
        return sums.reduce(steps=1), pairs

    def _with_features(self, batch: PairBatch) -> PairBatch:
        """The batch with its images' features, which a frozen tower need not make twice."""
        if not batch.image_inputs or self.policy.trains_vision:
            return batch
        with torch.no_grad():
            return dataclasses.replace(batch, image_features=self.policy.image_features(batch.to(self.policy.device)))

    def _outputs(
        self, batches: Callable[[], Iterable[PairBatch]], counts: StepCounts
    ) -> Iterator[tuple[PairBatch, LossOutput]]:
        """Each micro-batch with what the algorithm makes of it, after the step's statistics if it needs them."""
        paired: Iterable[tuple[PairBatch, StepStatistics | None]]
        if self.algorithm.needs.statistics:
            paired = zip(batches(), self._step_statistics(batches), strict=True)
        else:
            paired = ((batch, None) for batch in batches())
        for batch, statistics in paired:
            yield batch, self.algorithm.loss(self.policy, batch.to(self.policy.device), counts, statistics)

    def _step_statistics(self, batches: Callable[[], Iterable[PairBatch]]) -> list[StepStatistics]:
        """The statistics of all workers as each of this worker's micro-batches sees them. Every worker calls it, an idle one,
        too."""
        mine = self.statistics(batches())
        everyone: list[list[Tensor]] = self.gather(mine)
        lines = [part for worker in everyone for part in worker]
        whole = torch.cat(lines).to(self.policy.device) if lines else torch.empty(0)
        before = sum(len(part) for worker in everyone[: self.rank] for part in worker)
        starts = itertools.accumulate((len(part) for part in mine), initial=before)
        return [StepStatistics(whole, first) for first, _ in zip(starts, mine, strict=False)]


def _dropout_off(policy: Policy) -> AbstractContextManager[None]:
    decoder = policy.base.get_decoder()
    if not any(isinstance(m, nn.Dropout) and m.p > 0 for m in decoder.modules()):
        return nullcontext()
    return _EvalMode(decoder)


class _EvalMode(AbstractContextManager[None]):
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._module.eval()

    def __exit__(self, *exception: object) -> None:
        self._module.train()


@dataclass(frozen=True)
class LoopEvents:
    """What the surroundings do when the loop says so. All workers call each, at the same steps."""

    log: Callable[[Mapping[str, float]], None]
    evaluate: Callable[[int], None]
    save: Callable[[int], None]


def run_steps(
    trainer: Trainer,
    sampler: StepSampler,
    stream: Iterator[tuple[int, PairBatch]],
    run: RunConfig,
    events: LoopEvents,
    *,
    start_step: int,
    tokens_before: float = 0,
) -> None:
    """Trains from `start_step` (steps already done) to the sampler's end.

    `stream` yields this worker's (step, micro-batch) in sampler order; `tokens_before` is what `num_tokens` counts on from.
    Raises FloatingPointError when the loss is no longer finite. Steps that float16 skips are counted as `skipped_steps`; they
    have no gradient norm.
    """
    clock = Clock(tokens_before, trainer.policy.num_tokens_with_padding)
    skipped_steps = 0
    for step in range(start_step, sampler.num_steps):
        count = len(sampler.micro_batches(step, trainer.rank))
        counts = sampler.counts(step)
        norm, tokens = trainer.step(step, clock.waited_for(_take(stream, step, count)), counts)
        clock.count(pairs=counts.pairs, tokens=tokens)
        skipped_steps += trainer.skipped
        done = step + 1
        if done % run.logging_steps == 0 or done == sampler.num_steps:
            metrics = trainer.window.reduce(steps=clock.steps)
            trainer.window = MetricSums()
            if not math.isfinite(metrics["loss"]):
                raise FloatingPointError(f"The loss is {metrics['loss']} at step {done}. {REMEDY}")
            if trainer.scaler.is_enabled():
                metrics["skipped_steps"] = skipped_steps
                skipped_steps = 0
            if not trainer.skipped:
                metrics["grad_norm"] = float(norm)
            rates = clock.reduce()
            rate = learning_rate(trainer.config, step, sampler.num_steps)
            epoch = done / sampler.steps_per_epoch
            events.log({"step": done, "epoch": epoch, **metrics, "learning_rate": rate, **rates})
        if done % run.eval_steps == 0 or done == sampler.num_steps:
            events.evaluate(done)
            clock.skip()
        if done % run.save_steps == 0 or done == sampler.num_steps:
            if not (trainer.skipped or math.isfinite(float(norm))):
                raise FloatingPointError(
                    f"The gradient norm is {float(norm)} at step {done}, so no checkpoint is written. {REMEDY}"
                )
            events.save(done)
            clock.skip()


def _take(stream: Iterator[tuple[int, PairBatch]], step: int, count: int) -> Iterator[PairBatch]:
    for _ in range(count):
        arrived, batch = next(stream)
        assert arrived == step, f"the stream is at step {arrived}, the sampler at {step}"
        yield batch
