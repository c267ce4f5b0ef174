"""What follows from sizes and operations: the longest row that fits, how many GPUs a worker needs, hours and cost."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rayalign.config.config import Config
from rayalign.config.plan import PlanConfig
from rayalign.data.sampler import num_held_out, steps_of_run
from rayalign.estimate.memory import OVERHEAD_BYTES, Memory, MicroBatch
from rayalign.estimate.shapes import DataShapes

MOST_GPUS = 16
"""GPUs that one worker may spread its model over: more than one node has."""
MOST_DOUBLINGS = 10
"""Over as many as two to this power workers a sharded model is tried."""
UNEVEN = 1.1
"""Assumed: the fullest GPU of a model that is spread over several holds this much more than its even share."""
SHORTEST_FACTOR = 0.01
"""Rows that are shorter than this share of the data's longest don't count as fitting."""
MOST_TRIES, CAUTION, NEAR_ENOUGH = 6, 0.99, 0.03


@dataclass(frozen=True)
class Schedule:
    """The run's length: optimizer steps, epochs, pairs trained on and pairs evaluated (repeats counted)."""

    steps: int
    epochs: float
    trained: float
    evaluated: int


@dataclass(frozen=True)
class Time:
    """Hours of the run on `gpus` GPUs, of which `busy` compute at a time, and what they cost (None: no price is known)."""

    gpus: int
    busy: int
    hours: float
    cost: float | None


def schedule_of(config: Config, data: DataShapes) -> Schedule:
    """The run's length."""
    training = data.total - data.held_out
    per_epoch, steps = steps_of_run(
        training,
        global_batch_size=config.global_batch_size,
        num_epochs=config.optimizer.num_train_epochs,
        max_steps=config.optimizer.max_steps,
    )
    return Schedule(steps, steps / per_epoch, steps * training / per_epoch, _evaluated(config, data, steps))


def _evaluated(config: Config, data: DataShapes, steps: int) -> int:
    """Pairs that a run evaluates: those it draws at each pass and before the first step, and those with pictures at the end
    once more, on the pictures of others."""
    drawn = min(data.evaluated, config.run.max_eval_records)
    passes = math.ceil(steps / config.run.eval_steps) + config.run.eval_on_start
    with_pictures = float(data.has_images.mean()) if data.pairs else 0.0
    return round(drawn * (passes + with_pictures))


def held_out_of(config: Config, *, total: int) -> int:
    """Records that a run holds out of `total` for its evaluations."""
    return num_held_out(total, config.data.dataset_test_ratio)


def longest_row(memory: Callable[[MicroBatch], Memory], batch: MicroBatch, gpu_bytes: int) -> int:
    """Tokens of the longest row that fits, with as many rows at a time, and prompt and responses in proportion to those of the
    longest pair; 0 where none does. A little too short, rather than too long.

    Memory is nearly a square function of the length, since masks are dense: each try is the root of the one through the three
    lengths that came nearest.
    """
    known = {factor: memory(batch.scaled(factor)).total - gpu_bytes for factor in (0.25, 1.0, 4.0)}
    for _ in range(MOST_TRIES):
        near = sorted(known, key=lambda factor: abs(known[factor]))[:3]
        guess = CAUTION * _root(near, [known[factor] for factor in near])
        if not guess >= SHORTEST_FACTOR:
            return 0
        known[guess] = memory(batch.scaled(guess)).total - gpu_bytes
        if -NEAR_ENOUGH * gpu_bytes <= known[guess] <= 0:
            return batch.scaled(guess).shape().tokens
    fitting = max((factor for factor, excess in known.items() if excess <= 0), default=0.0)
    return batch.scaled(fitting).shape().tokens if fitting else 0


def _root(arguments: Sequence[float], values: Sequence[float]) -> float:
    """Where the parabola through three points, which rises for positive arguments, is zero; NaN where it is not."""
    c, b, a = np.linalg.solve(np.vander(arguments, 3, increasing=True), np.array(values))
    inside = b * b - 4 * a * c
    if inside < 0 or a == 0:
        return math.nan
    return float((-b + math.sqrt(inside)) / (2 * a))


def gpus_per_worker(memory: Memory, gpu_bytes: int) -> int | None:
    """GPUs over which a worker must spread its model; None where MOST_GPUS are not enough."""
    if memory.total <= gpu_bytes:
        return 1
    spread = UNEVEN * (memory.total - OVERHEAD_BYTES)
    return next((n for n in range(2, MOST_GPUS + 1) if spread / n + OVERHEAD_BYTES <= gpu_bytes), None)


def remedies(memory_with: Callable[[Config, int], Memory], config: Config, gpu_bytes: int) -> list[tuple[str, Memory]]:
    """Changes of flags that make the run fit one GPU, each by itself, with the memory that it takes then; of the numbers of
    workers that share a model the first that does. `memory_with` gives that of a configuration and a number of rows at a
    time."""
    tried: list[tuple[str, Config]] = []
    if not config.model.gradient_checkpointing:
        tried.append(("--gradient_checkpointing true", config.replace({"gradient_checkpointing": True})))
    if config.optimizer.batch_size > 1:
        tried.append(("--batch_size 1", config.replace({"batch_size": 1})))
    if config.tuner.sft_type == "full":
        tried.append(("--sft_type lora", config.replace({"sft_type": "lora"})))
    elif config.tuner.quant_bits is None:
        tried.append(("--quant_bits 4", config.replace({"quant_bits": 4})))
    if config.model.dtype == "float32":
        tried.append(("--dtype bfloat16", config.replace({"dtype": "bfloat16"})))

    def fitting(those: Iterable[tuple[str, Config]]) -> Iterator[tuple[str, Memory]]:
        found = ((words, memory_with(changed, changed.optimizer.batch_size)) for words, changed in those)
        return ((words, memory) for words, memory in found if memory.total <= gpu_bytes)

    return [*fitting(tried), *itertools.islice(fitting(_sharded(config)), 1)]


def _sharded(config: Config) -> Iterator[tuple[str, Config]]:
    """The run with its model sharded over its workers, and over more and more of them; none where it can't be, or is."""
    if config.cluster.strategy not in ("auto", "ddp"):
        return
    own = config.cluster.fewest_workers
    for number in (own, *(2**n for n in range(1, MOST_DOUBLINGS + 1) if 2**n > own)):
        more = {} if number == own else {"num_workers": number}
        words = "".join(f" --{name} {value}" for name, value in more.items())
        if number > 1:
            try:
                yield f"--strategy fsdp{words}", config.replace({"strategy": "fsdp", **more})
            except ValueError:  # what can't be sharded, or over so many
                continue


def time_of(config: Config, plan: PlanConfig, *, flops: float, per_worker: int) -> Time:
    """Of a run of so many operations. GPUs of one worker take turns; workers run side by side.

    Raises ValueError for fewer GPUs than one model needs.
    """
    gpus = plan.gpus or config.cluster.most_workers * per_worker
    cluster = config.cluster
    least = cluster.num_shards if cluster.shards_models else per_worker
    if gpus < least:
        needs = f"a worker needs {least} of {plan.gpu_memory_gb:g} GB for its model"
        why = f"the model is sharded over {least} workers of a GPU each" if cluster.shards_models else needs
        raise ValueError(f"--gpus {gpus}: {why}. Pass --gpus {least} or more, or leave it out.")
    busy = gpus // per_worker
    hours = flops / (busy * plan.gpu_tflops * 1e12 * plan.mfu) / 3600
    return Time(gpus, busy, hours, None if plan.price_per_hour is None else hours * gpus * plan.price_per_hour)
