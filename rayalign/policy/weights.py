"""A model's weights from its files, all of them: what is missing, left over or of another shape is refused with its names.

`loading` and `serving.export` load base models here. transformers by itself fills what is missing with random numbers and
leaves out what is left over.
"""

import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

logger = logging.getLogger(__name__)

SHOWN = 3
"""So many names are listed; of the others only the number is told."""

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def load_weights(auto_class: Any, model: str, *, needs_output_head: bool, **options: Any) -> Any:
    """The model of a folder or hub id, by `from_pretrained` with these options.

    What transformers documents as not needed (tied weights, buffers that it computes, its models' own exceptions) is none of
    this. Without `needs_output_head` the output head may be missing. Raises ValueError with the names of tensors that are
    missing, left over or of another shape, and for files that are missing or damaged.
    """
    _check_files(Path(model))
    try:
        # Other shapes are refused below, with all names at once.
        loaded, report = auto_class.from_pretrained(model, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except SafetensorError as error:
        raise ValueError(f"{model}: a file of its weights is damaged ({error}). Copy the model again.") from None
    except OSError as error:
        if error.errno is not None:  # the storage's own
            raise
        raise ValueError(f"{model}: its weights can't be loaded: {str(error).splitlines()[0]}") from error
    missing, unexpected = (_without_counters(report[kind]) for kind in ("missing_keys", "unexpected_keys"))
    if not needs_output_head and (head := missing & _output_head(loaded)):
        logger.warning("%s: has no output head (%s); it is not used here, so that it holds random weights", model, listed(head))
        missing -= head
    _refuse(model, missing, unexpected, {key: (tuple(has), tuple(needs)) for key, has, needs in report["mismatched_keys"]})
    return loaded


def listed(names: Collection[str]) -> str:
    """The first few names in order, and how many more there are."""
    shown = sorted(names, key=_natural)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def listed_shapes(mismatched: Mapping[str, Shapes]) -> str:
    """The same for tensors of another shape: (in the file, in the model)."""
    shown = sorted(mismatched, key=_natural)[:SHOWN]
    said = ", ".join(f"{key} is {list(mismatched[key][0])} and must be {list(mismatched[key][1])}" for key in shown)
    return said + (f" and {len(mismatched) - SHOWN} more" if len(mismatched) > SHOWN else "")


def count(names: Collection[str], word: str) -> str:
    return f"{len(names)} {word}" + ("s" if len(names) != 1 else "")


def _refuse(model: str, missing: Collection[str], unexpected: Collection[str], mismatched: Mapping[str, Shapes]) -> None:
    faults = []
    if missing:
        faults.append(f"its files lack {count(missing, 'tensor')}, which would hold random numbers: {listed(missing)}")
    if unexpected:
        faults.append(f"they hold {count(unexpected, 'tensor')} that such a model has no place for: {listed(unexpected)}")
    if mismatched:
        faults.append(f"{count(mismatched, 'tensor')} of another shape than config.json says: {listed_shapes(mismatched)}")
    if faults:
        raise ValueError(
            f"{model}: the weights do not fit its config.json; {'; '.join(faults)}. Copy the model again from where it was "
            "made, or correct its config.json."
        )


def _check_files(folder: Path) -> None:
    """Raises ValueError where a folder lacks a file that its index names, and for damaged ones."""
    if not folder.is_dir():
        return
    kinds = ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
    found = [name for kind in kinds for name in kind if (folder / name).is_file()]
    if not found:
        raise ValueError(
            f"{folder}: has config.json and no weights ({SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} with its shards). "
            "Copy the whole model again."
        )
    files = [folder / found[0]]
    if found[0] in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        files = _shards(files[0])
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{file}: is damaged or cut off ({error}). Copy it again from where it was made.") from None


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        shards = [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: is damaged, or no list of shards. Copy it again from where it was made.") from None
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(
            f"{index.parent}: lacks {count(missing, 'file')} of {len(shards)} that {index.name} names: {listed(missing)}. "
            "Copy the whole model again."
        )
    return shards


def _output_head(loaded: Any) -> set[str]:
    head = loaded.get_output_embeddings()
    prefix = next(name for name, module in loaded.named_modules() if module is head)
    return {f"{prefix}.{name}" for name, _ in head.named_parameters()}


def _without_counters(keys: Collection[str]) -> set[str]:
    """Without what batch norms count for themselves: nothing reads it in evaluation mode, and old files lack it."""
    return {key for key in keys if not key.endswith(".num_batches_tracked")}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"\.", name)]
