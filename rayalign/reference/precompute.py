"""Ray Data before the training: the reference's log-probabilities of the records that a run needs, by a pool of actors.

The actors get the resources of the train workers and free them before training starts: no second model is in memory beside the
one that is trained. The log-probabilities are stored with the encoded records (`data.reference_store`), for every epoch and for
every run that needs the same ones.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data
import torch

from rayalign.cluster import configure_ray_data, place_ray_data, quiet_logging, report, reports_of
from rayalign.config.config import Config
from rayalign.data.batch import PairBatch
from rayalign.data.prepare import RunData
from rayalign.data.reference_store import (
    ReferenceLogps,
    folder_name,
    forget_damage,
    missing_shards,
    shard_name,
    shard_rows,
    write_reference_shard,
)
from rayalign.data.sampler import StepSampler, cut_micro_batches, partners_in
from rayalign.data.store import EncodedPair, PreparedData, Rows, from_batch
from rayalign.data.stream import ahead, batch_maker, evaluated_rows, held_out_rows, sampler_of
from rayalign.models.registry import FAMILIES, packs_rows
from rayalign.progress import Progress, per_second
from rayalign.reference.key import ReferenceKey, check_reference, reference_key
from rayalign.storage import Store

if TYPE_CHECKING:
    from rayalign.policy.policy import Policy

logger = logging.getLogger(__name__)

OUTCOME_SCHEMA = pa.schema([("rows", pa.int64())])
"""What an actor reports of a shard: its rows."""


def with_reference(config: Config, data: RunData, *, several_runs: bool = False) -> RunData:
    """The data with the reference's log-probabilities beside it, found or computed now, where --precompute_ref_log_probs wants
    them; without the flag it depends on whether they are needed or will be used again.

    Raises ValueError where the model cannot be loaded, and where an unfinished run began with another one.
    """
    sampler = sampler_of(config, data)
    if not is_wanted(config, sampler, several_runs=several_runs):
        return data
    key = key_of(config, data)
    check_reference(config, key)
    rows, rows_held_out = needed_rows(config, data, sampler)
    training = _scored(config, data, data.training, rows, key)
    held_out = data.held_out
    if held_out is not None:
        held_out = _scored(config, data, held_out, rows_held_out, key)
    return dataclasses.replace(data, training=training, held_out=held_out)


def key_of(config: Config, data: RunData) -> ReferenceKey:
    """What the reference's log-probabilities of a run depend on."""
    device = _device_of(config)
    return reference_key(
        data.source,
        model=config.model,
        tuner=config.tuner,
        dtype=config.model.dtype_on(device.type),
        device=device.type,
        companion=config.algorithm.needs.stable_companion,
    )


def needed_rows(config: Config, data: RunData, sampler: StepSampler) -> tuple[Rows, Rows]:
    """The rows that a run reads: those that it trains on or evaluates, and their partners. First those of the records to train
    on, then those of the held-out data set, if there is one."""
    with_partners = sampler.settings.with_partners
    trained = [sampler.rows]
    if sampler.num_steps < sampler.steps_per_epoch:
        trained = [sampler.rows_of_step(step) for step in range(sampler.num_steps)]
        if with_partners:
            trained += [sampler.partners(step, rows) for step, rows in enumerate(trained)]
    evaluated = [evaluated_rows(config, data, sampler)]
    if with_partners:
        order = held_out_rows(data, sampler) if data.held_out else sampler.held_out_order
        evaluated += [partners_in(order, rows) for rows in evaluated]
    if data.held_out:
        return np.unique(np.concatenate(trained)), np.unique(np.concatenate(evaluated))
    return np.unique(np.concatenate([*trained, *evaluated])), np.arange(0)


def is_wanted(config: Config, sampler: StepSampler, *, several_runs: bool = False) -> bool:
    """Whether a run, or one of `several_runs` of a sweep, takes the reference's log-probabilities from storage."""
    return config.precomputes_reference(several_epochs=sampler.num_steps > sampler.steps_per_epoch, several_runs=several_runs)


def _device_of(config: Config) -> torch.device:
    """Where a train worker of this configuration computes."""
    return torch.device("cuda" if config.cluster.gpus_per_worker else "cpu")


def _scored(config: Config, data: RunData, records: PreparedData, rows: Rows, key: ReferenceKey) -> PreparedData:
    """The records with the log-probabilities of (at least) some rows."""
    name = folder_name(key.folder_name, records.folder, records.num_rows)
    scored = dataclasses.replace(records, reference=name)
    folder = records.folder / name
    missing = missing_shards(folder, rows)
    if not missing:
        logger.info("Reference: log-probs of %d records, computed before, from %s", len(rows), folder.location)
        return scored
    started = time.monotonic()
    total = sum(len(_rows_of_shard(shard, folder, records.num_rows)) for shard in missing)
    found = len(np.setdiff1d(rows // shard_rows(folder), missing))
    before = f"; {found} shards of them were computed before" if found else ""
    logger.info("Reference: computing log-probs of %d records%s", total, before)
    _run_pass(config, data, records, missing, name, Progress(total))
    forget_damage(folder, missing)
    seconds = time.monotonic() - started
    speed = per_second(total / seconds)
    logger.info("Reference: log-probs of %d records in %.1f s (%s) into %s", total, seconds, speed, folder.location)
    return scored


def _run_pass(config: Config, data: RunData, records: PreparedData, shards: list[int], folder: str, progress: Progress) -> None:
    cluster = config.cluster
    configure_ray_data()
    place_ray_data(cluster.worker_labels)
    kind: dict[str, Any] = {"accelerator_type": cluster.accelerator_type} if cluster.accelerator_type else {}
    outcomes = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
        ShardScorer,
        fn_constructor_kwargs={"config": config, "data": data, "records": records, "folder": folder},
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=min(cluster.fewest_workers, len(shards))),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker or None,
        **kind,
    )
    for table in reports_of(outcomes, OUTCOME_SCHEMA):
        if progress.add(pa.compute.sum(table["rows"]).as_py() or 0):
            logger.info("Reference: %s", progress.line("records"))


class ShardScorer:
    """Runs in Ray Data's actors: scores the rows of one shard after another and writes each as a file. The model is loaded with
    the first, so that what keeps it from loading can be reported."""

    def __init__(self, config: Config, data: RunData, records: PreparedData, folder: str) -> None:
        quiet_logging()
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        needs = config.algorithm.needs
        self._needs = dataclasses.replace(needs, companion=needs.stable_companion)
        self._config = config
        self._source, self._spec = data.source, data.spec
        self._records = dataclasses.replace(records, reference=None)
        self._folder = records.folder / folder
        self._reader = self._records.reader()
        self._token_counts = records.token_counts()
        self._make_batch = batch_maker(data.spec, self._needs.companion)

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard = batch["item"][0].as_py()
        return report(lambda: [{"rows": self.write(shard)}], OUTCOME_SCHEMA)

    def write(self, shard: int) -> int:
        """Scores and writes a shard; returns its number of rows."""
        rows = _rows_of_shard(shard, self._folder, self._records.num_rows)
        optimizer = self._config.optimizer
        cut = cut_micro_batches(
            rows,
            self._token_counts,
            batch_size=optimizer.batch_size,
            max_tokens=optimizer.max_tokens_per_batch,
            packs_rows=packs_rows(self._spec.family, self._config.model.attn_implementation),
            rank=0,
            num_workers=1,
        )
        found: dict[int, tuple[str, ReferenceLogps]] = {}
        for some, (pairs, batch) in zip(cut, ahead(self._batches(cut), depth=2), strict=True):
            found |= zip(some.tolist(), zip(batch.ids, score(self._policy, pairs, batch), strict=True), strict=True)
        ids, logps = zip(*(found[row] for row in rows.tolist()), strict=True)
        write_reference_shard(self._folder / shard_name(shard), ids, logps)
        return len(rows)

    @functools.cached_property
    def _policy(self) -> "Policy":
        # The driver imports this module, too; what only the actors need is imported in the actors.
        from rayalign.policy.forward_check import check_forward
        from rayalign.policy.loading import load_policy

        config = self._config
        policy = load_policy(
            self._source,
            model=dataclasses.replace(config.model, gradient_checkpointing=False),
            tuner=config.tuner,
            device=_device_of(config),
            needs=self._needs,
            spread_over_gpus=config.cluster.spreads_models,
        )
        if policy.family.model_type not in FAMILIES:
            check_forward(policy, self._spec)
        return policy

    def _batches(self, cut: Sequence[Rows]) -> Iterator[tuple[list[EncodedPair], PairBatch]]:
        pin = _device_of(self._config).type == "cuda"
        for rows in cut:
            pairs = from_batch(self._reader.read(rows))
            batch = self._make_batch(pairs, ())
            yield pairs, batch.pin_memory() if pin else batch


def score(policy: "Policy", pairs: Sequence[EncodedPair], batch: PairBatch) -> list[ReferenceLogps]:
    """The log-probabilities of some pairs' responses, and of the chosen ones in the batch's companion, under a policy's
    reference before its first step."""
    chosen_rejected = iter(_token_logps(policy, batch, [len(ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]))
    of_companion: list[list[float]] = [[] for _ in pairs]
    if batch.companion is not None:
        rows = batch.companion.rows.tolist()
        of_rows = _token_logps(policy, batch.companion.batch, [len(pairs[row].chosen_ids) for row in rows])
        for row, logps in zip(rows, of_rows, strict=True):
            of_companion[row] = logps
    return [ReferenceLogps(next(chosen_rejected), next(chosen_rejected), of_pair) for of_pair in of_companion]


def _token_logps(policy: "Policy", batch: PairBatch, lengths: list[int]) -> list[list[float]]:
    """The log-probabilities of the batch's targets, cut into responses of these lengths."""
    batch = dataclasses.replace(batch, companion=None).to(policy.device)
    with torch.no_grad(), policy.reference_weights():
        logps = policy.token_logps(batch, policy.image_features(batch))
    cut: list[Any] = [response.tolist() for response in logps.float().cpu().split(lengths)]
    return cut


def _rows_of_shard(shard: int, folder: Store, num_rows: int) -> Rows:
    size = shard_rows(folder)
    return np.arange(shard * size, min((shard + 1) * size, num_rows))
