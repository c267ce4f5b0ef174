"""A worker's policy made ready for its first step: loaded, sharded, with no more layers recomputed than memory demands."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from rayalign.cluster import Stopped, outcome_of, result_of
from rayalign.config.config import Config
from rayalign.data.prepare import RunData
from rayalign.estimate.recomputation import layers_to_recompute
from rayalign.models.registry import FAMILIES
from rayalign.policy.forward_check import check_forward
from rayalign.policy.kept_base import KeptBase
from rayalign.policy.loading import frozen_start, load_policy
from rayalign.policy.policy import Policy
from rayalign.policy.prepare import needs_start, recompute_layers
from rayalign.policy.sharding import mesh_of_workers, shard_policy
from rayalign.training.distributed import gather, start_alike
from rayalign.training.lockstep import Fillers

T = TypeVar("T")


def ready_policy(
    config: Config,
    data: RunData,
    *,
    device: torch.device,
    rank: int,
    say: Callable[[str], None],
    kept: KeptBase | None = None,
) -> tuple[Policy, Fillers | None]:
    """The policy of this worker, of the base model that its process may have `kept`, and, where it is sharded, the run's
    fillers. Every worker calls it.

    Raises ValueError on all workers where one can't load the model.
    """
    cluster, algorithm = config.cluster, config.algorithm
    is_known = data.spec.family.model_type in FAMILIES
    # All workers try the forward of a family that was not tried before, and need the weights for it.
    scattered = cluster.shards_models and is_known and changes_type(config, data, device)

    def load() -> Policy:
        return load_policy(
            data.source,
            model=config.model,
            tuner=config.tuner,
            device=device,
            needs=algorithm.needs,
            spread_over_gpus=cluster.spreads_models,
            stay_on_cpu=cluster.shards_models,
            without_weights=scattered and rank > 0,
            with_start=not cluster.shards_models,
            seed=config.optimizer.seed,
            kept=kept,
        )

    def load_and_try() -> Policy:
        policy = load()
        if not is_known:
            check_forward(policy, data.spec)
        return policy

    policy = everywhere(load_and_try)
    fillers = None
    if cluster.shards_models:
        mesh = mesh_of_workers(device, cluster.shard_group_size)
        spread = functools.partial(shard_policy, mesh=mesh, device=device, needs=algorithm.needs, scattered=scattered)
        spread(policy, sync_each_batch=cluster.sync_each_batch)
        if needs_start(config.tuner, algorithm.needs):
            # Loaded again, so that no worker ever has two whole models.
            loaded = everywhere(load)
            policy.start = frozen_start(loaded.model, loaded.family, loaded.dtype)
            spread(policy.start)
        fillers = Fillers(data.spec, algorithm.needs)
    if config.model.gradient_checkpointing == "auto":
        say(settle_recomputation(policy, config, data, gpu_bytes=_memory_of(device, config), rank=rank))
    start_alike(policy)
    return policy, fillers


class MetByAll(ValueError):
    """An error that all workers of a run raise."""


def everywhere(work: Callable[[], T]) -> T:
    """What this worker makes of some work that exchanges nothing. Every worker calls it, and all raise MetByAll where one
    raises ValueError."""
    outcome = outcome_of(work, errors=(ValueError,))
    for met in gather(outcome if isinstance(outcome, Stopped) else None):
        if met is not None:
            raise MetByAll(str(met.error))
    made: T = result_of(outcome)
    return made


def changes_type(config: Config, data: RunData, device: torch.device) -> bool:
    """Whether the language model's weights are held in another type than their files have, by config.json. Weights of the same
    type are memory-mapped: a worker takes its rows out of the files. Of others it would make a whole copy."""
    if config.tuner.quant_bits is not None:
        return True
    is_trained = config.tuner.sft_type == "full"
    held: torch.dtype = torch.float32 if is_trained else getattr(torch, config.model.dtype_on(device.type))
    stored: torch.dtype | None = data.spec.model_config.dtype
    return stored != held


def settle_recomputation(policy: Policy, config: Config, data: RunData, *, gpu_bytes: int | None, rank: int) -> str:
    """Lets as few layers run again in the backward as fit the memory of each worker's GPU, where that is known; returns what
    is to be said. Every worker calls it. Raises ValueError on all for what the estimate can't be made of."""
    memories: list[Any] = gather(gpu_bytes)
    depth = len(policy.base.get_decoder().layers)
    if None in memories:
        return f"Gradient checkpointing: all {depth} layers run again, since the memory of the workers' devices is not known"
    found = outcome_of(lambda: layers_to_recompute(config, data, min(memories)), errors=(ValueError,)) if rank == 0 else 0
    count: int = result_of(gather(found)[0])
    recompute_layers(policy.base, count)
    return f"Gradient checkpointing: {count} of {depth} layers run again, as few as fit {min(memories) / 2**30:.1f} GB"


def _memory_of(device: torch.device, config: Config) -> int | None:
    """Bytes of GPU memory that a worker has; None without a GPU, and where it spreads its model over several."""
    if device.type != "cuda" or config.cluster.spreads_models:
        return None
    share = min(1.0, config.cluster.gpus_per_worker or 1.0)
    return int(share * torch.cuda.get_device_properties(device).total_memory)
