"""The optimizer step and the run around it, in plain torch: for one process, under Ray Train, or on a bare GPU machine.

A step runs its micro-batches, sums gradients over workers once, clips, and updates. Nothing hooks into the backward pass, so
any number of forwards, uneven tails and idle workers are fine; only where weights are sharded must workers go in step
(`lockstep`). Where the loss of a pair depends on the other pairs of the step (KTO's KL estimate, AOT's ranks), the statistics
of all of them are taken before the first gradient.
"""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayalign.algorithms import Algorithm, AlgorithmWithStatistics, LossOutput, StepStatistics
from rayalign.config.sections import OptimizerConfig, RunConfig
from rayalign.data.batch import PairBatch
from rayalign.data.sampler import StepCounts, StepSampler
from rayalign.policy.policy import Policy
from rayalign.training.best import GOES_ON, Verdict
from rayalign.training.distributed import clip_gradients, gather, is_sharded, sum_over_workers
from rayalign.training.evaluation import WatchedForward, response_tokens, shuffled_accuracies, with_preferences
from rayalign.training.lockstep import Fillers, RecordedForward, in_step, is_filler
from rayalign.training.metric_names import PAIR_TOKENS
from rayalign.training.metrics import Clock, MetricSums, Unlogged
from rayalign.training.optimizer import PEAK, learning_rate, make_optimizer

REMEDY = "Lower --learning_rate, or use --dtype float32 or bfloat16."
LOWEST_LOSS_SCALE = 1.0
"""Gradients that overflow float16 at this scale are too large in themselves."""


def dropout_seed(seed: int, step: int, batch: PairBatch) -> int:
    """The seed of a micro-batch's random numbers, so that a resumed run draws the same ones, with any number of workers."""
    first = zlib.crc32(batch.ids[0].encode())
    return int(np.random.SeedSequence([seed, step, first]).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class StepResult:
    """What one worker has of an optimizer step.

    `grad_norm` [] is that of the gradients of all workers before clipping; `num_tokens` are those that this worker ran, without
    padding; `is_skipped`: no weight changed, since gradients overflowed float16, and the norm is not finite; `outputs` are its
    micro-batches' losses and metrics, without a graph.
    """

    grad_norm: Tensor
    num_tokens: int
    is_skipped: bool
    outputs: tuple[LossOutput, ...]


class Trainer:
    """One worker's share of the optimisation: the policy and its optimizer.

    `gather` brings a value of every worker together, by rank. `fillers`, where the policy is sharded, are what a worker runs
    that has fewer micro-batches than others.
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
        fillers: Fillers | None = None,
    ) -> None:
        self.fillers = fillers
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
        self._parameters = list(policy.trainable.values())

    @property
    def skips_steps(self) -> bool:
        """Whether a step may change no weight: the loss is scaled, as it is in float16."""
        return self.scaler.is_enabled()

    def gradients(
        self, micro_batches: Iterable[PairBatch], counts: StepCounts, *, step: int = 0
    ) -> tuple[list[LossOutput], int]:
        """Fills the gradients of a whole step, summed over workers, times the loss scale; returns what this worker's
        micro-batches contributed, without a graph, and their tokens."""
        # Statistics take a pass of their own over every micro-batch, and a stream gives each once.
        own = in_step(micro_batches, self.fillers)
        batches = list(map(self._with_features, own)) if self.algorithm.needs.statistics else own
        outputs, num_tokens = [], 0
        for batch, statistics in self._with_statistics(lambda: self._seeded(step, self._added_up_last(batches))):
            if is_filler(batch):
                nothing = self._run_filler(batch, counts, statistics)
                if nothing.requires_grad:
                    nothing.backward()
                continue
            num_tokens += batch.num_tokens
            output = self.algorithm.loss(self.policy, batch.to(self.policy.device), counts, statistics)
            if output.loss.requires_grad:  # nothing else is trained than what looks at pictures, and there are none
                self.scaler.scale(output.loss).backward()
            outputs.append(dataclasses.replace(output, loss=output.loss.detach()))
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sum_over_workers(p.grad for p in self._parameters if p.grad is not None and not is_sharded(p))
        return outputs, num_tokens

    def step(self, step: int, micro_batches: Iterable[PairBatch], counts: StepCounts) -> StepResult:
        """One optimizer step.

        In float16 a step whose gradients overflow changes no weight and halves the loss scale. Raises FloatingPointError where
        they would overflow without a scale, too.
        """
        self.optimizer.zero_grad(set_to_none=True)
        outputs, num_tokens = self.gradients(micro_batches, counts, step=step)
        # The sums are the same on every worker, and so is what follows from them.
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self._parameters, self.config.max_grad_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, self.num_steps, peak=group[PEAK])
        self.scaler.step(self.optimizer)
        return StepResult(norm, num_tokens, self._update_scale(step), tuple(outputs))

    def _update_scale(self, step: int) -> bool:
        """Returns whether the step was skipped."""
        if not self.scaler.is_enabled():
            return False
        before = self.scaler.get_scale()
        self.scaler.update()
        is_skipped = self.scaler.get_scale() < before
        if is_skipped and before <= LOWEST_LOSS_SCALE:
            raise FloatingPointError(
                f"The gradients of step {step + 1} overflow float16 even where the loss is not scaled up. {REMEDY}"
            )
        return is_skipped

    def statistics(self, batches: Iterable[PairBatch]) -> list[Tensor]:
        """What this worker contributes to the step's statistics, for each of its micro-batches [B, K]; for a filler [0, K]."""
        assert isinstance(self.algorithm, AlgorithmWithStatistics)
        found = []
        with torch.no_grad():
            for batch in batches:
                values = self.algorithm.statistics(self.policy, batch.to(self.policy.device)).cpu()
                found.append(values[:0] if is_filler(batch) else values)
        return found

    def _run_filler(self, batch: PairBatch, counts: StepCounts, statistics: StepStatistics | None) -> Tensor:
        """Runs the forwards that a loss takes; returns a loss [] without a gradient, whose backward runs theirs."""
        forward = RecordedForward(self.policy)
        self.algorithm.loss(forward, batch.to(self.policy.device), counts, statistics)
        return forward.nothing

    def evaluate(
        self, batches: Callable[[], Iterable[PairBatch]], counts: StepCounts
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Metrics over the held-out pairs of all workers, and each of this worker's pairs' own values by metric.

        `batches` makes the iterable anew each time it is called.
        """
        sums = MetricSums()
        pairs: dict[str, dict[str, float]] = {}
        with torch.no_grad(), _dropout_off(self.policy):
            for batch, statistics in self._with_statistics(lambda: in_step(batches(), self.fillers)):
                if is_filler(batch):
                    self._run_filler(batch, counts, statistics)
                    continue
                forward = WatchedForward(self.policy, batch.to(self.policy.device))
                output = with_preferences(self.algorithm.loss(forward, forward.batch, counts, statistics), forward)
                sums.add(output)
                of_batch: list[dict[str, float]] = [{} for _ in batch.ids]
                for name, values in output.pair_metrics.items():
                    missing = output.missing[name].tolist() if name in output.missing else [False] * batch.num_pairs
                    for of_pair, value, is_missing in zip(of_batch, values.tolist(), missing, strict=True):
                        if not is_missing:
                            of_pair[name] = value
                for of_pair, *tokens in zip(of_batch, *response_tokens(batch), strict=True):
                    of_pair |= zip(PAIR_TOKENS, tokens, strict=True)
                pairs |= zip(batch.ids, of_batch, strict=True)
        return sums.reduce(steps=1), pairs

    def evaluate_shuffled(self, batches: Iterable[PairBatch]) -> dict[str, dict[str, float]]:
        """The accuracies of this worker's pairs of two responses, by id, whose pictures are those of other records."""
        beside_reference = self.algorithm.needs.reference and self.policy.can_run_reference
        pairs = {}
        with torch.no_grad(), _dropout_off(self.policy):
            for batch in in_step(batches, self.fillers):
                moved = batch.to(self.policy.device)
                found = shuffled_accuracies(self.policy, moved, beside_reference=beside_reference)
                if is_filler(batch):
                    continue
                values = {name: of_pairs.tolist() for name, of_pairs in found.items()}
                for number, (pair_id, *tokens) in enumerate(zip(batch.ids, *response_tokens(batch), strict=True)):
                    if all(tokens):
                        pairs[pair_id] = {name: of_pairs[number] for name, of_pairs in values.items()}
        return pairs

    def _seeded(self, step: int, batches: Iterable[PairBatch]) -> Iterator[PairBatch]:
        """The same batches; dropout's masks in each depend on the step and the batch alone."""
        for batch in batches:
            torch.manual_seed(dropout_seed(self.config.seed, step, batch))
            yield batch

    def _added_up_last(self, batches: Iterable[PairBatch]) -> Iterator[PairBatch]:
        """The same batches; what gradients of sharded weights may wait for is the last one's backward."""
        if self.fillers is None:  # nothing is sharded
            yield from batches
            return
        iterator = iter(batches)
        batch = next(iterator, None)
        while batch is not None:
            following = next(iterator, None)
            self.policy.add_up_shards(following is None)
            yield batch
            batch = following

    def _with_features(self, batch: PairBatch) -> PairBatch:
        """The batch with its images' features, which a frozen tower need not make twice."""
        if not batch.image_inputs or self.policy.trains_vision:
            return batch
        with torch.no_grad():
            return dataclasses.replace(batch, image_features=self.policy.image_features(batch.to(self.policy.device)))

    def _with_statistics(self, batches: Callable[[], Iterable[PairBatch]]) -> Iterable[tuple[PairBatch, StepStatistics | None]]:
        """Each micro-batch with the step's statistics, if the algorithm needs them."""
        if self.algorithm.needs.statistics:
            return zip(batches(), self._step_statistics(batches), strict=True)
        return ((batch, None) for batch in batches())

    def _step_statistics(self, batches: Callable[[], Iterable[PairBatch]]) -> list[StepStatistics]:
        """The statistics of all workers as each of this worker's micro-batches sees them. Every worker calls it, an idle one,
        too."""
        mine = self.statistics(batches())
        everyone: list[list[Tensor]] = self.gather(mine)
        lines = [batch for worker in everyone for batch in worker]
        whole = torch.cat(lines).to(self.policy.device) if lines else torch.empty(0)
        before = sum(len(batch) for worker in everyone[: self.rank] for batch in worker)
        starts = itertools.accumulate((len(batch) for batch in mine), initial=before)
        return [StepStatistics(whole, first if len(batch) else 0) for first, batch in zip(starts, mine, strict=False)]


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
    """What is done with a line of metrics, and at evaluations and checkpoints. All workers call each, at the same steps.

    `judge` says after an evaluation what it means for the run, the same to every worker. `is_urgent` says after each step
    whether a checkpoint must be written at once, the same to every worker, too. `around_step`: a context for each step, by its
    number, counted from 1, and its pairs. A checkpoint is saved with what each worker has not logged yet, by rank.
    """

    log: Callable[[Mapping[str, float]], None]
    evaluate: Callable[[int], None]
    save: Callable[[int, Sequence[Unlogged]], None]
    judge: Callable[[int], Verdict] = lambda step: GOES_ON
    is_urgent: Callable[[int], bool] = lambda step: False
    around_step: Callable[[int, int], AbstractContextManager[None]] = lambda step, pairs: nullcontext()


def run_steps(
    trainer: Trainer,
    sampler: StepSampler,
    stream: Iterator[tuple[int, PairBatch]],
    run: RunConfig,
    events: LoopEvents,
    *,
    start_step: int,
    tokens_before: float = 0,
    unlogged: Unlogged | None = None,
) -> int:
    """Trains from `start_step` (steps already done) to the sampler's end, or to where the run is judged to stop; returns that
    step.

    `stream` yields this worker's (step, micro-batch) in sampler order; `tokens_before` is what `num_tokens` counts on from,
    `unlogged` what this worker had not logged at its checkpoint.
    Raises FloatingPointError when the loss is no longer finite. Steps that float16 skips are counted as `skipped_steps`; they
    have no gradient norm.
    """
    before = unlogged or Unlogged()
    clock = Clock(tokens_before, trainer.policy.num_tokens_with_padding, before=before)
    window, skipped_steps = MetricSums(before=before.sums), before.skipped_steps

    def log(step: int, result: StepResult) -> float:
        """Writes a line of metrics; returns its loss."""
        nonlocal window, skipped_steps
        metrics = window.reduce(steps=clock.steps)
        if trainer.skips_steps:
            metrics["skipped_steps"] = skipped_steps
        if not result.is_skipped:
            metrics["grad_norm"] = float(result.grad_norm)
        window, skipped_steps = MetricSums(), 0
        rates = clock.reduce()
        rate = learning_rate(trainer.config, step, sampler.num_steps)
        epoch = (step + 1) / sampler.steps_per_epoch
        events.log({"step": step + 1, "epoch": epoch, **metrics, "learning_rate": rate, **rates})
        return metrics["loss"]

    for step in range(start_step, sampler.num_steps):
        count = len(sampler.micro_batches(step, trainer.rank))
        counts = sampler.counts(step)
        with events.around_step(step + 1, counts.pairs):
            result = trainer.step(step, clock.waited_for(_take(stream, step, count)), counts)
        clock.count(pairs=counts.pairs, tokens=result.num_tokens)
        for output in result.outputs:
            window.add(output)
        skipped_steps += result.is_skipped
        done = step + 1
        if done % run.logging_steps == 0 or done == sampler.num_steps:
            loss = log(step, result)
            if not math.isfinite(loss):
                raise FloatingPointError(f"The loss is {loss} at step {done}. {REMEDY}")
        verdict = GOES_ON
        if done % run.eval_steps == 0 or done == sampler.num_steps:
            events.evaluate(done)
            verdict = events.judge(done)
            clock.skip()
        is_urgent = events.is_urgent(done)
        if done % run.save_steps == 0 or done == sampler.num_steps or verdict.saves or is_urgent:
            if not (result.is_skipped or math.isfinite(float(result.grad_norm))):
                if clock.steps:
                    log(step, result)
                raise FloatingPointError(
                    f"The gradient norm is {float(result.grad_norm)} at step {done}, so no checkpoint is written. {REMEDY}"
                )
            events.save(
                done, trainer.gather(Unlogged(clock.steps, skipped_steps, window.local, *clock.tokens)) if clock.steps else ()
            )
            clock.skip()
        if verdict.stops:
            return done
    return sampler.num_steps


def _take(stream: Iterator[tuple[int, PairBatch]], step: int, count: int) -> Iterator[PairBatch]:
    for _ in range(count):
        arrived, batch = next(stream)
        assert arrived == step, f"the stream is at step {arrived}, the sampler at {step}"
        yield batch
