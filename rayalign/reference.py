"""Log-probabilities under the reference as data: what they depend on, and the files that hold them beside the encoded pairs.

Stored for each response token, since objectives weigh tokens differently. A file holds the rows of one part and is complete or
absent, so that a pass that was cut short goes on with the parts that are missing. `reference_pass` computes them, `prepared`
brings them along with the pairs.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import transformers
from numpy.typing import NDArray
from transformers.utils.hub import cached_file

from rayalign.config import ModelConfig, TunerConfig
from rayalign.models import ModelSource
from rayalign.storage import Store

REFERENCE_VERSION = 2
"""Part of every key; raised when what is stored or its arithmetic changes."""

PART_ROWS = 64
"""Rows of one file, which one task computes."""

SIDES = ("chosen", "rejected", "damaged")

REFERENCE_SCHEMA = pa.schema(
    [pa.field("id", pa.string(), nullable=False), *(pa.field(side, pa.list_(pa.float32()), nullable=False) for side in SIDES)]
)
"""One row: the pair's id and, token by token, the log-probabilities of its chosen response, of its rejected one, and of its
chosen one with damaged images (mDPO); empty where there is no such response."""

OPEN_PARTS = 64
HASHED_NAMES = ("config.json", "adapter_config.json")
HASHED_SUFFIXES = (".safetensors", ".bin", ".index.json", ".py")
"""Files of a model's or adapter's folder that its outputs depend on: how it is built, weights, code that comes with it."""


@dataclass(frozen=True)
class ReferenceLogps:
    """A pair's log-probabilities under the reference, one for each token; see REFERENCE_SCHEMA."""

    chosen: list[float]
    rejected: list[float]
    damaged: list[float]


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
    damaged: bool,
) -> ReferenceKey:
    """The key of the reference of a run. `dtype` is the type of the arithmetic on devices of the type `device`; `damaged`: the
    chosen responses are scored with damaged images, too."""
    is_folder = Path(source.base).is_dir()
    weights = _content_hashes(Path(source.base)) if is_folder else {source.base: _hub_revision(source.base)}
    full = tuner.sft_type == "full"
    quantised = tuner.quant_bits is not None
    settings = {
        "version": REFERENCE_VERSION,
        "transformers": transformers.__version__,  # whose code the model is
        "dtype": dtype,
        "device": device,
        "attn_implementation": model.attn_implementation,
        "quantisation": [tuner.quant_bits, tuner.bnb_4bit_quant_type, tuner.bnb_4bit_use_double_quant] if quantised else None,
        # Weights of parts that learn in full are float32, whatever the type of the arithmetic.
        "frozen": [tuner.freeze_vit, tuner.freeze_aligner, tuner.freeze_llm] if full else None,
        "damaged": damaged,
    }
    return ReferenceKey(weights, _content_hashes(Path(source.adapter)) if source.adapter else {}, settings)


def write_part(store: Store, ids: Sequence[str], rows: Sequence[ReferenceLogps]) -> None:
    """Writes the rows of one part, a record batch for each, so that a row is one small read."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, REFERENCE_SCHEMA) as writer:
        for pair_id, row in zip(ids, rows, strict=True):
            columns = [pa.array([pair_id]), *(pa.array([getattr(row, side)], pa.list_(pa.float32())) for side in SIDES)]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=REFERENCE_SCHEMA))
    store.write_bytes(sink.getvalue().to_pybytes())


def part_name(part: int) -> str:
    """The file of the rows PART_ROWS * part and on."""
    return f"part_{part:06d}.arrow"


def missing_parts(folder: Store, rows: NDArray[np.int64]) -> list[int]:
    """The parts that hold some of `rows` and are not there yet."""
    there = {file.name for file in folder.list()}
    return [part for part in np.unique(rows // PART_ROWS).tolist() if part_name(part) not in there]


class ReferenceReader:
    """Looks rows up by their number; keeps the most recently used parts open."""

    def __init__(self, folder: Store) -> None:
        self._folder = folder
        self._open = functools.lru_cache(maxsize=OPEN_PARTS)(self._open_part)

    def read(self, rows: Sequence[int] | NDArray[np.int64], ids: Sequence[str]) -> pa.Table:
        """The rows with these numbers, in this order, as a table of REFERENCE_SCHEMA; `ids` are the pairs' they must have."""
        batches = [self._open(int(row) // PART_ROWS).get_batch(int(row) % PART_ROWS) for row in rows]
        table = pa.Table.from_batches(batches, schema=REFERENCE_SCHEMA)
        stored = table["id"].to_pylist()
        assert stored == list(ids), f"{self._folder.location} holds the log-probs of {stored} where {list(ids)} stand"
        return table

    def _open_part(self, part: int) -> Any:
        return (self._folder / part_name(part)).open_arrow()


def _hub_revision(model: str) -> str:
    """The commit of a model of the hub: the name of the cache's folder that its files are in."""
    return Path(str(cached_file(model, "config.json"))).parent.name


def _content_hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.iterdir() if file.name in HASHED_NAMES or file.name.endswith(HASHED_SUFFIXES))
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        return dict(zip([file.name for file in files], threads.map(_content_hash, files), strict=True))


def _content_hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**22):
            digest.update(block)
    return digest.hexdigest()
