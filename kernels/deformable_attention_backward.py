"""The backward pass of deformable attention, without atomics: every run gives the same bits.

With g the gradient of a query's sum (of one head) and v_c the four pixels round a sample:

    dots_c    = g . v_c                                            a slope along x and y, and the sample times g, follow
    d_weight  = bilinear(dots), d_place = w * (slope of bilinear(dots)), d_logits = w (d_weight - sum_j w_j d_weight_j)
    d_value_p = sum over the samples that read pixel p of (w * bilinear factor) g

The first kernel finds what belongs to queries, and writes each sample's weight, fractions and cell: the pixel to the
upper left, of maps with one more row and column. The cells are sorted (stably, by PyTorch); the second kernel sums, for
each pixel, over the samples in the four cells that it is a corner of, in the sorted order. Between them live 24 bytes
a sample, and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, choose
from .deformable_attention_tiles import (
    SIZES,
    level_table,
    near,
    place_of,
    query_config,
    row_at,
    softmax_of,
    taken,
    tile_sizes,
)
from .launch import launch

PIXEL_SIZES = (*SIZES, "cells")
PIXEL_CONFIG = Config((("BLOCK_P", 16),), 4, 1, (Config((("BLOCK_P", 8),), 2, 1), Config((("BLOCK_P", 4),), 1, 1)))


@triton.jit(do_not_specialize=(*SIZES, "cells"))
def _query_backward_kernel(
    d_offsets_ptr,  # [B, Q, H, J, 2] float32
    d_logits_ptr,  # [B, Q, H, J]
    cell_ptr,  # [B, Q, H, J] int32
    shares_ptr,  # [B, Q, H, J, 3] float32: weight, and how far right and down in the cell
    upstream_ptr,  # [B, Q, H, D]
    value_ptr,
    points_ptr,
    offsets_ptr,
    logits_ptr,
    levels_ptr,  # [S, 4] int32
    queries,
    pixels,
    heads,
    width,
    cells,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_Q)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    query = (tl.program_id(0) % tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)
    asked = query < queries
    row = (group // heads * queries + query) * heads + group % heads
    values = value_ptr + (group // heads * pixels * heads + group % heads) * width
    inside = asked[:, None] & (channel < width)[None, :]
    upstream = tl.load(upstream_ptr + row[:, None] * width + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    weights = softmax_of(logits_ptr, row, asked, LEVELS * POINTS, SAMPLES)
    d_weights = tl.zeros((BLOCK_Q, SAMPLES), tl.float32)
    for sample in range(LEVELS * POINTS):
        level = levels_ptr + sample // POINTS * 4
        high, wide, first = tl.load(level), tl.load(level + 1), tl.load(level + 2)
        index = row * (LEVELS * POINTS) + sample
        x, y = place_of(points_ptr, offsets_ptr, index, query, asked, high, wide)
        left, right = near(x)
        upper, lower = near(y)
        weight = taken(weights, sample, SAMPLES)
        at = upstream * row_at(values, left, upper, high, wide, first, heads, width, channel, asked)
        next_to = upstream * row_at(values, left + 1, upper, high, wide, first, heads, width, channel, asked)
        below = upstream * row_at(values, left, upper + 1, high, wide, first, heads, width, channel, asked)
        across = upstream * row_at(values, left + 1, upper + 1, high, wide, first, heads, width, channel, asked)
        d_at = tl.sum(at, axis=1)
        slope_above = tl.sum(next_to, axis=1) - d_at
        d_below = tl.sum(below, axis=1)
        slope_below = tl.sum(across, axis=1) - d_below
        above_sum = d_at + right * slope_above
        slope_down = d_below + right * slope_below - above_sum
        d_weight = above_sum + lower * slope_down
        d_x = weight * (slope_above + lower * (slope_below - slope_above))
        tl.store(d_offsets_ptr + index * 2, d_x, mask=asked)
        tl.store(d_offsets_ptr + index * 2 + 1, weight * slope_down, mask=asked)
        d_weights = tl.where((tl.arange(0, SAMPLES) == sample)[None, :], d_weight[:, None], d_weights)
        within = (left >= -1) & (left < wide) & (upper >= -1) & (upper < high)
        cell = tl.load(level + 3) + (upper + 1) * (wide + 1) + left + 1
        cell = tl.where(within, group.to(tl.int32) * cells + cell, 2147483647)
        tl.store(cell_ptr + index, cell, mask=asked)
        tl.store(shares_ptr + index * 3, weight, mask=asked)
        tl.store(shares_ptr + index * 3 + 1, right, mask=asked)
        tl.store(shares_ptr + index * 3 + 2, lower, mask=asked)
    sample = tl.arange(0, SAMPLES)
    mean = tl.sum(weights * d_weights, axis=1)
    d_logits = (weights * (d_weights - mean[:, None])).to(d_logits_ptr.dtype.element_ty)
    inside = asked[:, None] & (sample < LEVELS * POINTS)[None, :]
    tl.store(d_logits_ptr + row[:, None] * (LEVELS * POINTS) + sample[None, :], d_logits, mask=inside)


@triton.jit(do_not_specialize=PIXEL_SIZES)
def _pixel_backward_kernel(
    d_value_ptr,  # [B, M, H, D]
    upstream_ptr,  # [B, Q, H, D]
    order_ptr,  # [N] int64: the samples, sorted by cell
    starts_ptr,  # [B * H * cells + 1] int32: where each cell's begin among them
    shares_ptr,  # [N, 3] float32
    corner_ptr,  # [M] int32: the cell to the upper left of each pixel
    span_ptr,  # [M] int32: how many cells further the row below begins
    queries,
    pixels,
    heads,
    width,
    cells,
    count,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tiles = tl.cdiv(pixels, BLOCK_P)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_D)
    real = pixel < pixels
    corner = group * cells + tl.load(corner_ptr + pixel, mask=real, other=0)
    span = tl.load(span_ptr + pixel, mask=real, other=0)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for which in tl.static_range(
        4
    ):  # the pixel is the lower right corner of the first cell, the upper left of the last
        cell = corner + which % 2 + which // 2 * span
        start = tl.load(starts_ptr + cell, mask=real, other=0)
        end = tl.load(starts_ptr + cell + 1, mask=real, other=0)
        for step in range(tl.max(end - start)):
            there = start + step < end
            sample = tl.load(order_ptr + start + step, mask=there, other=0)
            weight = tl.load(shares_ptr + sample * 3, mask=there, other=0.0)
            right = tl.load(shares_ptr + sample * 3 + 1, mask=there, other=0.0)
            lower = tl.load(shares_ptr + sample * 3 + 2, mask=there, other=0.0)
            share = weight * (1.0 - right if which % 2 else right) * (1.0 - lower if which // 2 else lower)
            rows = upstream_ptr + (sample // count)[:, None] * width + channel[None, :]
            inside = there[:, None] & (channel < width)[None, :]
            total += share[:, None] * tl.load(rows, mask=inside, other=0.0).to(tl.float32)
    row = (group // heads * pixels + pixel) * heads + group % heads
    inside = real[:, None] & (channel < width)[None, :]
    tl.store(d_value_ptr + row[:, None] * width + channel[None, :], total.to(d_value_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("fastris::deformable_attention_backward", mutates_args=())
def _gradients(
    upstream: Tensor,
    value: Tensor,
    points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    sizes: Sequence[int],
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, queries, heads, levels, number, _ = offsets.shape
    upstream, value = upstream.contiguous(), value.contiguous()
    d_offsets = torch.empty(offsets.shape, dtype=torch.float32, device=value.device)
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=value.device)
    cell = torch.empty(logits.shape, dtype=torch.int32, device=value.device)
    shares = torch.empty((*logits.shape, 3), dtype=torch.float32, device=value.device)
    table = level_table(sizes, value.device)
    cells = sum((height + 1) * (width + 1) for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    if upstream.numel():
        config = choose(_query_backward_kernel, query_config(value.dtype), value.device, value.dtype, batch * queries)
        grid = (batch * heads * triton.cdiv(queries, config["BLOCK_Q"]),)
        tensors = (upstream, value, points.contiguous(), offsets.contiguous(), logits.contiguous())
        counts = (queries, value.shape[1], heads, value.shape[-1], cells)
        constants = (levels, number, *tile_sizes(levels * number, value.shape[-1]))
        written = (d_offsets, d_logits, cell, shares)
        launch(_query_backward_kernel, grid, *written, *tensors, table, *counts, *constants, config=config)
    d_value = _value_gradient(upstream, value, cell, shares, sizes, cells) if need_value else value.new_empty(0)
    d_points = (d_offsets.sum((0, 2, 4)) * table[:, :2].flip(1)).sum(1)
    return d_value, d_points, d_offsets.to(offsets.dtype), d_logits


@_gradients.register_fake
def _(upstream, value, points, offsets, logits, sizes, need_value):
    d_value = value.new_empty(value.shape if need_value else 0)
    return d_value, points.new_empty(points.shape), offsets.new_empty(offsets.shape), logits.new_empty(logits.shape)


def deformable_gradients(
    upstream: Tensor,
    value: Tensor,
    points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    sizes: Sequence[int],
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, which is empty unless needed, points, offsets and logits."""
    return _gradients(upstream, value, points, offsets, logits, sizes, need_value)


def _value_gradient(
    upstream: Tensor, value: Tensor, cell: Tensor, shares: Tensor, sizes: Sequence[int], cells: int
) -> Tensor:
    batch, pixels, heads, width = value.shape
    d_value = torch.empty_like(value)
    if not d_value.numel():
        return d_value
    found, order = cell.flatten().sort(stable=True)
    bounds = torch.arange(batch * heads * cells + 1, dtype=torch.int32, device=value.device)
    starts = torch.searchsorted(found, bounds, out_int32=True)
    corner, span = _corners(sizes, value.device)
    config = choose(_pixel_backward_kernel, PIXEL_CONFIG, value.device, value.dtype, batch * pixels)
    grid = (batch * heads * triton.cdiv(pixels, config["BLOCK_P"]),)
    counts = (upstream.shape[1], pixels, heads, width, cells, cell.shape[-1])
    tensors = (d_value, upstream, order, starts, shares, corner, span)
    launch(_pixel_backward_kernel, grid, *tensors, *counts, tile_sizes(1, width)[1], config=config)
    return d_value


def _corners(sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """For every pixel: the cell whose lower right corner it is, and the width of a row of cells."""
    corners, spans, first = [], [], 0
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
        corners.append((first + y * (width + 1) + x).flatten())
        spans.append(torch.full((height * width,), width + 1, device=device))
        first += (height + 1) * (width + 1)
    return torch.cat(corners).to(torch.int32), torch.cat(spans).to(torch.int32)
