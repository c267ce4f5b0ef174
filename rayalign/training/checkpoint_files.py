"""The tensors of a checkpoint in its files: whole ones in one file, sharded ones in a file of each worker.

A shard has a worker's rows of each tensor, in the order of ranks, so that shards joined are the tensor, and any number of
workers can take their rows of those that another number wrote.
"""

import contextlib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from rayalign.training.codes import BLOCK

KINDS = WEIGHTS, MOMENTS = "trainable", "optimizer"
"""Files whose names begin so hold the trainable weights, and what the optimizer keeps of each."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the types of weights and moments."""

_SHARD = re.compile(rf"({'|'.join(KINDS)})-(\d{{5}})-of-(\d{{5}})\.safetensors")


def whole_file(kind: str) -> str:
    return f"{kind}.safetensors"


def shard_file(kind: str, number: int, count: int) -> str:
    """The file of shard `number`, from 0, of so many."""
    return f"{kind}-{number + 1:05}-of-{count:05}.safetensors"


def tensor_files(count: int) -> set[str]:
    """All files of tensors of a checkpoint with so many shards."""
    shards = {shard_file(kind, number, count) for kind in KINDS for number in range(count)}
    return {whole_file(kind) for kind in KINDS} | shards


def num_shards(names: Iterable[str]) -> int:
    """The number of shards of a checkpoint with files of these names; 0 where nothing is sharded."""
    return max((int(match[3]) for match in map(_SHARD.fullmatch, names) if match), default=0)


def files_of(
    tensors: Mapping[str, Tensor], kind: str, *, rank: int, shards: Mapping[str, DTensor]
) -> dict[str, dict[str, Tensor]]:
    """What this worker writes of some tensors, by file and by name: rank 0 has all whole ones. Those named in `shards` belong
    to rows of a weight that is sharded, of which this worker has its own."""
    files = {}
    if rank == 0:
        files[whole_file(kind)] = {name: tensor.detach() for name, tensor in tensors.items() if name not in shards}
    if shards and _is_of_first_group(next(iter(shards.values()))):
        number, count = _place(next(iter(shards.values())))
        own = ((name, tensors[name]) for name in shards)
        files[shard_file(kind, number, count)] = {
            name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach() for name, tensor in own
        }
    return files


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """Writes a safetensors file, one tensor after the other, from whatever device it is on; returns its size and hash, which is
    made on the way. The format: https://huggingface.co/docs/safetensors (safetensors' own functions write no hash)."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each is aligned
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    head: tuple[bytes | memoryview, ...] = (len(text).to_bytes(8, "little"), text)
    with file.open("wb") as output:
        for block in itertools.chain(head, (_bytes_of(tensors[name]) for name in names)):
            output.write(block)
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


class SavedTensors(contextlib.ExitStack):
    """The tensors of one kind in the files of a folder, as far as they are there; a context that has them open."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__()
        found = {int(m[2]) - 1: m[0] for file in folder.iterdir() if (m := _SHARD.fullmatch(file.name)) and m[1] == kind}
        self._count = num_shards(found.values())
        self._whole = self._open(folder / whole_file(kind))
        self._shards = {number: self._open(folder / name) for number, name in sorted(found.items())}
        self._in_whole = set(self._whole.keys())
        self.names = self._in_whole.union(*(shard.keys() for shard in self._shards.values()))

    def shape_beside(self, name: str, like: Tensor) -> tuple[int, ...]:
        """The shape of a tensor; where its shards are not all there, that which it has if it has as many rows as `like`."""
        if name in self._in_whole:
            return tuple(self._whole.get_slice(name).get_shape())
        shapes = {number: shard.get_slice(name).get_shape() for number, shard in self._shards.items()}
        rest = next(iter(shapes.values()))[1:]
        if len(shapes) == self._count:
            return (sum(shape[0] for shape in shapes.values()), *rest)
        fits = all(shape[0] == len(rows_of(len(like), n, self._count)) for n, shape in shapes.items())
        return (len(like) if fits else -1, *rest)

    def own_part(self, name: str, like: Tensor) -> Tensor:
        """What a worker holds of a tensor: where `like` is sharded its rows of it, else all. Raises ValueError where the files
        that are there do not have them."""
        if name in self._in_whole and not isinstance(like, DTensor):
            return self.value(name)  # which may have no rows
        parts = [file.get_slice(name)[rows.start : rows.stop] for file, rows in self._places(name, like)]
        return torch.cat(parts) if parts else torch.empty(0, *like.shape[1:], dtype=like.dtype)

    def own_codes(self, name: str, scales: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """What a worker holds of a tensor of 8-bit codes, and the scale [elements] of each of them: a file has one for each
        `BLOCK` of its elements. Raises ValueError as `own_part`."""
        per_row = math.prod(like.shape[1:])
        found = [torch.empty(0)]
        for file, rows in self._places(name, like):
            of_elements = file.get_tensor(scales).repeat_interleave(BLOCK)
            found.append(of_elements[rows.start * per_row : rows.stop * per_row])
        return self.own_part(name, like), torch.cat(found)

    def _places(self, name: str, like: Tensor) -> list[tuple[Any, range]]:
        """The files that have rows of what a worker holds of a tensor, and which of theirs these are."""
        rows = rows_of(len(like), *_place(like)) if isinstance(like, DTensor) else range(len(like))
        if name in self._in_whole:
            return [(self._whole, rows)]
        places = []
        for number, shard in self._shards.items():
            there = rows_of(len(like), number, self._count)
            first, last = max(rows.start, there.start), min(rows.stop, there.stop)
            if first < last:
                places.append((shard, range(first - there.start, last - there.start)))
        found = sum(len(rows) for _, rows in places)
        if found != len(rows):
            raise ValueError(
                f"The checkpoint's shards that this worker has read hold {found} of the {len(rows)} rows of {name} that it "
                "needs: a version of rayalign wrote it that sharded other weights. Go on with that version, or once with "
                "another --num_workers: then each worker reads all shards."
            )
        return places

    def value(self, name: str) -> Tensor:
        """A tensor that is whole."""
        tensor: Tensor = self._whole.get_tensor(name)
        return tensor

    def _open(self, file: Path) -> Any:
        return self.enter_context(safe_open(file, "pt"))


def rows_of(rows: int, number: int, count: int) -> range:
    """The rows of shard `number` of a tensor with so many, as torch cuts it: even shares, the last ones shorter or empty."""
    share = -(-rows // count)
    return range(min(number * share, rows), min((number + 1) * share, rows))


def like(parameter: Tensor, own: Tensor) -> Tensor:
    """A tensor that is spread as a parameter is, of which `own` is this worker's part."""
    own = own.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return own
    return DTensor.from_local(
        own, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def copy_own_part(parameter: Tensor, own: Tensor) -> None:
    """Puts a worker's part of a parameter in place."""
    (parameter.to_local() if isinstance(parameter, DTensor) else parameter).copy_(own)


def _is_of_first_group(tensor: DTensor) -> bool:
    """Whether a worker's shards are those that count, where several groups of workers have the same ones."""
    return tensor.device_mesh.ndim == 1 or tensor.device_mesh.get_local_rank(0) == 0


def _place(tensor: DTensor) -> Sequence[int]:
    """Which shard a worker has of how many."""
    mesh = tensor.device_mesh
    return mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
