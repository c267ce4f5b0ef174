"""Reads GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) of float32 and two block formats."""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
FLOAT32, Q4_1, Q8_0 = 0, 3, 8
BLOCK = 32
"""Values that share a scale."""


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors, in float32, of a file of version 3."""
    with path.open("rb") as file:
        magic, version, num_tensors, num_fields = struct.unpack("<4sIQQ", file.read(24))
        assert (magic, version) == (b"GGUF", 3), f"{path} is no GGUF file of version 3."
        fields = {}
        for _ in range(num_fields):
            name = _string(file)
            fields[name] = _value(file, _scalar(file, "<I"))
        places = []
        for _ in range(num_tensors):
            name = _string(file)
            sizes = [_scalar(file, "<Q") for _ in range(_scalar(file, "<I"))]
            places.append((name, sizes[::-1], _scalar(file, "<I"), _scalar(file, "<Q")))
        alignment = fields.get("general.alignment", 32)
        start = math.ceil(file.tell() / alignment) * alignment
    data = np.memmap(path, np.uint8, "r", offset=start)
    return fields, {name: torch.from_numpy(_floats(data[at:], shape, kind)) for name, shape, kind, at in places}


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_scalar(file, "<Q")).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        inner, length = struct.unpack("<IQ", file.read(12))
        return [_value(file, inner) for _ in range(length)]
    return _scalar(file, SCALARS[kind])


def _floats(data: np.ndarray, shape: list[int], kind: int) -> np.ndarray:
    """The values of a tensor whose bytes begin `data`. A block of Q8_0 is a scale and 32 signed bytes; one of Q4_1 is a
    scale, a minimum and 32 nibbles, the low ones first."""
    count = math.prod(shape)
    if kind == FLOAT32:
        return data[: count * 4].view(np.float32).reshape(shape).copy()
    size = {Q4_1: 4 + BLOCK // 2, Q8_0: 2 + BLOCK}[kind]
    blocks = data[: count // BLOCK * size].reshape(-1, size)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == Q8_0:
        return (scale * blocks[:, 2:].view(np.int8)).reshape(shape)
    minimum = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (scale * nibbles + minimum).reshape(shape)
