"""A pass of the reference over one shard after another: rows as batches for the model, the log-probabilities that come out, and
the file that they are written into. Actors do it (`precompute`), or train workers that have a model between them
(`training.reference_pass`)."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rayalign.config.config import Config
from rayalign.data.batch import PairBatch
from rayalign.data.prepare import RunData
from rayalign.data.reference_store import ReferenceLogps, shard_name, shard_rows, write_reference_shard
from rayalign.data.sampler import cut_micro_batches
from rayalign.data.store import EncodedPair, PreparedData, Rows, from_batch
from rayalign.data.stream import ahead, batch_maker
from rayalign.models.registry import packs_rows
from rayalign.storage import Store

if TYPE_CHECKING:
    from rayalign.policy.policy import Policy


Found = dict[int, tuple[str, ReferenceLogps]]
"""The ids and log-probabilities of pairs, by row."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a shard, which are one batch."""

    rows: list[int]
    pairs: list[EncodedPair]
    batch: PairBatch

    def found(self, logps: Sequence[Tensor]) -> Found:
        """The `reference_logps` of the batch, by row."""
        return dict(zip(self.rows, zip(self.batch.ids, by_pair(self.pairs, self.batch, logps), strict=True), strict=True))


class Shards:
    """The shards of a data set's reference: what is scored for them, and their files."""

    def __init__(self, config: Config, data: RunData, records: PreparedData, folder: str) -> None:
        needs = config.algorithm.needs
        self.needs = dataclasses.replace(needs, companion=needs.stable_companion)
        self._optimizer = config.optimizer
        self._packs_rows = packs_rows(data.spec.family, config.model.attn_implementation)
        self._pins = bool(config.cluster.gpus_per_worker)
        self._num_rows = records.num_rows
        self._folder = records.folder / folder
        self._reader = dataclasses.replace(records, reference=None).reader()
        self._token_counts = records.token_counts()
        self._make_batch = batch_maker(data.spec, self.needs.companion)

    def pieces(self, shard: int) -> Iterator[Piece]:
        """The batches of a shard, a few ahead of their use."""
        cut = cut_micro_batches(
            rows_of_shard(shard, self._folder, self._num_rows),
            self._token_counts,
            batch_size=self._optimizer.batch_size,
            max_tokens=self._optimizer.max_tokens_per_batch,
            packs_rows=self._packs_rows,
            rank=0,
            num_workers=1,
        )
        return ahead(map(self._piece, cut), depth=2)

    def write(self, shard: int, found: Found) -> int:
        """Writes what was found of all rows of a shard; returns their number."""
        ids, logps = zip(*(found[row] for row in sorted(found)), strict=True)
        write_reference_shard(self._folder / shard_name(shard), ids, logps)
        return len(ids)

    def _piece(self, rows: Rows) -> Piece:
        pairs = from_batch(self._reader.read(rows))
        batch = self._make_batch(pairs, ())
        return Piece(rows.tolist(), pairs, batch.pin_memory() if self._pins else batch)


def score(policy: "Policy", pairs: Sequence[EncodedPair], batch: PairBatch) -> list[ReferenceLogps]:
    """The log-probabilities of some pairs' responses, and of the chosen ones in the batch's companion, under a policy's
    reference before its first step."""
    return by_pair(pairs, batch, reference_logps(policy, batch))


def reference_logps(policy: "Policy", batch: PairBatch) -> list[Tensor]:
    """The log-probability of each target [N] of a batch, and of its companion if it has one, under a policy's reference before
    its first step."""
    found = []
    for rows in (batch, batch.companion.batch) if batch.companion is not None else (batch,):
        rows = dataclasses.replace(rows, companion=None).to(policy.device)
        with torch.no_grad(), policy.reference_weights():
            found.append(policy.token_logps(rows, policy.image_features(rows)).float().cpu())
    return found


def by_pair(pairs: Sequence[EncodedPair], batch: PairBatch, logps: Sequence[Tensor]) -> list[ReferenceLogps]:
    """The `reference_logps` of a batch, cut into those of each pair."""
    chosen_rejected = iter(_cut(logps[0], [len(ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]))
    of_companion: list[list[float]] = [[] for _ in pairs]
    if batch.companion is not None:
        rows = batch.companion.rows.tolist()
        for row, found in zip(rows, _cut(logps[1], [len(pairs[row].chosen_ids) for row in rows]), strict=True):
            of_companion[row] = found
    return [ReferenceLogps(next(chosen_rejected), next(chosen_rejected), of_pair) for of_pair in of_companion]


def rows_of_shard(shard: int, folder: Store, num_rows: int) -> Rows:
    size = shard_rows(folder)
    return np.arange(shard * size, min((shard + 1) * size, num_rows))


def _cut(logps: Tensor, lengths: list[int]) -> list[list[float]]:
    return [response.tolist() for response in logps.split(lengths)]
