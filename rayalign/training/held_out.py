"""The held-out records of a run: which ones its workers evaluate, what came out, and what looks wrong by that."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from rayalign.config.config import Config
from rayalign.data.batch import PairBatch
from rayalign.data.prepare import RunData
from rayalign.data.sampler import StepCounts, StepSampler, cut_micro_batches
from rayalign.data.shuffled_pictures import Pictures, shuffle_pictures
from rayalign.data.store import PreparedData, Rows
from rayalign.data.stream import evaluated_rows, held_out_pairs, held_out_rows, with_pictures_of_others
from rayalign.report.health import Metrics, find_problems
from rayalign.training.distributed import gather
from rayalign.training.evaluation import image_metrics
from rayalign.training.loop import Trainer
from rayalign.training.run_report import scored_pair

logger = logging.getLogger(__name__)

K = TypeVar("K")
T = TypeVar("T")


class HeldOut:
    """A worker's share of the held-out records. `rows` of `data` are those of all workers; `pairs` has, since the last
    evaluation, each pair's own values by metric, those of other workers, too. All batches go through `watched`."""

    def __init__(
        self,
        config: Config,
        data: RunData,
        sampler: StepSampler,
        *,
        rank: int,
        num_workers: int,
        watched: Callable[[Iterator[PairBatch]], Iterator[PairBatch]] = lambda batches: batches,
    ) -> None:
        self.data: PreparedData = data.held_out or data.training
        rows = held_out_rows(data, sampler)
        self.rows: Rows = evaluated_rows(config, data, sampler)
        if rank == 0 and len(self.rows) < len(rows):
            logger.info(
                "Evaluation: of %d held-out records, %d are drawn and evaluated, the same ones each time (--max_eval_records)",
                len(rows),
                len(self.rows),
            )
        self.pairs: dict[str, dict[str, float]] = {}
        self._config = config
        self._spec = data.spec
        self._watched = watched
        self._rank, self._num_workers = rank, num_workers
        self._packs_rows = sampler.settings.packs_rows
        self._order = None
        if sampler.settings.with_partners:
            self._order = rows if data.held_out else sampler.held_out_order
        self._seen: dict[int, Pictures] = {}

    @functools.cached_property
    def _cut(self) -> tuple[list[Rows], StepCounts]:
        """This worker's micro-batches, and the counts of all records."""
        token_counts, optimizer = self.data.token_counts(), self._config.optimizer
        micro_batches = cut_micro_batches(
            self.rows,
            token_counts,
            batch_size=optimizer.batch_size,
            max_tokens=optimizer.max_tokens_per_batch,
            packs_rows=self._packs_rows,
            rank=self._rank,
            num_workers=self._num_workers,
        )
        return micro_batches, StepCounts.of(token_counts.take(self.rows))

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """The metrics of a pass over the records, with eval_ before their names. Every worker calls it."""
        micro_batches, counts = self._cut
        batches = functools.partial(
            held_out_pairs,
            self.data,
            micro_batches,
            self._spec,
            companion=trainer.algorithm.needs.companion,
            order=self._order,
            seen=self._seen,
        )
        metrics, pairs = trainer.evaluate(lambda: self._watched(batches()), counts)
        self.pairs = _together(pairs)
        return {f"eval_{name}": value for name, value in metrics.items()}

    def evaluate_shuffled(self, trainer: Trainer) -> dict[str, float]:
        """After `evaluate`: the metrics of another pass, on the pictures of other records; none where there are none. Every
        worker calls it."""
        partners = shuffle_pictures(_together(self._seen), seed=self._config.data.data_seed)
        micro_batches, _ = self._cut
        batches = with_pictures_of_others(self.data, micro_batches, partners, self._spec)
        pairs = trainer.evaluate_shuffled(self._watched(batches))
        return {f"eval_{name}": value for name, value in image_metrics(self.pairs, _together(pairs)).items()}

    def problems(self, metrics: Metrics, *, step: int, is_finished: bool) -> dict[str, str]:
        """What looks wrong by the run's lines of metrics and the pairs' own values, in words, by kind; `step` is that of the
        weights that were evaluated last."""
        pairs = [scored_pair(pair_id, values) for pair_id, values in self.pairs.items()]
        return find_problems(metrics, pairs=pairs, is_finished=is_finished, model_step=step)


def _together(mine: Mapping[K, T]) -> dict[K, T]:
    """The entries of all workers."""
    return {key: value for worker in gather(mine) for key, value in worker.items()}
