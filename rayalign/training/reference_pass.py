"""The reference's log-probabilities of a model that is sharded over the train workers, which compute them together before they
train, and before they load a checkpoint. What is stored, and where, is that of `reference.precompute`; a shard is complete or
absent, so that a start after a kill goes on with the missing ones."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from rayalign.cluster import Stopped, outcome_of, result_of
from rayalign.config.config import Config
from rayalign.data.batch import PairBatch
from rayalign.data.prepare import RunData
from rayalign.data.reference_store import missing_shards
from rayalign.data.sampler import StepSampler
from rayalign.data.store import PreparedData
from rayalign.policy.policy import Policy
from rayalign.progress import Progress
from rayalign.reference.precompute import needed_rows
from rayalign.reference.scoring import Found, Piece, Shards, reference_logps
from rayalign.training.distributed import gather
from rayalign.training.lockstep import Fillers, in_step, is_filler

Missing = Sequence[tuple[PreparedData, list[int]]]
"""Data sets, each with the shards of its reference that are still to be computed."""


def missing_reference(config: Config, data: RunData, sampler: StepSampler) -> Missing:
    """What the workers of a run still have to compute, as rank 0 sees it. Every worker calls it."""
    rows, rows_held_out = needed_rows(config, data, sampler)
    of_all = [(data.training, rows), *([(data.held_out, rows_held_out)] if data.held_out else [])]
    named = [(records, its) for records, its in of_all if records.reference]
    found: list[list[int]] = gather([missing_shards(records.folder / str(records.reference), its) for records, its in named])[0]
    return [(records, shards) for (records, _), shards in zip(named, found, strict=True) if shards]


def compute_reference(
    policy: Policy,
    config: Config,
    data: RunData,
    missing: Missing,
    *,
    rank: int,
    num_workers: int,
    say: Callable[..., None],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Computes and writes what is missing, of which each worker does its share of the shards, a round of one each at a time.
    Every worker calls it with the same policy, as it is before its first step; `tick` is called for each batch.

    Raises ValueError on all workers for records of the cache that one of them can't read.
    """
    progress = Progress(sum(len(shards) for _, shards in missing))
    say("Reference: computing log-probs of %d shards", progress.total)
    for records, shards in missing:
        own = Shards(config, data, records, str(records.reference))
        fillers = Fillers(data.spec, own.needs)
        for first in range(0, len(shards), num_workers):
            round_ = shards[first : first + num_workers]
            outcome = _compute(policy, own, round_[rank] if rank < len(round_) else None, fillers, tick)
            # The end of the round, which all see as they begin the next one: no shard of it is missing any more.
            for each in gather(outcome):
                result_of(each)
            if progress.add(len(round_)):
                say("Reference: %s", progress.line("shards"))
    say("Reference: log-probs of %d shards in %.1f s", progress.total, progress.seconds)


def _compute(policy: Policy, shards: Shards, shard: int | None, fillers: Fillers, tick: Callable[[], None]) -> Stopped | None:
    """One worker's part of a round; returns what kept it from reading its records, which ends its part alone."""
    found: Found = {}
    waiting: deque[Piece] = deque()
    problem: Stopped | None = None
    pieces = shards.pieces(shard) if shard is not None else iter(())

    def batches() -> Iterator[PairBatch]:
        nonlocal problem
        while isinstance(piece := outcome_of(lambda: next(pieces, None), errors=(ValueError,)), Piece):
            waiting.append(piece)
            yield piece.batch
        problem = piece

    for batch in in_step(batches(), fillers):
        tick()
        logps = reference_logps(policy, batch)
        if not is_filler(batch):
            found |= waiting.popleft().found(logps)
    if problem is None and shard is not None:
        shards.write(shard, found)
    return problem
