"""What a checkpoint holds, and how the newest whole one is found.

A checkpoint folder is complete or it does not count: its manifest names every file with size and hash. A run that goes on reads
the newest checkpoint, and deletes others only when every worker holds its content with the right hashes. Only safetensors and
JSON: nothing is unpickled.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from rayalign.storage import Store
from rayalign.training.best import Best, best_from
from rayalign.training.distributed import gather

if TYPE_CHECKING:
    from rayalign.policy.policy import Policy

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WEIGHTS, MOMENTS, STATE = "trainable.safetensors", "optimizer.safetensors", "state.json"
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


def write_checkpoint(
    folder: Path, policy: "Policy", optimizer: Optimizer, *, step: int, scaler: GradScaler | None = None, best: Best = NONE_YET
) -> None:
    """Writes the trainable weights, the optimizer's moments, the number of steps done, float16's loss scale and the best
    evaluation so far; the manifest last."""
    names = {id(p): name for name, p in policy.trainable.items()}
    save_file({name: p.detach().contiguous() for name, p in policy.trainable.items()}, folder / WEIGHTS)
    moments = {
        f"{names[id(p)]}|{key}": value.detach().contiguous().clone()
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    save_file(moments, folder / MOMENTS)
    state: dict[str, Any] = {"step": step, "torch": torch.__version__}
    if scaler is not None and scaler.is_enabled():
        state["loss_scale"] = scaler.state_dict()
    if best != NONE_YET:
        state["best"] = best.to_dict()
    (folder / STATE).write_text(json.dumps(state))
    files = {file.name: _file_entry(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files))


def load_checkpoint(
    checkpoint: FetchedCheckpoint, policy: "Policy", optimizer: Optimizer, *, scaler: GradScaler | None = None
) -> None:
    """Restores weights, optimizer and loss scale in place. Raises ValueError where the checkpoint is of another model, adapter
    or precision."""
    moments = load_file(checkpoint.folder / MOMENTS)
    loss_scale = json.loads((checkpoint.folder / STATE).read_text()).get("loss_scale")
    weights = _fitting_weights(checkpoint.folder / WEIGHTS, policy, checkpoint.store.location)
    parameters = policy.trainable
    scales_loss = scaler is not None and scaler.is_enabled()
    if scales_loss != (loss_scale is not None):
        kinds = {True: "float16", False: "another type"}
        raise ValueError(
            f"The checkpoint {checkpoint.store.location} was trained in {kinds[not scales_loss]}, and this run trains in "
            f"{kinds[scales_loss]}. Pass the same --dtype."
        )
    if scaler is not None and scales_loss:
        scaler.load_state_dict(loss_scale)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for key, value in moments.items():
        name, moment = key.split("|")
        parameter = parameters[name]
        # AdamW keeps its step counts on the CPU unless it is fused or capturable.
        optimizer.state[parameter][moment] = (
            _on_device(value, parameter, optimizer) if moment == "step" else value.to(parameter.device)
        )


def load_weights(file: Path, policy: "Policy") -> None:
    """Restores the trainable weights of a checkpoint's file alone, in place. Raises ValueError where they are of another model
    or adapter."""
    weights = _fitting_weights(file, policy, file.parent.name)
    with torch.no_grad():
        for name, parameter in policy.trainable.items():
            parameter.copy_(weights[name])


def _fitting_weights(file: Path, policy: "Policy", checkpoint: str) -> dict[str, Tensor]:
    """Trainable weights by name, which are those of the policy."""
    weights, parameters = load_file(file), policy.trainable
    if set(weights) != set(parameters):
        odd = sorted(set(weights) ^ set(parameters))[:3]
        raise ValueError(f"The checkpoint {checkpoint} trains other weights than this run ({', '.join(odd)}, ...). {REMEDY}")
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"The checkpoint {checkpoint} has {name} of shape {tuple(weights[name].shape)}, "
                f"and this run trains one of {tuple(parameter.shape)}. {REMEDY}"
            )
    return weights


def load_best(checkpoint: FetchedCheckpoint) -> Best:
    """The best evaluation of the run until this checkpoint."""
    return best_from(json.loads((checkpoint.folder / STATE).read_text()).get("best"))


def fetch_newest(folder: Store, temporary: Path, *, gather: Callable[[Any], list[Any]] = gather) -> FetchedCheckpoint | None:
    """The checkpoint with the most steps that every worker can read whole, hashes and all, copied into `temporary`; those that
    are damaged are passed over with a warning. Every worker calls it, and gets the same one."""
    listed: list[Checkpoint] = gather(_newest_first(folder))[0]
    for checkpoint in listed:
        copy = temporary / checkpoint.store.name
        problem = next(filter(None, gather(_fetch(checkpoint.store, copy))), None)
        if problem is None:
            return FetchedCheckpoint(checkpoint.store, checkpoint.step, copy)
        logger.warning("Passing over checkpoint %s: %s.", checkpoint.store.location, problem)
        shutil.rmtree(copy)
    return None


def fetch(store: Store, step: int, temporary: Path, *, gather: Callable[[Any], list[Any]] = gather) -> FetchedCheckpoint:
    """One checkpoint, copied into `temporary` by every worker. Raises ValueError on each where one of them can't read it whole,
    hashes and all."""
    copy = temporary / store.name
    problem = next(filter(None, gather(_fetch(store, copy))), None)
    if problem is not None:
        raise ValueError(f"The checkpoint {store.location} is damaged: {problem}.")
    return FetchedCheckpoint(store, step, copy)


def fetch_weights(store: Store, temporary: Path) -> Path:
    """The file of a checkpoint's trainable weights, copied into `temporary`. Raises ValueError where it is damaged."""
    copy = temporary / store.name
    copy.mkdir()
    problem = _what_is_missing(store) or _fetch_files(store, copy, (MANIFEST, WEIGHTS))
    if problem is not None:
        raise ValueError(f"The checkpoint {store.location} is damaged: {problem}.")
    return copy / WEIGHTS


def whole_checkpoints(folder: Store) -> list[Checkpoint]:
    """The checkpoints whose files are all there, by their sizes; the newest first."""
    return [found for found in _newest_first(folder) if _what_is_missing(found.store) is None]


def whole_at(folder: Store, step: int) -> Checkpoint | None:
    """A whole checkpoint after `step` steps."""
    return next(
        (found for found in _newest_first(folder) if found.step == step and _what_is_missing(found.store) is None), None
    )


def delete_others(folder: Store, keep: FetchedCheckpoint, *, best: Store | None = None) -> None:
    """Deletes every checkpoint but the one that a run goes on from and the best one, once every worker has read the first."""
    for checkpoint in _newest_first(folder):
        if checkpoint.store not in (keep.store, best):
            checkpoint.store.delete()


def prune_checkpoints(folder: Store, *, keep: int, best: Store | None = None) -> None:
    """Deletes all but the newest `keep` checkpoints and the best one, and every incomplete one. Looks at names and sizes only,
    and reads no content for it."""
    whole = 0
    for checkpoint in _newest_first(folder):
        problem = _what_is_missing(checkpoint.store)
        whole += problem is None
        if problem is not None:
            logger.warning("Deleting the damaged checkpoint %s: %s.", checkpoint.store.location, problem)
        if problem is not None or (whole > keep and checkpoint.store != best):
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


def _fetch(store: Store, copy: Path) -> str | None:
    """Copies a checkpoint's files into the new folder `copy`; returns what is wrong with them."""
    copy.mkdir()
    problem = _what_is_missing(store)
    if problem is not None:
        return problem
    return _fetch_files(store, copy, (MANIFEST, WEIGHTS, MOMENTS, STATE))


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
    if not isinstance(manifest, dict) or set(manifest) != {WEIGHTS, MOMENTS, STATE}:
        raise ValueError(f"its manifest does not name {WEIGHTS}, {MOMENTS} and {STATE}")
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


def _on_device(step: Tensor, parameter: Tensor, optimizer: Optimizer) -> Tensor:
    return step.to(parameter.device) if optimizer.defaults.get("fused") else step
