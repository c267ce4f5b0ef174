"""What an encoded pair is: its fields, as Python and as Arrow have them, token counts of many, and single ones two in a row."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayalign.data.reference_store import SIDES, ReferenceLogps

Rows = NDArray[np.integer[Any]]
"""Row numbers, or numbers of rows."""

ENCODED_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("chosen_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("rejected_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("image_hashes", pa.list_(pa.string()), nullable=False),
        pa.field("margin", pa.float64(), nullable=False),
        pa.field("eval_rejected_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("conversation", pa.string(), nullable=False),
    ]
)
"""One encoded pair. Images are the compressed bytes of the source. A response that a row doesn't have is empty: the rejected
one of SFT's rows, one of the two of a record with a single labelled response. `eval_rejected_ids`: the rejected response of
SFT's pairs, which is compared with the chosen one where the pair is held out, and never trained on. `conversation` is what the
prompt was made of, for people to read: JSON [[role, text], ...] with `<image>` where a picture stands."""

REFERENCE_COLUMNS = tuple(f"reference_{side}" for side in SIDES)
"""What the columns of REFERENCE_SCHEMA are called beside those of ENCODED_SCHEMA."""


@dataclass(frozen=True)
class EncodedPair:
    """One row of ENCODED_SCHEMA: token ids of the prompt (image tokens expanded) and of both responses, and the images."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    images: list[bytes]
    image_hashes: list[str]
    margin: float = 0.0
    eval_rejected_ids: list[int] = field(default_factory=list)
    conversation: str = "[]"
    reference: ReferenceLogps | None = None
    """The log-probabilities under the reference, where they were computed beforehand; in columns of their own."""

    def as_evaluated(self) -> "EncodedPair":
        """The pair with both responses, where it was trained on with one of them only."""
        return dataclasses.replace(self, rejected_ids=self.eval_rejected_ids) if self.eval_rejected_ids else self

    @property
    def num_tokens(self) -> int:
        """Length of the row `[prompt | chosen | rejected]`."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of the prepared rows, each [num_rows]."""

    prompt: Rows
    chosen: Rows
    rejected: Rows

    @classmethod
    def of(cls, pairs: Sequence[EncodedPair]) -> "TokenCounts":
        """Those of some pairs."""
        sides = (
            [pair.prompt_ids for pair in pairs],
            [pair.chosen_ids for pair in pairs],
            [pair.rejected_ids for pair in pairs],
        )
        return cls(*(np.array([len(ids) for ids in side], dtype=np.int64) for side in sides))

    @property
    def num_rows(self) -> int:
        return len(self.prompt)

    def take(self, rows: Rows) -> "TokenCounts":
        """Those of some rows, in this order."""
        return TokenCounts(self.prompt[rows], self.chosen[rows], self.rejected[rows])

    def row_tokens(self, rows: Rows) -> Rows:
        """Lengths of the rows `[prompt | chosen | rejected]`."""
        tokens: Rows = self.prompt[rows] + self.chosen[rows] + self.rejected[rows]
        return tokens


def to_batch(pairs: Sequence[EncodedPair], schema: pa.Schema = ENCODED_SCHEMA) -> pa.RecordBatch:
    """Pairs as a record batch of ENCODED_SCHEMA, or some columns of it; a field that is missing or misspelt is an error, not a
    null."""
    columns = [[getattr(pair, name) for pair in pairs] for name in schema.names]
    arrays = [pa.array(column, type=kind) for column, kind in zip(columns, schema.types, strict=True)]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    batch.validate(full=True)
    for column, name in zip(batch.columns, schema.names, strict=True):
        assert column.null_count == 0, f"{name} is null"
    return batch


def from_batch(batch: pa.RecordBatch | pa.Table) -> list[EncodedPair]:
    """The pairs of a record batch or table with ENCODED_SCHEMA's columns, and REFERENCE_COLUMNS where it has them."""
    rows = batch.select(ENCODED_SCHEMA.names).to_pylist()
    if not set(REFERENCE_COLUMNS) <= set(batch.schema.names):
        return [EncodedPair(**row) for row in rows]
    references = zip(*(batch[column].to_pylist() for column in REFERENCE_COLUMNS), strict=True)
    return [EncodedPair(**row, reference=ReferenceLogps(*logps)) for row, logps in zip(rows, references, strict=True)]


def rows_of_two(pairs: Mapping[int, EncodedPair]) -> list[tuple[EncodedPair, Sequence[int]]]:
    """Pairs of one response each as rows of two where two have the same prompt and images, which are then read once for both;
    each row with the numbers of its responses."""
    by_prompt: dict[Any, list[int]] = {}
    for i, pair in pairs.items():
        by_prompt.setdefault((*pair.image_hashes, *pair.prompt_ids), []).append(i)
    twos = [numbers[k : k + 2] for numbers in by_prompt.values() for k in range(0, len(numbers), 2)]
    return [
        (dataclasses.replace(pairs[two[0]], rejected_ids=pairs[two[1]].chosen_ids) if two[1:] else pairs[two[0]], two)
        for two in twos
    ]
