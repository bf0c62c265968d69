"""Multi-scale deformable attention: softmax, places and bilinear samples in one kernel, and the sum alone is stored.

    w_j   = softmax(logits)_j                              j = (level s, point p), J = S P of them
    place = reference * (W_s, H_s) - 1/2 + offset_j        in pixels of level s, pixel centres at whole numbers
    out   = sum_j w_j * (four pixels round place_j, bilinear; 0 outside the map)

value (B, M, H, D), offsets (B, Q, H, S, P, 2), logits (B, Q, H, J), reference points (Q, 2) in float32; out
(B, Q, H, D). One program computes some queries of one head. Kept for backward: the inputs. Against ``grid_sample``,
neither samples (J times the output) nor grids nor a copy of the maps are written, read or kept. The backward pass is
in :mod:`.deformable_attention_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import choose
from .deformable_attention_backward import deformable_gradients
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


@triton.jit(do_not_specialize=SIZES)
def _samples_kernel(
    out_ptr,  # [B, Q, H, D]
    value_ptr,  # [B, M, H, D]
    points_ptr,  # [Q, 2] float32
    offsets_ptr,  # [B, Q, H, J, 2]
    logits_ptr,  # [B, Q, H, J]
    levels_ptr,  # [S, 4] int32: height, width, first pixel, first cell
    queries,
    pixels,
    heads,
    width,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_Q)
    group = (tl.program_id(0) // tiles).to(tl.int64)  # a sample's head
    query = (tl.program_id(0) % tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)
    asked = query < queries
    row = (group // heads * queries + query) * heads + group % heads  # [BLOCK_Q]
    values = value_ptr + (group // heads * pixels * heads + group % heads) * width
    weights = softmax_of(logits_ptr, row, asked, LEVELS * POINTS, SAMPLES)
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for sample in range(LEVELS * POINTS):
        level = levels_ptr + sample // POINTS * 4
        high, wide, first = tl.load(level), tl.load(level + 1), tl.load(level + 2)
        x, y = place_of(points_ptr, offsets_ptr, row * (LEVELS * POINTS) + sample, query, asked, high, wide)
        left, right = near(x)
        upper, lower = near(y)
        weight = taken(weights, sample, SAMPLES)
        for corner in tl.static_range(4):
            at_x = left + corner % 2
            at_y = upper + corner // 2
            share = weight * (right if corner % 2 else 1.0 - right) * (lower if corner // 2 else 1.0 - lower)
            total += share[:, None] * row_at(values, at_x, at_y, high, wide, first, heads, width, channel, asked)
    inside = asked[:, None] & (channel < width)[None, :]
    tl.store(out_ptr + row[:, None] * width + channel[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("fastris::deformable_attention", mutates_args=())
def _deformable(value: Tensor, points: Tensor, offsets: Tensor, logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """``sizes``: height and width of each level, one behind the other."""
    batch, queries, heads, levels, number, _ = offsets.shape
    out = torch.empty((batch, queries, heads, value.shape[-1]), dtype=value.dtype, device=value.device)
    if out.numel():
        config = choose(_samples_kernel, query_config(value.dtype), value.device, value.dtype, batch * queries)
        grid = (batch * heads * triton.cdiv(queries, config["BLOCK_Q"]),)
        tensors = (value.contiguous(), points.contiguous(), offsets.contiguous(), logits.contiguous())
        counts = (queries, value.shape[1], heads, value.shape[-1])
        constants = (levels, number, *tile_sizes(levels * number, value.shape[-1]))
        table = level_table(sizes, value.device)
        launch(_samples_kernel, grid, out, *tensors, table, *counts, *constants, config=config)
    return out


@_deformable.register_fake
def _(value: Tensor, points: Tensor, offsets: Tensor, logits: Tensor, sizes: Sequence[int]) -> Tensor:
    return value.new_empty((*logits.shape[:3], value.shape[-1]))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.level_sizes = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, upstream: Tensor):
    value, points, offsets, logits = ctx.saved_tensors
    found = deformable_gradients(upstream, value, points, offsets, logits, ctx.level_sizes, ctx.needs_input_grad[0])
    wanted = (gradient if needed else None for gradient, needed in zip(found, ctx.needs_input_grad, strict=False))
    return (*wanted, None)


_deformable.register_autograd(_backward, setup_context=_setup_context)


def deformable_attention(
    value: Tensor, points: Tensor, offsets: Tensor, logits: Tensor, sizes: Sequence[tuple[int, int]]
) -> Tensor:
    """(B, Q, H, D) in value's dtype; ``points`` (Q, 2) in float32, offsets and logits in any dtype of the kernels."""
    return _deformable(value, points, offsets, logits, [number for size in sizes for number in size])
