"""Moments of 8 bits: each number is a code in a table, times the scale of its block of 256 neighbours; bitsandbytes' format.

Blocks do not end where rows do, so a worker that has other rows than the one that wrote them has other blocks.
"""

import torch
from torch import Tensor, nn

BLOCK = 256
"""Neighbours that share a scale."""
MOMENTS, TABLES, SCALES = ("state1", "state2"), ("qmap1", "qmap2"), ("absmax1", "absmax2")
"""What bitsandbytes calls a weight's moments and, where these are codes, their tables and scales."""


def in_blocks(codes: Tensor, scales: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in their shape, and the scale of each block, of codes whose scales [elements] are those of blocks that may have
    ended elsewhere. Where they did not, nothing changes; elsewhere the code is the nearest to its number."""
    missing = -len(scales) % BLOCK
    of_blocks = nn.functional.pad(scales, (0, missing)).view(-1, BLOCK).amax(1)
    now = of_blocks.repeat_interleave(BLOCK)[: len(scales)]
    numbers = table[codes.flatten().int()] * scales / now
    nearest = torch.bucketize(numbers, (table[1:] + table[:-1]) / 2)
    return torch.where(scales == now, codes.flatten(), nearest).to(torch.uint8).view(codes.shape), of_blocks
