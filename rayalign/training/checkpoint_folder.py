"""The folder of a run's checkpoints: which of them are whole, copies of them, and which go.

A checkpoint is complete or it does not count: its manifest names every file with size and hash. A run that goes on reads the
newest one, and deletes others only when every worker holds its content with the right hashes.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign.config.sections import RunConfig
from rayalign.storage import Store
from rayalign.training.best import NOTE, Best, best_checkpoint, is_of_benchmark, write_note
from rayalign.training.checkpoint_files import MOMENTS, WEIGHTS, num_shards, shard_file, tensor_files, whole_file
from rayalign.training.distributed import gather

logger = logging.getLogger(__name__)

MANIFEST, STATE = "manifest.json", "state.json"
Shard = tuple[int, int]
"""Which shard of how many a worker holds."""
ALL_SHARDS: Shard = (0, 0)


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


def settle_checkpoints(run_folder: Store, run: RunConfig, best: Best, loaded: FetchedCheckpoint | None) -> None:
    """Marks the best checkpoint among those that earlier starts of a run left, as far as the run goes on from the `loaded` one,
    whose `best` it is, and deletes those that it will write anew. Called when every worker has its own copy of that one."""
    checkpoints = run_folder / "checkpoints"
    if is_of_benchmark(run):
        kept = best_checkpoint(run_folder)
    else:
        found = whole_at(checkpoints, best.step) if best.step is not None else None
        kept = found.store if found is not None else None
        if found is None:
            # A later one was the best, which the run will come to again.
            (run_folder / NOTE).delete()
        else:
            write_note(run_folder, best, found.store.name)
    if loaded is not None:
        delete_newer(checkpoints, loaded, best=kept)
    else:
        # What no worker could read must not outlast what the run writes now, as the newest would.
        for checkpoint in _newest_first(checkpoints):
            logger.warning("Deleting the damaged checkpoint %s.", checkpoint.store.location)
            checkpoint.store.delete()


def delete_newer(folder: Store, keep: FetchedCheckpoint, *, best: Store | None = None) -> None:
    """Deletes what a run that goes on from a checkpoint will write anew: every one of its step or a later one, but itself and
    the best one, once every worker has read it."""
    for checkpoint in _newest_first(folder):
        if checkpoint.step >= keep.step and checkpoint.store not in (keep.store, best):
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
        if name in names and file_entry(copy / name) != entry:
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


def file_entry(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as content:
        while block := content.read(2**22):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}
