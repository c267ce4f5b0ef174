"""What a checkpoint holds, and how the newest whole one is found.

A checkpoint folder is complete or it does not count: its manifest, which names every file with size and hash, is checked before
the folder is used, so an upload cut short is passed over. Only safetensors and JSON: nothing is unpickled.
"""

import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from rayalign.storage import Store

if TYPE_CHECKING:
    from rayalign.policy.policy import Policy

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
REMEDY = "Continue the run with the flags that it began with, or choose another --output_dir."


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on storage, taken after `step` optimizer steps."""

    store: Store
    step: int


def write_checkpoint(
    folder: Path, policy: "Policy", optimizer: Optimizer, *, step: int, scaler: GradScaler | None = None
) -> None:
    """Writes the trainable weights, the optimizer's moments, the number of steps done and float16's loss scale; the manifest
    last."""
    names = {id(p): name for name, p in policy.trainable.items()}
    save_file({name: p.detach().contiguous() for name, p in policy.trainable.items()}, folder / "trainable.safetensors")
    moments = {
        f"{names[id(p)]}|{key}": value.detach().contiguous().clone()
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    save_file(moments, folder / "optimizer.safetensors")
    state: dict[str, Any] = {"step": step, "torch": torch.__version__}
    if scaler is not None and scaler.is_enabled():
        state["loss_scale"] = scaler.state_dict()
    (folder / "state.json").write_text(json.dumps(state))
    files = {file.name: _file_entry(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files))


def load_checkpoint(
    checkpoint: Checkpoint, policy: "Policy", optimizer: Optimizer, *, scaler: GradScaler | None = None
) -> None:
    """Restores weights, optimizer and loss scale in place. Raises ValueError where the checkpoint is of another model, adapter
    or precision."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint.store.download(folder)
        for name, entry in json.loads((folder / MANIFEST).read_text()).items():
            if _file_entry(folder / name) != entry:
                raise ValueError(
                    f"The checkpoint {checkpoint.store.location} is damaged: {name} does not have the hash it was saved with. "
                    "Delete its folder; the same command then continues from an earlier checkpoint, or from the start."
                )
        weights, moments = load_file(folder / "trainable.safetensors"), load_file(folder / "optimizer.safetensors")
        loss_scale = json.loads((folder / "state.json").read_text()).get("loss_scale")
    parameters = policy.trainable
    if set(weights) != set(parameters):
        odd = sorted(set(weights) ^ set(parameters))[:3]
        raise ValueError(
            f"The checkpoint {checkpoint.store.location} trains other weights than this run ({', '.join(odd)}, ...). {REMEDY}"
        )
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"The checkpoint {checkpoint.store.location} has {name} of shape {tuple(weights[name].shape)}, "
                f"and this run trains one of {tuple(parameter.shape)}. {REMEDY}"
            )
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


def newest_checkpoint(folder: Store) -> Checkpoint | None:
    """The whole checkpoint with the most steps; incomplete ones are passed over with a warning."""
    for checkpoint in sorted(_candidates(folder), key=lambda c: c.step, reverse=True):
        problem = _what_is_wrong(checkpoint.store)
        if problem is None:
            return checkpoint
        logger.warning("Passing over checkpoint %s: %s.", checkpoint.store.location, problem)
    return None


def prune_checkpoints(folder: Store, *, keep: int) -> None:
    """Deletes all but the newest `keep` whole checkpoints, and every incomplete one. Not while a run is writing."""
    by_step = sorted(_candidates(folder), key=lambda c: c.step, reverse=True)
    whole = 0
    for checkpoint in by_step:
        problem = _what_is_wrong(checkpoint.store)
        whole += problem is None
        if problem is not None:
            logger.warning("Deleting the damaged checkpoint %s: %s.", checkpoint.store.location, problem)
        if problem is not None or whole > keep:
            checkpoint.store.delete()


def checkpoint_name(step: int, attempt: str) -> str:
    """The folder name after `step` steps; `attempt` keeps apart what two starts of one run wrote."""
    return f"step_{step:08d}_{attempt}"


def _candidates(folder: Store) -> list[Checkpoint]:
    found = []
    for store in folder.list():
        match store.name.split("_"):
            case ["step", step, _] if step.isdigit():
                found.append(Checkpoint(store, int(step)))
    return found


def _what_is_wrong(store: Store) -> str | None:
    sizes = {file.name: file.info().size for file in store.list()}
    if MANIFEST not in sizes:
        return "it has no manifest, so it was never finished"
    try:
        manifest = (store / MANIFEST).read_json()
    except json.JSONDecodeError:
        return "its manifest is cut short"
    for name, entry in manifest.items():
        if sizes.get(name) != entry["size"]:
            return f"{name} has {sizes.get(name, 0)} of {entry['size']} bytes"
    return None


def _file_entry(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _on_device(step: Tensor, parameter: Tensor, optimizer: Optimizer) -> Tensor:
    return step.to(parameter.device) if optimizer.defaults.get("fused") else step
