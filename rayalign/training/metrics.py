"""Metrics of training: rates, and sums and counts kept on the device, brought together over workers when a line is written."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayalign.algorithms import LossOutput
from rayalign.data.batch import PairBatch
from rayalign.storage import Store
from rayalign.training.distributed import gather
from rayalign.training.sent_lines import sent_before

REMOTE_FLUSH_SECONDS = 30
LOSS, F64 = "loss", torch.float64


Sums = Mapping[str, tuple[float, float]]


class MetricSums:
    """Running (sum, count) of every metric over micro-batches, in float64; `reduce` gives the means over all workers."""

    def __init__(self, outputs: Iterable[LossOutput] = (), *, before: Sums | None = None) -> None:
        """Counts on from what another one's `local` was."""
        self._sums = {name: (torch.tensor(s, dtype=F64), torch.tensor(n, dtype=F64)) for name, (s, n) in (before or {}).items()}
        for output in outputs:
            self.add(output)

    def add(self, output: LossOutput) -> None:
        """Adds a micro-batch; does not wait for the device."""
        self._accumulate(LOSS, output.loss.detach(), torch.zeros(()))
        for name, values in output.pair_metrics.items():
            known = ~output.missing[name] if name in output.missing else torch.ones_like(values, dtype=torch.bool)
            self._accumulate(name, values.where(known, 0).sum(), known.sum())
        for name, (total, count) in output.mean_metrics.items():
            self._accumulate(name, total, count)

    def reduce(self, *, steps: int) -> dict[str, float]:
        """Means over everything that all workers added; `loss` is the sum of the loss shares per optimizer step. Every worker
        calls it; an idle one with nothing added."""
        sums = added_up(gather(self.local))
        loss = sums.pop(LOSS, (0.0, 0.0))[0] / steps
        return {"loss": loss, **{name: total / count for name, (total, count) in sums.items() if count}}

    @property
    def local(self) -> Sums:
        """What this worker has added."""
        return {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}

    def _accumulate(self, name: str, total: Tensor, count: Tensor) -> None:
        total, count = total.to(F64), count.to(F64)
        if name in self._sums:
            so_far = self._sums[name]
            total, count = so_far[0] + total, so_far[1] + count
        self._sums[name] = (total, count)


def added_up(workers: Iterable[Sums]) -> dict[str, tuple[float, float]]:
    sums: dict[str, tuple[float, float]] = {}
    for worker in workers:
        for name, (total, count) in worker.items():
            so_far = sums.get(name, (0.0, 0.0))
            sums[name] = (so_far[0] + total, so_far[1] + count)
    return sums


@dataclass(frozen=True)
class Unlogged:
    """What came since the last line of metrics, of one worker: a run that goes on from a checkpoint between two lines writes
    the line that it would have written."""

    steps: int = 0
    skipped_steps: int = 0
    sums: Sums = field(default_factory=dict)
    tokens: int = 0
    tokens_with_padding: int = 0

    @classmethod
    def of(cls, workers: Sequence["Unlogged"], rank: int, num_workers: int) -> "Unlogged":
        """A worker's own; where there were others then, the first one counts on from all of theirs."""
        if len(workers) == num_workers:
            return workers[rank]
        first, *_ = workers or [cls()]
        if rank > 0:
            return cls(first.steps, first.skipped_steps)
        tokens, with_padding = (sum(getattr(w, name) for w in workers) for name in ("tokens", "tokens_with_padding"))
        return cls(first.steps, first.skipped_steps, added_up(worker.sums for worker in workers), tokens, with_padding)


class Clock:
    """Rates since the last line of metrics: pairs and tokens per second, the share of the time spent waiting for data, and the
    share of padding in what the model runs over; `tokens_with_padding_of` tells how many tokens of a batch that is."""

    def __init__(
        self, tokens_before: float, tokens_with_padding_of: Callable[[PairBatch], int], *, before: Unlogged | None = None
    ) -> None:
        self._before = before or Unlogged()
        self.steps = self._before.steps
        self._tokens_with_padding_of = tokens_with_padding_of
        self._pairs = self._tokens = self._tokens_with_padding = 0
        self._total_tokens = tokens_before
        self._waited = self._skipped = 0.0
        self._started = self._marked = time.perf_counter()

    def waited_for(self, batches: Iterator[PairBatch]) -> Iterator[PairBatch]:
        """The same batches; the time until each arrives counts as waiting."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            self._tokens_with_padding += self._tokens_with_padding_of(batch)
            yield batch

    def count(self, *, pairs: int, tokens: int) -> None:
        """A step is done: pairs of all workers, tokens of this one."""
        self.steps += 1
        self._pairs += pairs
        self._tokens += tokens
        self._marked = time.perf_counter()

    def skip(self) -> None:
        """What happened since the last step (evaluation, saving) is no training time."""
        now = time.perf_counter()
        self._skipped += now - self._marked
        self._marked = now

    def reduce(self) -> dict[str, float]:
        """The rates over all workers, and a fresh start."""
        seconds = time.perf_counter() - self._started - self._skipped
        workers = gather((self._tokens, self._waited / seconds, *self.tokens))
        timed, tokens, with_padding = (sum(worker[i] for worker in workers) for i in (0, 2, 3))
        self._total_tokens += tokens
        rates = {
            "num_tokens": self._total_tokens,
            "pairs_per_second": self._pairs / seconds,
            "tokens_per_second": timed / seconds,
            "data_wait_fraction": sum(worker[1] for worker in workers) / len(workers),
            "padding_fraction": 1 - tokens / with_padding,
        }
        self.steps = self._pairs = self._tokens = self._tokens_with_padding = 0
        self._before = Unlogged()
        self._waited = self._skipped = 0.0
        self._started = self._marked = time.perf_counter()
        return rates

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of this worker since the last line, without padding and with it, those of an earlier start included."""
        return self._before.tokens + self._tokens, self._before.tokens_with_padding + self._tokens_with_padding


class MetricsLog:
    """The run's metrics.jsonl: one line a logging step.

    On a disk a line is appended at once; an object store, which can't append, gets the whole file from time to time.
    """

    def __init__(self, store: Store, *, start_step: int) -> None:
        self._store = store
        lines = read_metrics(store)
        self.sent = sent_before(store.parent, lines, start_step=start_step)
        """The keys of the lines that earlier starts of the run wrote, those behind their last checkpoint included."""
        self.lines: list[dict[str, float]] = [line for line in lines if line["step"] <= start_step]
        self._flushed = time.monotonic()
        self.flush()

    def append(self, line: Mapping[str, float]) -> bool:
        """Adds a line; returns whether it is a new one. One that stands already, with the same names at the same step, is
        replaced: a run that was killed between its last step and its end is evaluated again."""
        for index, before in enumerate(self.lines):
            if before["step"] == line["step"] and before.keys() == line.keys():
                self.lines[index] = dict(line)
                self.flush()
                return False
        self.lines.append(dict(line))
        local = self._store.local_path
        if local is not None:
            with local.open("a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")
        elif time.monotonic() - self._flushed > REMOTE_FLUSH_SECONDS:
            self.flush()
        return True

    def keep(self) -> None:
        """Before a checkpoint: what goes on from it finds all lines up to its step."""
        if self._store.local_path is None:
            self.flush()

    def flush(self) -> None:
        """Writes the whole file."""
        self._store.write_bytes("".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._flushed = time.monotonic()


def read_metrics(store: Store) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not store.exists():
        return []
    lines = []
    for text in store.read_bytes().decode().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
