"""Which records make optimizer step k: a pure function of (seed, epoch, the prepared records), never of timing.

So a run that is killed and resumed, at any step and on any worker count, trains on what an undisturbed run would have; and
every worker knows the whole step's counts without asking the others. `store` holds the records, `stream` brings them in this
order.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayalign.data.pairs import Rows, TokenCounts
from rayalign.data.store import PairReader, PreparedData

WINDOW_ROWS = 65_536
"""Rows are shuffled within windows of this many neighbours (and the windows among each other), so that the reads of a step stay
in few shards of a data set of any size."""

ROW_NUMBER = np.int32
"""The type of row numbers. An order takes 4 bytes a row, in each process; no generator looks at the type."""

CHUNK_PAIRS = 64
"""One fetch brings whole steps, about this many pairs of one worker at a time."""


@dataclass(frozen=True)
class StepCounts:
    """Counts over a WHOLE optimizer step: every worker, every micro-batch. Losses are divided by them, so that no cut of a
    global batch changes the update. A pair has one response or two."""

    pairs: int
    responses: int
    chosen_tokens: int
    rejected_tokens: int

    @classmethod
    def of(cls, tokens: TokenCounts) -> "StepCounts":
        """Of a step of rows with these token counts; a response without tokens is none."""
        responses = np.count_nonzero(tokens.chosen) + np.count_nonzero(tokens.rejected)
        return cls(tokens.num_rows, int(responses), int(tokens.chosen.sum()), int(tokens.rejected.sum()))


@dataclass(frozen=True)
class SamplerSettings:
    """What the order of a run depends on besides the records. `held_out_ratio` of the rows are never trained on;
    `with_partners`: a fetch brings each row's partner along, too; `packs_rows`: the model runs over rows without padding."""

    global_batch_size: int
    batch_size: int
    num_workers: int
    num_epochs: float
    max_steps: int | None
    seed: int
    held_out_ratio: float = 0.0
    with_partners: bool = False
    max_tokens_per_batch: int | None = None
    packs_rows: bool = False


def partners_in(order: Rows, rows: Rows) -> Rows:
    """For each of `rows`, the row that comes after it in `order` (after the last, the first): what a companion's
    rows are made of beside the row itself."""
    sorter = np.argsort(order, kind="stable")
    positions = sorter[np.searchsorted(order, rows, sorter=sorter)]
    partners: Rows = order[(positions + 1) % len(order)]
    return partners


def num_held_out(num_rows: int, ratio: float) -> int:
    """How many of the rows are held out; at least one stays for training."""
    return min(round(num_rows * ratio), num_rows - 1)


def nothing_held_out(num_rows: int, ratio: float) -> str | None:
    """Words for a run in which a part of the rows should be held out, and the part is less than a row."""
    if not ratio or num_held_out(num_rows, ratio):
        return None
    enough = next((f"{share:.2g}" for share in (0.1, 1 / num_rows) if num_held_out(num_rows, share)), None)
    larger = f", or a larger --dataset_test_ratio such as {enough}" if enough else ""
    return (
        f"nothing is held out, so that nothing is evaluated: {ratio:.2g} of {num_rows} records is less than one. Pass "
        f"--val_dataset{larger}."
    )


def steps_of_run(num_rows: int, *, global_batch_size: int, num_epochs: float, max_steps: int | None) -> tuple[int, int]:
    """The optimizer steps of an epoch over some rows to train on, and of the whole run."""
    per_epoch = math.ceil(num_rows / global_batch_size)
    return per_epoch, max_steps or max(1, math.ceil(num_epochs * per_epoch))


def hold_out(num_rows: int, *, ratio: float, seed: int) -> tuple[Rows, Rows]:
    """Splits row numbers into (training, held-out), both ascending."""
    held = num_held_out(num_rows, ratio)
    order = np.arange(num_rows, dtype=ROW_NUMBER)
    np.random.default_rng([seed, 0x5E1EC7]).shuffle(order)
    return np.sort(order[held:]), np.sort(order[:held])


def draw_rows(rows: Rows, *, at_most: int, seed: int) -> Rows:
    """The rows, or so many of them, drawn and ascending."""
    if len(rows) <= at_most:
        return rows
    return np.sort(np.random.default_rng([seed, 0xE7A1]).permutation(rows)[:at_most])


def epoch_order(rows: Rows, *, seed: int, epoch: int) -> Rows:
    """All rows once, in the order of an epoch: windows shuffled, and rows shuffled within each window."""
    generator = np.random.default_rng([seed, epoch])
    windows = [rows[start : start + WINDOW_ROWS] for start in range(0, len(rows), WINDOW_ROWS)]
    return np.concatenate([generator.permutation(windows[i]) for i in generator.permutation(len(windows))])


def cut_micro_batches(
    rows: Rows,
    token_counts: TokenCounts,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    packs_rows: bool = False,
    rank: int,
    num_workers: int,
) -> list[Rows]:
    """Cuts rows into micro-batches, the same for any number of workers, and returns those of one worker.

    Each has at most `batch_size` rows, and at most `max_tokens` tokens, unless one row alone has more. Rows of a micro-batch
    are of similar length, so that there is little padding, which counts as tokens; the longest come first. Where the model
    packs rows there is none: without `max_tokens`, micro-batches are then made to have about as many tokens each, so that
    workers need not wait for one another.
    """
    by_length = rows[np.argsort(-token_counts.row_tokens(rows), kind="stable")]
    if packs_rows and max_tokens is None:
        cut = _deal(by_length, math.ceil(len(rows) / batch_size))
    else:
        cut, start = [], 0
        while start < len(by_length):
            tokens = token_counts.row_tokens(by_length[start : start + batch_size])
            total = np.cumsum(tokens if packs_rows else np.full_like(tokens, tokens[0]))
            size = len(tokens) if max_tokens is None else max(1, int(np.searchsorted(total, max_tokens, side="right")))
            cut.append(by_length[start : start + size])
            start += size
    return [cut[i] for i in _deal(np.arange(len(cut)), num_workers)[rank]]


def _deal(items: Rows, hands: int) -> list[Rows]:
    """Deals items one by one, to and fro, so that the hands come out alike where the items grow smaller."""
    rounds, turns = np.divmod(np.arange(len(items)), max(1, hands))
    hand = np.where(rounds % 2 == 0, turns, hands - 1 - turns)
    return [items[hand == i] for i in range(hands)]


def require_partners(num_rows: int, purpose: str) -> None:
    """Raises ValueError where a row would be its own partner."""
    if num_rows == 1:
        raise ValueError(
            f"There is one record {purpose}, and kto compares each prompt with the responses to another one: add records."
        )


class StepSampler:
    """The records of every step.

    A step takes `global_batch_size` rows (the last one of an epoch what is left); its micro-batches (`cut_micro_batches`) are
    dealt to the workers in turn. Raises ValueError where there is nothing to train on.
    """

    def __init__(self, token_counts: TokenCounts, settings: SamplerSettings) -> None:
        if token_counts.num_rows == 0:
            raise ValueError("There are no records to train on.")
        self.token_counts = token_counts
        self.settings = settings
        self.rows, self.held_out = hold_out(token_counts.num_rows, ratio=settings.held_out_ratio, seed=settings.seed)
        if settings.with_partners:
            require_partners(len(self.rows), "to train on")
        self.steps_per_epoch, self.num_steps = steps_of_run(
            len(self.rows),
            global_batch_size=settings.global_batch_size,
            num_epochs=settings.num_epochs,
            max_steps=settings.max_steps,
        )
        self._order = functools.lru_cache(maxsize=1)(lambda epoch: epoch_order(self.rows, seed=settings.seed, epoch=epoch))

    def rows_of_step(self, step: int) -> Rows:
        """Row numbers of a step (0-based)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        size = self.settings.global_batch_size
        rows: Rows = self._order(epoch)[k * size : (k + 1) * size]
        return rows

    def counts(self, step: int) -> StepCounts:
        """Counts over the whole step, on all workers."""
        return StepCounts.of(self.token_counts.take(self.rows_of_step(step)))

    def micro_batches(self, step: int, rank: int) -> list[Rows]:
        """A worker's micro-batches of a step; a worker may have one less than another, or none."""
        settings = self.settings
        rows = self.rows_of_step(step)
        return cut_micro_batches(
            rows,
            self.token_counts,
            batch_size=settings.batch_size,
            max_tokens=settings.max_tokens_per_batch,
            packs_rows=settings.packs_rows,
            rank=rank,
            num_workers=settings.num_workers,
        )

    def partners(self, step: int, rows: Rows) -> Rows:
        """The partner of each of a step's rows: the next one in the order of the epoch, whatever the cut."""
        order = self._order(step // self.steps_per_epoch)
        end = (step % self.steps_per_epoch + 1) * self.settings.global_batch_size
        following = order[end : end + 1] if end < len(order) else order[:1]
        return partners_in(np.append(self.rows_of_step(step), following), rows)

    @property
    def held_out_order(self) -> Rows:
        """The held-out rows as `partners_in` takes them: with a training row at the end, so that a single one has a partner."""
        return np.append(self.held_out, self.rows[0])

    @property
    def steps_per_chunk(self) -> int:
        """Steps that one fetch brings."""
        return math.ceil(CHUNK_PAIRS * self.settings.num_workers / self.settings.global_batch_size)

    def chunks(self, start_step: int) -> list[range]:
        """The steps from `start_step` to the end, cut into fetches."""
        size = self.steps_per_chunk
        return [range(s, min(s + size, self.num_steps)) for s in range(start_step, self.num_steps, size)]


def fetch_chunk(
    chunk: Mapping[str, pa.Array] | pa.Table, *, data: PreparedData, settings: SamplerSettings, rank: int
) -> pa.Table:
    """A worker's pairs of the steps `first` to `last` (exclusive) of a one-line table, in the order it trains on them; the
    pairs of each micro-batch are followed by their partners where the settings want them.

    Runs in Ray Data's processes: sampler and open shards are kept between calls.
    """
    sampler, reader = _open(data, settings)
    rows = []
    for step in range(chunk["first"][0].as_py(), chunk["last"][0].as_py()):
        for batch in sampler.micro_batches(step, rank):
            rows += [batch, sampler.partners(step, batch)] if settings.with_partners else [batch]
    return reader.read(np.concatenate(rows) if rows else [])


@functools.lru_cache(maxsize=4)
def _open(data: PreparedData, settings: SamplerSettings) -> tuple[StepSampler, PairReader]:
    return StepSampler(data.token_counts(), settings), data.reader()
