"""Ray Data before the training: the reference's log-probabilities of the records that a run needs, by a pool of actors.

The actors get the resources of the train workers and free them before training starts: no second model is in memory beside the
one that is trained. A model that is sharded over the train workers may have no room on one of them: these compute the
log-probabilities themselves, before they train (`training.reference_pass`). Either way they are stored with the encoded records
(`data.reference_store`), for every epoch and for every run that needs the same ones.
"""

import dataclasses
import functools
import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data
import torch

from rayalign.cluster import configure_ray_data, place_ray_data, report, reports_of
from rayalign.config.config import Config
from rayalign.data.attempts import Attempt
from rayalign.data.prepare import RunData
from rayalign.data.reference_store import drop_damaged, folder_name, forget_damage, missing_shards, shard_rows
from rayalign.data.sampler import StepSampler, partners_in
from rayalign.data.store import PreparedData, Rows
from rayalign.data.stream import evaluated_rows, held_out_rows, sampler_of
from rayalign.models.registry import FAMILIES
from rayalign.progress import Progress, per_second
from rayalign.ray_lines import quiet_logging
from rayalign.reference.key import ReferenceKey, check_reference, reference_key
from rayalign.reference.scoring import Found, Shards, reference_logps, rows_of_shard
from rayalign.storage import Store

if TYPE_CHECKING:
    from rayalign.policy.policy import Policy

logger = logging.getLogger(__name__)

OUTCOME_SCHEMA = pa.schema([("rows", pa.int64())])
"""What an actor reports of a shard: its rows."""


def with_reference(config: Config, data: RunData, *, several_runs: bool = False) -> RunData:
    """The data with the reference's log-probabilities beside it, found or computed now, where --precompute_ref_log_probs wants
    them; without the flag it depends on whether they are needed or will be used again.

    Of a sharded model, what is missing is left to the train workers. Raises ValueError where the model cannot be loaded, and
    where an unfinished run began with another one.
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
    if config.cluster.shards_models:
        # The train workers do it, which have the model between them (`training.reference_pass`).
        drop_damaged(folder)
        logger.info("Reference: the train workers compute %d of its shards before they train", len(missing))
        return scored
    started = time.monotonic()
    total = sum(len(rows_of_shard(shard, folder, records.num_rows)) for shard in missing)
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
    attempts = attempts_of(config)
    attempts.delete()  # those of an earlier start say nothing of this one
    for table in reports_of(outcomes, OUTCOME_SCHEMA):
        if progress.add(pa.compute.sum(table["rows"]).as_py() or 0):
            logger.info("Reference: %s", progress.line("records"))
    attempts.delete()


def attempts_of(config: Config) -> Store:
    """Where processes note which shards they are at, of this run alone."""
    return Store.at(str(config.run.output_dir)) / "reference_attempts"


class ShardScorer:
    """Runs in Ray Data's actors: scores the rows of one shard after another and writes each as a file. The model is loaded with
    the first, so that what keeps it from loading can be reported."""

    def __init__(self, config: Config, data: RunData, records: PreparedData, folder: str) -> None:
        quiet_logging()
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        self._config, self._source, self._spec = config, data.source, data.spec
        self._shards = Shards(config, data, records, folder)
        self._attempts = attempts_of(config)

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard = batch["item"][0].as_py()

        def lines() -> list[dict[str, int]]:
            attempt = Attempt(self._attempts / f"{shard}.json")  # raises where processes end over and over
            rows = self.write(shard)
            attempt.end()
            return [{"rows": rows}]

        return report(lines, OUTCOME_SCHEMA)

    def write(self, shard: int) -> int:
        """Scores and writes a shard; returns its number of rows."""
        found: Found = {}
        for piece in self._shards.pieces(shard):
            found |= piece.found(reference_logps(self._policy, piece.batch))
        return self._shards.write(shard, found)

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
            needs=self._shards.needs,
            spread_over_gpus=config.cluster.spreads_models,
        )
        if policy.family.model_type not in FAMILIES:
            check_forward(policy, self._spec)
        return policy
