"""What train workers do together, in plain torch.distributed: nothing where a process is alone."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from rayalign.policy.policy import Policy

BUCKET_ELEMENTS = 64 * 2**20
"""Elements that are summed over workers at a time; as many are held twice."""


def gather(value: Any) -> list[Any]:
    """Every worker's value, by rank; a small picklable object, and every worker calls it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_workers(tensors: Iterable[Tensor]) -> None:
    """Adds each tensor up over all workers, in place; buckets bound the extra memory."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS or bucket[0].dtype != tensor.dtype):
            _sum_bucket(bucket)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([t.reshape(-1) for t in bucket])
    dist.all_reduce(flat)
    for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(total.view_as(tensor))


def start_alike(policy: "Policy") -> None:
    """Gives every worker rank 0's trainable weights."""
    if dist.is_initialized():
        for parameter in policy.trainable.values():
            dist.broadcast(parameter.data, src=0)
