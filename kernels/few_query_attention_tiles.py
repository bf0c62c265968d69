"""What both passes of the few-query attention share: tiles, limits and the count of operations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import device_class

MAX_ROWS = 16
"""Heads times queries that a tile holds; the least rows that a matrix product takes."""
MAX_CHANNELS = {torch.float32: 256, torch.float16: 512, torch.bfloat16: 512}
"""Width of the pixels that a tile holds, as they are read once and used twice, by their dtype."""

SIZES = ("batch", "rows", "pixels")
"""Another batch, number of queries or of pixels compiles no other program."""


def fits(rows: int, channels: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels take so many heads * queries over pixels of so many channels on ``device``.

    On cards with 64 KiB of shared memory they take none: the registers of AMD's consumer cards do not hold the tiles.
    """
    return rows <= MAX_ROWS and channels <= MAX_CHANNELS[dtype] and device_class(device) != "tiny"


def channel_block(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def flops(pixels: Tensor | torch.Size, rows: int) -> int:
    """Of one skinny product of all pixels (B, N, K) with ``rows`` vectors a sample."""
    batch, count, channels = pixels
    return 2 * batch * count * channels * rows


@triton.jit
def scaled_rows(source_ptr, first, rows, channels, dtype: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows [BLOCK_R, BLOCK_K] of a float32 (.., K) tensor in ``dtype``, from row ``first`` (int64), and their scales.

    In low precision each row is divided by its largest number, the scale [BLOCK_R]; in float32 the scales are 1.
    """
    row, channel = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    values = tl.load(source_ptr + (first + row)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
    scale = tl.full((BLOCK_R,), 1.0, tl.float32)
    if dtype != tl.float32:
        scale = largest_of(values)
    return (values / scale[:, None]).to(dtype), scale


@triton.jit
def largest_of(rows):
    """The largest magnitude of each row of a tile, above 0."""
    return tl.maximum(tl.max(tl.abs(rows), axis=1), 1e-37)
