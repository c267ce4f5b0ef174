"""What the log-probabilities under a reference depend on, as a key: another model, adapter or setting has other numbers.

`precompute` stores them under the key's name; to read them back, nothing about models need be known.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from rayalign.config.config import Config
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.data.companions import Companion
from rayalign.downloads import versions
from rayalign.models.compat import hub_revision
from rayalign.models.source import ModelSource
from rayalign.storage import Store, is_url

REFERENCE_VERSION = 2
"""Part of every key; raised when what is stored or its arithmetic changes."""

REFERENCE_NOTE = "reference.json"
"""The file of a run's folder that says what its reference is."""

HASHED_NAMES = ("config.json", "adapter_config.json")
HASHED_SUFFIXES = (".safetensors", ".bin", ".index.json", ".py")
"""Files of a model's or adapter's folder that its outputs depend on: how it is built, weights, code that comes with it."""


@dataclass(frozen=True)
class ReferenceKey:
    """What the numbers depend on beside the encoded data: `weights` and `adapter` name files with the hash of their content (a
    model of the hub its revision), `settings` how the model is run."""

    weights: Mapping[str, str]
    adapter: Mapping[str, str]
    settings: Mapping[str, Any]

    @functools.cached_property
    def folder_name(self) -> str:
        """The folder beside the encoded data; the same in every process."""
        parts = [self.weights, self.adapter, self.settings]
        return "reference_" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def reference_key(
    source: ModelSource,
    *,
    model: ModelConfig,
    tuner: TunerConfig,
    dtype: str,
    device: str,
    companion: Companion | None,
) -> ReferenceKey:
    """The key of the reference of a run. `dtype` is the type of the arithmetic on devices of the type `device`;
    `companion`: the one whose rows are scored, too."""
    full = tuner.sft_type == "full"
    quantised = tuner.quant_bits is not None
    settings = {
        "version": REFERENCE_VERSION,
        "transformers": transformers.__version__,  # whose code the model is
        "dtype": dtype,
        "device": device,
        "attn_implementation": model.attn_implementation,
        "quantisation": [tuner.quant_bits, tuner.bnb_4bit_quant_type, tuner.bnb_4bit_use_double_quant] if quantised else None,
        # Weights that are trained in full are float32, whatever the type of the arithmetic.
        "frozen": [tuner.freeze_vit, tuner.freeze_aligner, tuner.freeze_llm] if full else None,
        "damaged": False,  # as keys have it that were made when there was one such companion
    }
    if companion is not None:
        settings[companion.name] = True
    return ReferenceKey(_versions(source.base), _versions(source.adapter) if source.adapter else {}, settings)


def check_reference(config: Config, key: ReferenceKey) -> None:
    """Notes in the run's folder what its reference is; raises ValueError where it began with another one."""
    note = Store.at(str(config.run.output_dir)) / REFERENCE_NOTE
    now = {"weights": dict(key.weights), "adapter": dict(key.adapter)}
    if note.exists():
        before = _weights_before(note)
        changed = sorted(
            f"{kind} {name}"
            for kind, files in now.items()
            for name in {*files, *before[kind]}
            if files.get(name) != before[kind].get(name)
        )
        if changed:
            raise ValueError(
                f"The model that the unfinished run in {note.parent.location} started from has changed since "
                f"({', '.join(changed)}), and with it the reference. Bring it back as it was, or pass --overwrite true to "
                "start anew."
            )
    note.write_json(now)


def _weights_before(note: Store) -> Mapping[str, Mapping[str, str]]:
    remedy = "Pass --overwrite true to start anew."
    try:
        before = note.read_json_object()
    except ValueError as error:
        raise ValueError(f"{error} {remedy}") from None
    if not all(isinstance(before.get(kind), dict) for kind in ("weights", "adapter")):
        raise ValueError(f"{note.location} is damaged: it names no weights. {remedy}")
    return before


def hashed_files(folder: Path) -> list[Path]:
    """The files of a model's or adapter's folder that its outputs depend on, by name."""
    return sorted(file for file in folder.iterdir() if is_hashed(file.name))


def is_hashed(name: str) -> bool:
    """Whether a model's or adapter's outputs depend on its file of this name."""
    return name in HASHED_NAMES or name.endswith(HASHED_SUFFIXES)


def _versions(model: str) -> Mapping[str, str]:
    """What tells a model or adapter from every other: of a folder its files' hashes, of a remote one their sizes and times of
    change, of a model of the hub its revision."""
    if is_url(model):
        return {f"{model}/{name}": version for name, version in versions(model).items() if is_hashed(name)}
    if Path(model).is_dir():
        return _content_hashes(Path(model))
    return {model: hub_revision(model)}


def _content_hashes(folder: Path) -> dict[str, str]:
    files = hashed_files(folder)
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        return dict(zip([file.name for file in files], threads.map(_content_hash, files), strict=True))


def _content_hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**22):
            digest.update(block)
    return digest.hexdigest()
