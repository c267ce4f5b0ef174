"""Steps of a policy that is sharded over processes, and the same steps of one process that holds it whole."""

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rayalign.algorithms import Algorithm
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.batch import PairBatch
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.store import EncodedPair
from rayalign.models.source import ModelSource
from rayalign.policy.compat import storage_key
from rayalign.policy.loading import load_policy
from rayalign.policy.policy import Policy
from rayalign.policy.prepare import recompute_layers
from rayalign.policy.sharding import mesh_of_workers, shard_policy
from rayalign.training.distributed import start_alike
from rayalign.training.lockstep import Fillers
from rayalign.training.loop import Trainer
from tests.tiny_models import counts_of, encode_pair, in_float64, make_batch, noise_image, wake_adapters

LORA, FULL = TunerConfig(lora_target_modules=("ALL",)), TunerConfig(sft_type="full")

Deal = Sequence[Sequence[int]]
UNEVEN: Sequence[Deal] = (((0, 1), (2,)), ((3,),), (), ())
IDLE: Sequence[Deal] = (((0, 1), (2, 3)), (), (), ())
MIXED: Sequence[Deal] = (((0,), (1,)), ((2,), (3,)), (), ())
"""Of each worker its micro-batches, as numbers of pairs. Pairs 0 and 3 have an image; MIXED puts one beside a pair without."""

WORDS = (("a cat", "two dogs"), ("red", "it is a blue thing"), ("yes", "no way"), ("one two three", "four"))


@dataclasses.dataclass(frozen=True)
class Case:
    """A run of two steps, each behind an evaluation of the same pairs."""

    algorithm: Algorithm
    family: str = "llava"
    tuner: TunerConfig = LORA
    deals: Sequence[Deal] = UNEVEN
    dtype: torch.dtype = torch.float64
    checkpointing: bool = True
    recomputed: int | None = None
    """Layers that run again in the backward, of those with checkpointing; None: all."""
    scattered: bool = False
    """Whether rank 0 alone loads the weights."""
    group_size: int | None = None
    """Workers that have a model between them; None: all."""
    sync_each_batch: bool = True


def policy_of(case: Case, folder: Path, *, without_weights: bool = False) -> Policy:
    policy = load_policy(
        ModelSource(str(folder)),
        model=ModelConfig(
            gradient_checkpointing=case.checkpointing, dtype="bfloat16" if case.dtype == torch.bfloat16 else "auto"
        ),
        tuner=case.tuner,
        device=torch.device("cpu"),
        needs=case.algorithm.needs,
        without_weights=without_weights,
    )
    if case.recomputed is not None:
        recompute_layers(policy.base, case.recomputed)
    if case.dtype == torch.float64:
        for each in filter(None, (policy, policy.start)):
            in_float64(each)
    return wake_adapters(policy)


def shard(policy: Policy, case: Case, folder: Path) -> Fillers:
    """Shards the policy over all processes; returns its fillers."""
    cpu = torch.device("cpu")
    needs = case.algorithm.needs
    spread = functools.partial(
        shard_policy, mesh=mesh_of_workers(cpu, case.group_size), device=cpu, needs=needs, scattered=case.scattered
    )
    spread(policy, sync_each_batch=case.sync_each_batch)
    if policy.start is not None:
        spread(policy.start)
    return Fillers(EncoderSpec(str(folder), "both"), needs)


def trainer_of(case: Case, folder: Path, *, sharded: bool, rank: int = 0) -> Trainer:
    policy = policy_of(case, folder, without_weights=sharded and case.scattered and rank > 0)
    fillers = shard(policy, case, folder) if sharded else None
    start_alike(policy)
    config = OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.1)
    return Trainer(policy, case.algorithm, config, num_steps=2, rank=rank, fillers=fillers)


def pairs_of(folder: Path) -> list[EncodedPair]:
    images = {i: [noise_image(30, 30, seed=i)] for i in (0, 3)}
    return [
        encode_pair(folder, str(i), "What is it?", chosen, rejected, images=images.get(i, ()))
        for i, (chosen, rejected) in enumerate(WORDS)
    ]


def batches_of(case: Case, folder: Path, deal: Deal) -> list[PairBatch]:
    pairs, needs = pairs_of(folder), case.algorithm.needs
    batches = []
    for numbers in deal:
        partners = [pairs[(i + 1) % len(pairs)] for i in numbers]
        batch = make_batch(folder, [pairs[i] for i in numbers], needs=needs, partners=partners)
        if case.tuner.sft_type == "full" and needs.reference:
            batch = _with_reference(batch)
            if batch.companion is not None and needs.stable_companion:
                rows = dataclasses.replace(batch.companion, batch=_with_reference(batch.companion.batch))
                batch = dataclasses.replace(batch, companion=rows)
        batches.append(batch)
    return batches


def _with_reference(batch: PairBatch) -> PairBatch:
    """The batch with log-probs of some reference, as they are stored before the training."""
    return dataclasses.replace(batch, reference_logps=-1.0 - 0.1 * batch.targets.float() % 2)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def two_steps(case: Case, trainer: Trainer, folder: Path, deal: Deal) -> dict[str, Tensor]:
    """Metrics, gradients, norms and weights of two steps, by name."""
    counts, batches = counts_of(pairs_of(folder)), batches_of(case, folder, deal)
    results: dict[str, Tensor] = {}
    for step in range(2):
        metrics, _ = trainer.evaluate(lambda: batches, counts)
        results |= {f"metric {step} {name}": torch.tensor(value).double() for name, value in metrics.items()}
        result = trainer.step(step, iter(batches), counts)
        results[f"norm {step}"] = whole(result.grad_norm)
        results |= {f"gradient {step} {n}": whole(p.grad) for n, p in trainer.policy.trainable.items() if p.grad is not None}
    return results | {f"weight {name}": whole(p) for name, p in trainer.policy.trainable.items()}


@functools.cache
def alone(case: Case, folder: Path) -> dict[str, Tensor]:
    """What one process has of the two steps, which runs all micro-batches."""
    return two_steps(case, trainer_of(case, folder, sharded=False), folder, list(itertools.chain(*case.deals)))


Work = Callable[[int, Mapping[str, Path]], dict[str, Tensor]]


def one_of_workers(work: Work, rank: int, num_workers: int, folders: Mapping[str, Path], out: Path) -> None:
    torch.set_num_threads(1)
    meeting, minutes = f"file://{out}/meeting", timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_workers, timeout=minutes)
    try:
        save_file(work(rank, folders), out / f"{rank}.safetensors")
    finally:
        dist.destroy_process_group()


def together(work: Work, num_workers: int, folders: Mapping[str, Path], out: Path) -> list[dict[str, Tensor]]:
    """What each of some processes has of a piece of work; this one is the first of them."""
    spawn = torch.multiprocessing.get_context("spawn")
    others = [
        spawn.Process(target=one_of_workers, args=(work, rank, num_workers, folders, out)) for rank in range(1, num_workers)
    ]
    for other in others:
        other.start()
    one_of_workers(work, 0, num_workers, folders, out)
    for other in others:
        other.join()
        assert other.exitcode == 0
    return [load_file(out / f"{rank}.safetensors") for rank in range(num_workers)]


def steps_of(cases: Mapping[str, Case], rank: int, folders: Mapping[str, Path]) -> dict[str, Tensor]:
    results = {}
    for name, case in cases.items():
        folder = folders[case.family]
        trainer = trainer_of(case, folder, sharded=True, rank=rank)
        results |= {f"{name}: {key}": value for key, value in two_steps(case, trainer, folder, case.deals[rank]).items()}
    return results


def differences(case: Case, name: str, worker: Mapping[str, Tensor], folder: Path) -> dict[str, float]:
    """The largest relative difference of each kind of result from one process's. (A key's bias moves no attention: its gradient
    is nothing but rounding.)"""
    own = {key.removeprefix(f"{name}: "): value for key, value in worker.items() if key.startswith(f"{name}: ")}
    expected = alone(case, folder)
    assert own.keys() == expected.keys()
    gradients: dict[str, float] = {}
    for key, value in expected.items():
        if key.startswith("gradient "):
            name = key.split()[-1]
            gradients[name] = max(gradients.get(name, 0.0), float(value.abs().max()))
    kept_as = torch.promote_types(case.dtype, torch.float32)
    least = torch.finfo(kept_as).eps * max(gradients.values())
    found: dict[str, float] = {}
    for key, value in expected.items():
        if gradients.get(key.split()[-1], math.inf) < least:
            continue
        kind = key.split()[0]
        difference = float((own[key] - value).abs().max() / value.abs().max().clamp_min(1e-30))
        found[kind] = max(found.get(kind, 0.0), difference)
    return found


def whole_or_own(tensor: Tensor) -> Tensor:
    """Of a sharded tensor this worker's rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class LiveBytes(TorchDispatchMode):
    """Within it, `peak` is the most bytes at a time of storages that were made since; FSDP gives a storage its memory and takes
    it away again."""

    def __init__(self, there_before: Sequence[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._before = {storage_key(tensor) for tensor in there_before}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                own = whole_or_own(tensor)
                key = storage_key(own)
                if key not in self._before:
                    self._storages[key] = weakref.ref(own.untyped_storage())
        live = [storage for ref in self._storages.values() if (storage := ref()) is not None]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in live))
        return out
