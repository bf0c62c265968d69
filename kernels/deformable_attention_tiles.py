"""What deformable attention's kernels share: their tiles, the levels' table, places, weights and rows of the maps."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config

# Another picture compiles no other program; whether 16 divides a head's width decides how wide loads are.
SIZES = ("queries", "pixels")


def query_config(dtype: torch.dtype) -> Config:
    """Of the kernels whose programs have some queries of one head each."""
    return Config((("BLOCK_Q", 16),), 4, 1, (Config((("BLOCK_Q", 32),), 4, 1), Config((("BLOCK_Q", 32),), 8, 1)))


def tile_sizes(samples: int, width: int) -> tuple[int, int]:
    """SAMPLES and BLOCK_D: powers of two that hold them."""
    return max(2, triton.next_power_of_2(samples)), max(4, triton.next_power_of_2(width))


def level_table(sizes: Sequence[int], device: torch.device) -> Tensor:
    """[S, 4] int32: height, width, first pixel and first cell of each level, whose map has (H + 1) (W + 1) cells.

    Made once, so that CUDA graphs find it on the GPU.
    """
    return _level_table(tuple(sizes), device)


@functools.lru_cache(maxsize=64)
def _level_table(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    rows, pixel, cell = [], 0, 0
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        rows.append((height, width, pixel, cell))
        pixel, cell = pixel + height * width, cell + (height + 1) * (width + 1)
    return torch.tensor(rows, dtype=torch.int32).to(device)


@triton.jit
def softmax_of(logits_ptr, row, asked, COUNT: tl.constexpr, SAMPLES: tl.constexpr):
    """Weights [BLOCK_Q, SAMPLES] in float32, 0 behind the COUNT real ones."""
    sample = tl.arange(0, SAMPLES)
    inside = (sample < COUNT)[None, :] & asked[:, None]
    logits = tl.load(logits_ptr + row[:, None] * COUNT + sample[None, :], mask=inside, other=0.0).to(tl.float32)
    logits = tl.where((sample < COUNT)[None, :], logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return powers / tl.sum(powers, axis=1)[:, None]


@triton.jit
def taken(tile, sample, SAMPLES: tl.constexpr):
    """Column ``sample`` of a tile [BLOCK_Q, SAMPLES]."""
    return tl.sum(tl.where((tl.arange(0, SAMPLES) == sample)[None, :], tile, 0.0), axis=1)


@triton.jit
def place_of(points_ptr, offsets_ptr, index, query, asked, high, wide):
    """x and y in pixels of a level, [BLOCK_Q] each, of the samples at ``index`` (int64)."""
    x = tl.load(points_ptr + query * 2, mask=asked, other=0.0) * wide.to(tl.float32) - 0.5
    y = tl.load(points_ptr + query * 2 + 1, mask=asked, other=0.0) * high.to(tl.float32) - 0.5
    x += tl.load(offsets_ptr + index * 2, mask=asked, other=0.0).to(tl.float32)
    y += tl.load(offsets_ptr + index * 2 + 1, mask=asked, other=0.0).to(tl.float32)
    return x, y


@triton.jit
def near(place):
    """The pixel before a place along one axis, and how far the place lies from it to the next, from 0 to 1.

    Places far outside are first moved to where no pixel is, so that they fit an int32; no number is nowhere, too.
    """
    floor = tl.floor(place)
    fits = (floor >= -2.0) & (floor < 1e9)
    return tl.where(fits, floor, -2.0).to(tl.int32), place - floor


@triton.jit
def row_at(values, x, y, high, wide, first, heads, width, channel, asked):
    """Rows [BLOCK_Q, BLOCK_D] of a head's map in float32; 0 outside it."""
    inside = asked & (x >= 0) & (x < wide) & (y >= 0) & (y < high)
    pixel = (first + y * wide + x).to(tl.int64)
    rows = values + pixel[:, None] * heads * width + channel[None, :]
    return tl.load(rows, mask=inside[:, None] & (channel < width)[None, :], other=0.0).to(tl.float32)
