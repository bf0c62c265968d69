"""Tile helpers shared by the forward and backward kernels of cross-attention.

A kernel works on BLOCK_N pixels of one sample. D is too wide for one tile of registers, so every kernel walks over D in
chunks of BLOCK_D channels, and walks twice where a LayerNorm needs the whole row first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import drop_bits, spread_bits

# Rows of the (5, D) float32 tensor that holds every vector of the sub-layer.
NORM_WEIGHT, NORM_BIAS, OUT_BIAS, POST_WEIGHT, POST_BIAS = (tl.constexpr(i) for i in range(5))
# Columns of the (B, N, 4) float32 statistics: mean and reciprocal deviation of the first and of the second norm.
NORM, POST = tl.constexpr(0), tl.constexpr(2)
# Which of the two seeds draws which mask.
WEIGHTS_SEED, BRANCH_SEED = tl.constexpr(0), tl.constexpr(1)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` (B, N, D) itself where its pixels lie densely, batch-first or sequence-first; else a contiguous copy."""
    return x if x.is_contiguous() or x.transpose(0, 1).is_contiguous() else x.contiguous()


def in_layout_of(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the strides of ``other``, which has its shape: itself or a copy."""
    return tensor if tensor.stride() == other.stride() else torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


def head_group(heads: int, words: int, dtype: torch.dtype) -> int:
    """How many heads one tile of attention weights holds: a power of two, at most 256 columns (float32: 128)."""
    return min(triton.next_power_of_2(heads), max(1, 512 // dtype.itemsize // words))


@triton.jit
def row_block(rows, BLOCK_N: tl.constexpr):
    """This program's sample, its pixels (int64), and which of them exist; programs of a sample follow each other."""
    blocks = tl.cdiv(rows, BLOCK_N)
    sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return sample.to(tl.int64), row, row < rows


@triton.jit
def load_tile(pointers, present, channel, DIM: tl.constexpr):
    """Chunk [rows, channels] of the rows that start at ``pointers``, in float32; 0 outside."""
    mask = present[:, None] & (channel < DIM)[None, :]
    return tl.load(pointers[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointers, tile, present, channel, DIM: tl.constexpr):
    mask = present[:, None] & (channel < DIM)[None, :]
    tl.store(pointers[:, None] + channel[None, :], tile, mask=mask)


@triton.jit
def load_vector(affine_ptr, which: tl.constexpr, channel, DIM: tl.constexpr):
    """Chunk [1, channels] of one row of the affine tensor; 0 outside."""
    return tl.load(affine_ptr + which * DIM + channel, mask=channel < DIM, other=0.0)[None, :]


@triton.jit
def store_column_sums(partial_ptr, tile, channel, DIM: tl.constexpr):
    """The tile's sum over its rows, to be added up over programs by one torch.sum: no atomics."""
    tl.store(partial_ptr + channel, tl.sum(tile, axis=0), mask=channel < DIM)


@triton.jit
def merge_statistics(mean, squares, tile, start, channel, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mean and sum of squared deviations of ``start`` channels, extended by one more chunk (Chan's update)."""
    seen = start * 1.0
    added = tl.minimum(DIM - start, BLOCK_D) * 1.0
    present = (channel < DIM)[None, :]
    tile_mean = tl.sum(tl.where(present, tile, 0.0), axis=1) / added
    deviation = tl.where(present, tile - tile_mean[:, None], 0.0)
    step = tile_mean - mean
    share = added / (seen + added)
    return mean + step * share, squares + tl.sum(deviation * deviation, axis=1) + step * step * seen * share


@triton.jit
def gather(
    weight_rows, present, matrix_ptr, channel,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, KEPT_ONLY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[rows, COLUMNS] @ [COLUMNS, channels] in float32; KEPT_ONLY reads a dropped (negative) weight as 0."""
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, COLUMNS, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < COLUMNS
        weights = tl.load(weight_rows[:, None] + column[None, :], mask=present[:, None] & inside[None, :], other=0.0)
        if KEPT_ONLY:
            weights = tl.where(weights < 0, 0.0, weights)
        mask = inside[:, None] & (channel < DIM)[None, :]
        matrix = tl.load(matrix_ptr + column[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
        total = tl.dot(weights.to(matrix.dtype), matrix, total, input_precision=PRECISION)
    return total


@triton.jit
def load_query(x_rows, positions_ptr, affine_ptr, mean, rstd, row, present, channel, DIM: tl.constexpr):
    """Chunk [rows, channels] of LN(x) + pos."""
    normed = (load_tile(x_rows, present, channel, DIM) - mean[:, None]) * rstd[:, None]
    scaled = normed * load_vector(affine_ptr, NORM_WEIGHT, channel, DIM)
    shift = load_vector(affine_ptr, NORM_BIAS, channel, DIM)
    return scaled + shift + load_tile(positions_ptr + row * DIM, present, channel, DIM)


@triton.jit
def softmax_by_head(scores, GROUP: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Softmax of [rows, GROUP * WORDS] within each head's words; a head without a word to look at gives zeros."""
    scores = tl.reshape(scores, (BLOCK_N, GROUP, WORDS))
    largest = tl.max(scores, axis=2)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp(scores - largest[:, :, None])
    total = tl.sum(weights, axis=2)
    weights = weights / tl.where(total == 0.0, 1.0, total)[:, :, None]
    return tl.reshape(weights, (BLOCK_N, GROUP * WORDS))


@triton.jit
def branch_bits(seed_ptr, sample, rows, row, start, DIM: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which of the branch's BLOCK_D channels from ``start`` on are dropped, from (sample, row, channel) alone: bits
    [rows, BLOCK_D / 4] of :func:`.common.drop_bits`. Every row begins with a group of its own."""
    group = start // 4 + tl.arange(0, BLOCK_D // 4)
    index = (sample * rows + row)[:, None] * ((DIM + 3) // 4) + group[None, :]
    return drop_bits(tl.load(seed_ptr + BRANCH_SEED), index, DROPOUT)


@triton.jit
def kept_scale(bits, DROPOUT: tl.constexpr):
    """What dropout multiplies [rows, channels] by, from their bits: 0 or 1 / (1 - p)."""
    scale: tl.constexpr = 1.0 / (1.0 - DROPOUT) if DROPOUT < 1.0 else 0.0
    return tl.where(spread_bits(bits), 0.0, scale)


@triton.jit
def load_statistics(statistics_ptr, pixel, present, which: tl.constexpr):
    """Mean and reciprocal deviation of one norm; 0 for pixels that do not exist, so that they add nothing to sums."""
    mean = tl.load(statistics_ptr + pixel * 4 + which, mask=present, other=0.0)
    return mean, tl.load(statistics_ptr + pixel * 4 + which + 1, mask=present, other=0.0)


@triton.jit
def norm_backward(d_normed, normed, rstd, level, slope, DIM: tl.constexpr):
    """Gradient of a LayerNorm's input, given each row's sums of ``d_normed`` and of ``d_normed * normed``."""
    return rstd[:, None] * (d_normed - level[:, None] / DIM - normed * (slope / DIM)[:, None])
