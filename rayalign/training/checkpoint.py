"""What a checkpoint holds, and how the newest whole one is found.

A checkpoint folder is complete or it does not count: its manifest names every file with size and hash. A run that goes on reads
the newest checkpoint, and deletes others only when every worker holds its content with the right hashes. Where weights are
sharded, each worker writes its own, and reads its own if there are as many workers as then (`checkpoint_files`). Only
safetensors and JSON: nothing is unpickled.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from rayalign.storage import Store
from rayalign.training.best import Best, best_from
from rayalign.training.checkpoint_files import (
    MOMENTS,
    WEIGHTS,
    SavedTensors,
    copy_own_part,
    files_of,
    like,
    num_shards,
    shard_file,
    tensor_files,
    whole_file,
    write_tensors,
)
from rayalign.training.distributed import gather, is_sharded

if TYPE_CHECKING:
    from rayalign.policy.policy import Policy

logger = logging.getLogger(__name__)

MANIFEST, STATE = "manifest.json", "state.json"
Shard = tuple[int, int]
"""Which shard of how many a worker holds."""
ALL_SHARDS: Shard = (0, 0)
NONE_YET = Best()
REMEDY = "Continue the run with the flags that it began with, or choose another --output_dir."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on storage, taken after `step` optimizer steps."""

    store: Store
    step: int


@dataclass(frozen=True)
class FetchedCheckpoint:
    """A checkpoint whose files are in the local `folder`, each with the hash that it was saved with."""

    store: Store
    step: int
    folder: Path


@dataclass(frozen=True)
class Snapshot:
    """What a worker has of a checkpoint after `step` steps: its tensors, by file and by name, and the `state`, which rank 0
    writes; the best evaluation so far."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    best: Best
    rank: int
    is_sharded: bool

    @classmethod
    def of(
        cls,
        policy: "Policy",
        optimizer: Optimizer,
        *,
        step: int,
        scaler: GradScaler | None = None,
        best: Best = NONE_YET,
        rank: int = 0,
    ) -> "Snapshot":
        """The trainable weights, the optimizer's moments, the number of steps done, float16's loss scale and the best
        evaluation so far. The tensors are those of the training, until they are `copied`."""
        names = {id(p): name for name, p in policy.trainable.items()}
        moments = {
            f"{names[id(p)]}|{key}": torch.as_tensor(value)
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }
        state: dict[str, Any] = {"step": step, "torch": torch.__version__}
        if scaler is not None and scaler.is_enabled():
            state["loss_scale"] = scaler.state_dict()
        if best != NONE_YET:
            state["best"] = best.to_dict()
        tensors = {**files_of(policy.trainable, WEIGHTS, rank=rank), **files_of(moments, MOMENTS, rank=rank)}
        return cls(step, tensors, state, best, rank, trains_shards(policy))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())

    def copied(self) -> "Snapshot":
        """The same in the CPU's memory, whatever the training does next; one tensor is moved at a time."""
        copies = {
            file: {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            for file, tensors in self.tensors.items()
        }
        return dataclasses.replace(self, tensors=copies)


def write_checkpoint(store: Store, snapshot: Snapshot, *, gather: Callable[[Any], list[Any]] = gather) -> None:
    """Writes a checkpoint, each file hashed on its way; the manifest last, with which it counts. Of sharded weights every
    worker calls it, and writes what it holds of them."""
    with contextlib.ExitStack() as stack:
        local = store.local_path
        folder = local or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        files = {file: write_tensors(tensors, folder / file) for file, tensors in snapshot.tensors.items()}
        if snapshot.rank == 0:
            (folder / STATE).write_text(json.dumps(snapshot.state))
            files[STATE] = _file_entry(folder / STATE)
        if local is None:
            store.upload(folder)
    if snapshot.is_sharded:
        files = {name: entry for worker in gather(files) for name, entry in worker.items()}
    if snapshot.rank == 0:
        (store / MANIFEST).write_bytes(json.dumps(files).encode())


def trains_shards(policy: "Policy") -> bool:
    """Whether trainable weights are sharded, so that every worker has some of a checkpoint."""
    return any(map(is_sharded, policy.trainable.values()))


def load_checkpoint(
    checkpoint: FetchedCheckpoint, policy: "Policy", optimizer: Optimizer, *, scaler: GradScaler | None = None
) -> None:
    """Restores weights, optimizer and loss scale in place. Raises ValueError where the checkpoint is of another model, adapter
    or precision."""
    loss_scale = json.loads((checkpoint.folder / STATE).read_text()).get("loss_scale")
    parameters = policy.trainable
    scales_loss = scaler is not None and scaler.is_enabled()
    with (
        SavedTensors(checkpoint.folder, MOMENTS) as moments,
        SavedTensors(checkpoint.folder, WEIGHTS) as weights,
    ):
        _require_fit(weights, parameters, checkpoint.store.location)
        if scales_loss != (loss_scale is not None):
            kinds = {True: "float16", False: "another type"}
            raise ValueError(
                f"The checkpoint {checkpoint.store.location} was trained in {kinds[not scales_loss]}, and this run trains in "
                f"{kinds[scales_loss]}. Pass the same --dtype."
            )
        if scaler is not None and scales_loss:
            scaler.load_state_dict(loss_scale)
        _restore(weights, parameters)
        for key in sorted(moments.names):
            name, moment = key.split("|")
            parameter = parameters[name]
            # AdamW keeps its step counts on the CPU unless it is fused or capturable.
            optimizer.state[parameter][moment] = (
                _on_device(moments.value(key), parameter, optimizer)
                if moment == "step"
                else like(parameter, moments.own_part(key, parameter))
            )


def load_weights(folder: Path, policy: "Policy") -> None:
    """Restores the trainable weights of a checkpoint's files alone, in place. Raises ValueError where they are of another model
    or adapter."""
    with SavedTensors(folder, WEIGHTS) as weights:
        _require_fit(weights, policy.trainable, folder.name)
        _restore(weights, policy.trainable)


def _restore(weights: SavedTensors, parameters: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            copy_own_part(parameter, weights.own_part(name, parameter))


def _require_fit(weights: SavedTensors, parameters: Mapping[str, Tensor], checkpoint: str) -> None:
    """Raises ValueError where weights are not those of a policy."""
    if weights.names != set(parameters):
        odd = sorted(weights.names ^ set(parameters))[:3]
        raise ValueError(f"The checkpoint {checkpoint} trains other weights than this run ({', '.join(odd)}, ...). {REMEDY}")
    for name, parameter in parameters.items():
        shape = weights.shape_beside(name, parameter)
        if shape != parameter.shape:
            raise ValueError(
                f"The checkpoint {checkpoint} has {name} of shape {shape}, and this run trains one of "
                f"{tuple(parameter.shape)}. {REMEDY}"
            )


def load_best(checkpoint: FetchedCheckpoint) -> Best:
    """The best evaluation of the run until this checkpoint."""
    return best_from(json.loads((checkpoint.folder / STATE).read_text()).get("best"))


def fetch_newest(
    folder: Store, temporary: Path, *, shard: Shard = ALL_SHARDS, gather: Callable[[Any], list[Any]] = gather
) -> FetchedCheckpoint | None:
    """The checkpoint with the most steps that every worker can read, hashes and all, copied into `temporary`; those that
    are damaged are passed over with a warning. Every worker calls it, and gets the same one: all files, or of those of other
    workers none where it holds the same `shard` as the one that wrote its own."""
    listed: list[Checkpoint] = gather(_newest_first(folder))[0]
    for checkpoint in listed:
        copy = temporary / checkpoint.store.name
        problem = next(filter(None, gather(_fetch(checkpoint.store, copy, shard))), None)
        if problem is None:
            return FetchedCheckpoint(checkpoint.store, checkpoint.step, copy)
        logger.warning("Passing over checkpoint %s: %s.", checkpoint.store.location, problem)
        shutil.rmtree(copy)
    return None


def fetch(
    store: Store,
    step: int,
    temporary: Path,
    *,
    shard: Shard = ALL_SHARDS,
    gather: Callable[[Any], list[Any]] = gather,
) -> FetchedCheckpoint:
    """One checkpoint, copied into `temporary` by every worker. Raises ValueError on each where one of them can't read it whole,
    hashes and all."""
    copy = temporary / store.name
    problem = next(filter(None, gather(_fetch(store, copy, shard))), None)
    if problem is not None:
        raise ValueError(f"The checkpoint {store.location} is damaged: {problem}.")
    return FetchedCheckpoint(store, step, copy)


def fetch_weights(store: Store, temporary: Path) -> Path:
    """A folder in `temporary` with a copy of a checkpoint's trainable weights. Raises ValueError where they are damaged."""
    copy = temporary / store.name
    copy.mkdir()
    problem = _what_is_missing(store)
    if problem is None:
        names = [file.name for file in store.list() if file.name.startswith(WEIGHTS)]
        problem = _fetch_files(store, copy, (MANIFEST, *names))
    if problem is not None:
        raise ValueError(f"The checkpoint {store.location} is damaged: {problem}.")
    return copy


def whole_checkpoints(folder: Store) -> list[Checkpoint]:
    """The checkpoints whose files are all there, by their sizes; the newest first."""
    return [found for found in _newest_first(folder) if _what_is_missing(found.store) is None]


def whole_at(folder: Store, step: int) -> Checkpoint | None:
    """A whole checkpoint after `step` steps."""
    return next(
        (found for found in _newest_first(folder) if found.step == step and _what_is_missing(found.store) is None), None
    )


def delete_others(
    folder: Store,
    keep: FetchedCheckpoint,
    *,
    best: Store | None = None,
    waits: Callable[[Checkpoint], bool] = lambda checkpoint: False,
) -> None:
    """Deletes every checkpoint but the one that a run goes on from, the best one and those before it that somebody `waits` for,
    once every worker has read the first."""
    for checkpoint in _newest_first(folder):
        is_kept = checkpoint.store in (keep.store, best) or (checkpoint.step < keep.step and waits(checkpoint))
        if not is_kept:
            checkpoint.store.delete()


def prune_checkpoints(
    folder: Store,
    *,
    keep: int,
    best: Store | None = None,
    waits: Callable[[Checkpoint], bool] = lambda checkpoint: False,
) -> None:
    """Deletes all but the newest `keep` checkpoints, the best one and those that somebody `waits` for, and every incomplete
    one. Looks at names and sizes only, and reads no content for it."""
    whole = 0
    for checkpoint in _newest_first(folder):
        problem = _what_is_missing(checkpoint.store)
        whole += problem is None
        if problem is not None:
            logger.warning("Deleting the damaged checkpoint %s: %s.", checkpoint.store.location, problem)
        if problem is not None or (whole > keep and checkpoint.store != best and not waits(checkpoint)):
            checkpoint.store.delete()


def has_checkpoint(folder: Store) -> bool:
    """Whether a run got as far as its first finished checkpoint, whatever has happened to it since."""
    return any((checkpoint.store / MANIFEST).exists() for checkpoint in _newest_first(folder))


def newest_complete(folder: Store) -> Checkpoint | None:
    """The checkpoint with the most steps whose files are all there, by their sizes: what a run would go on from."""
    return next((found for found in _newest_first(folder) if _what_is_missing(found.store) is None), None)


def checkpoint_name(step: int, attempt: str) -> str:
    """The folder name after `step` steps; `attempt` keeps apart what two starts of one run wrote."""
    return f"step_{step:08d}_{attempt}"


def _newest_first(folder: Store) -> list[Checkpoint]:
    found = []
    for store in folder.list():
        match store.name.split("_"):
            case ["step", step, _] if step.isdecimal():
                found.append(Checkpoint(store, int(step)))
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def _fetch(store: Store, copy: Path, shard: Shard) -> str | None:
    """Copies a checkpoint's files into the new folder `copy`; returns what is wrong with them."""
    copy.mkdir()
    problem = _what_is_missing(store)
    if problem is not None:
        return problem
    number, of = shard
    count = num_shards(file.name for file in store.list())
    shards = (number,) if 0 < count == of else range(count)
    wanted = [shard_file(kind, n, count) for kind in (WEIGHTS, MOMENTS) for n in shards]
    return _fetch_files(store, copy, (MANIFEST, STATE, whole_file(WEIGHTS), whole_file(MOMENTS), *wanted))


def _fetch_files(store: Store, copy: Path, names: Sequence[str]) -> str | None:
    """Copies a checkpoint's manifest and others of its files; returns what is wrong with them."""
    store.download(copy, names)
    for name, entry in _parse_manifest((copy / MANIFEST).read_bytes()).items():
        if name in names and _file_entry(copy / name) != entry:
            return f"{name} does not have the hash it was saved with"
    return None


def _what_is_missing(store: Store) -> str | None:
    """What is wrong with a checkpoint as far as its manifest and the sizes of its files tell."""
    sizes = {file.name: file.info().size for file in store.list()}
    if MANIFEST not in sizes:
        return "it has no manifest, so it was never finished"
    try:
        manifest = _parse_manifest((store / MANIFEST).read_bytes())
    except ValueError as error:
        return str(error)
    for name, entry in manifest.items():
        if sizes.get(name) != entry["size"]:
            return f"{name} has {sizes.get(name) or 0} of {entry['size']} bytes"
    return None


def _parse_manifest(content: bytes) -> Mapping[str, Any]:
    """Size and hash of each file by its name; raises ValueError where the manifest is damaged."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("its manifest is cut short or no JSON") from None
    count = num_shards(manifest) if isinstance(manifest, dict) else 0
    if not isinstance(manifest, dict) or set(manifest) != {*tensor_files(count), STATE}:
        shards = f", and all {count} shards of the first two" if count else ""
        raise ValueError(f"its manifest does not name {whole_file(WEIGHTS)}, {whole_file(MOMENTS)} and {STATE}{shards}")
    if not all(isinstance(entry, dict) and {"size", "sha256"} <= set(entry) for entry in manifest.values()):
        raise ValueError("its manifest lacks sizes and hashes")
    return manifest


def _file_entry(file: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as content:
        while block := content.read(2**22):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _on_device(step: Tensor, parameter: Tensor, optimizer: Optimizer) -> Tensor | int:
    if not step.is_floating_point():  # bitsandbytes counts in whole numbers
        return int(step)
    return step.to(parameter.device) if optimizer.defaults.get("fused") else step
