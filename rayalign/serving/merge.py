"""A run's adapter merged into its base model: one plain folder, which loads without peft.

`export` calls it for adapters of any algorithm but reward models, whose head needs a form of its own.
"""

from pathlib import Path
from typing import Any

from rayalign.models.processors import load_processor
from rayalign.models.registry import find_family, load_config
from rayalign.models.source import ModelSource
from rayalign.policy.adapters import merge_adapter
from rayalign.policy.weights import load_weights


def write_merged(source: ModelSource, folder: Path, *, needs_output_head: bool = True, max_shard_size: str = "5GB") -> None:
    """Writes the merged weights, in the type of the base model's on disk, its configs and the processor into a folder.

    The base model is never quantised here: an adapter that was trained on 4 bits is merged into the weights that they were made
    of. Raises ValueError where adapter and model do not fit each other.
    """
    assert source.adapter is not None
    family = find_family(load_config(source.base).model_type)
    base: Any = load_weights(family.auto_class, source.base, needs_output_head=needs_output_head, dtype="auto")
    merge_adapter(base, source.adapter).save_pretrained(folder, max_shard_size=max_shard_size)
    processor_of(source).save_pretrained(folder)


def processor_of(source: ModelSource) -> Any:
    """A run writes the processor beside its adapter; an adapter from elsewhere may come alone, or with its tokenizer."""
    beside = source.adapter is not None and (Path(source.adapter) / "processor_config.json").is_file()
    return load_processor(source.base, folder=source.adapter if beside else None)
