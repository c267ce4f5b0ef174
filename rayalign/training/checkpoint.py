"""What a checkpoint holds, written and loaded again.

Where weights are sharded, each worker writes its own, and reads its own if there are as many workers as then
(`checkpoint_files`). Only safetensors and JSON: nothing is unpickled. `checkpoint_folder` finds the newest whole one.
"""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rayalign.config.sections import RunConfig
from rayalign.storage import Store
from rayalign.training import codes
from rayalign.training.best import Best, best_from
from rayalign.training.checkpoint_files import (
    MOMENTS,
    WEIGHTS,
    SavedTensors,
    copy_own_part,
    files_of,
    like,
    write_tensors,
)
from rayalign.training.checkpoint_folder import MANIFEST, STATE, FetchedCheckpoint, file_entry
from rayalign.training.distributed import gather, is_sharded
from rayalign.training.metrics import Unlogged

if TYPE_CHECKING:
    from rayalign.policy.policy import Policy

logger = logging.getLogger(__name__)

NONE_YET = Best()
WHOLE = {"step", *codes.TABLES}
"""What an optimizer keeps of a weight that is the same for all of its rows."""
REMEDY = "Continue the run with the flags that it began with, or choose another --output_dir."


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
        unlogged: Sequence[Unlogged] = (),
        rank: int = 0,
    ) -> "Snapshot":
        """The trainable weights, the optimizer's moments, the number of steps done, float16's loss scale, the best evaluation
        so far and what no line of metrics has yet. The tensors are those of the training, until they are `copied`."""
        weights = policy.trainable
        shards = {name: p for name, p in weights.items() if isinstance(p, DTensor)}
        moments = {
            f"{name}|{key}": torch.as_tensor(value)
            for name, parameter in weights.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        of_rows = {
            f"{name}|{key}": parameter
            for name, parameter in shards.items()
            for key in optimizer.state.get(parameter, {})
            if key not in WHOLE
        }
        state: dict[str, Any] = {"step": step, "torch": torch.__version__}
        if scaler is not None and scaler.is_enabled():
            state["loss_scale"] = scaler.state_dict()
        if best != NONE_YET:
            state["best"] = best.to_dict()
        if unlogged:
            state["unlogged"] = [dataclasses.asdict(worker) for worker in unlogged]
        tensors = {
            **files_of(weights, WEIGHTS, rank=rank, shards=shards),
            **files_of(moments, MOMENTS, rank=rank, shards=of_rows),
        }
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
            files[STATE] = file_entry(folder / STATE)
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
        _restore_moments(moments, parameters, optimizer)


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


def _restore_moments(moments: SavedTensors, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    for key in sorted(moments.names):
        name, moment = key.split("|")
        parameter, state = parameters[name], optimizer.state[parameters[name]]
        if moment == "step":
            # AdamW keeps its step counts on the CPU unless it is fused or capturable.
            state[moment] = _on_device(moments.value(key), parameter, optimizer)
        elif moment in codes.TABLES:
            state[moment] = moments.value(key).to(parameter.device)
        elif moment in codes.MOMENTS:
            state |= _own_8_bits(moments, name, codes.MOMENTS.index(moment), parameter)
        elif moment not in codes.SCALES:  # which come with the moments
            state[moment] = like(parameter, moments.own_part(key, parameter))


def _own_8_bits(moments: SavedTensors, name: str, number: int, parameter: Tensor) -> dict[str, Tensor]:
    """What bitsandbytes keeps of a worker's rows: a moment of 8 bits and its scales, or of a small weight the moment alone."""
    moment, table, scales = (f"{name}|{kind[number]}" for kind in (codes.MOMENTS, codes.TABLES, codes.SCALES))
    if scales not in moments.names:
        own = [moments.own_part(moment, parameter)]
    else:
        own = [*codes.in_blocks(*moments.own_codes(moment, scales, parameter), moments.value(table))]
    return {kind[number]: each.to(parameter.device) for kind, each in zip((codes.MOMENTS, codes.SCALES), own, strict=False)}


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


def load_unlogged(checkpoint: FetchedCheckpoint) -> list[Unlogged]:
    """What each worker had not logged yet, by rank; nothing in a checkpoint of a version that did not keep it."""
    return [Unlogged(**worker) for worker in json.loads((checkpoint.folder / STATE).read_text()).get("unlogged", ())]


def load_best(checkpoint: FetchedCheckpoint, run: RunConfig) -> Best:
    """The best evaluation of the run until this checkpoint, as its flags now judge."""
    return best_from(json.loads((checkpoint.folder / STATE).read_text()).get("best"), run)


def _on_device(step: Tensor, parameter: Tensor, optimizer: Optimizer) -> Tensor | int:
    if not step.is_floating_point():  # bitsandbytes counts in whole numbers
        return int(step)
    return step.to(parameter.device) if optimizer.defaults.get("fused") else step
