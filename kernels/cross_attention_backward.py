"""Backward of the absorbed cross-attention sub-layer, in three kernels around two batched matrix products.

* branch: from the answer's gradient dy through dropout and the second LN to dO (B, N, D), the gradient of P V + bo.
* weights: dP = dO V^T, then dropout and softmax: the gradient dS (B, N, heads * L) of the scores.
* query: dq = dS K, the first LN and the residual: dx. It also writes q, which the forward pass never did.

dV = P^T dO and dK = dS^T q are left to ``torch.bmm``. A LayerNorm's backward needs two sums over a whole row before its
first channel can be written, so the branch and query kernels multiply twice, as the forward pass does. The vectors'
gradients are float32 sums over one program's pixels, added up by one ``torch.sum``: the same bits on every run.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .common import dot_precision
from .configs import Config, choose, device_class
from .cross_attention_tiles import (
    NORM,
    NORM_BIAS,
    NORM_WEIGHT,
    OUT_BIAS,
    POST,
    POST_WEIGHT,
    as_rows,
    branch_bits,
    gather,
    head_group,
    in_layout_of,
    kept_scale,
    load_statistics,
    load_tile,
    load_vector,
    norm_backward,
    row_block,
    store_column_sums,
    store_tile,
)
from .launch import launch

# (shared-memory class, bytes per element of the products' dtype) -> launch.
FEWER_ROWS = (
    Config((("BLOCK_N", 16), ("BLOCK_D", 64), ("BLOCK_K", 64)), num_warps=4, num_stages=2),
    Config((("BLOCK_N", 16), ("BLOCK_D", 64), ("BLOCK_K", 128)), num_warps=4, num_stages=2),
)
# With steps of 128 columns builds of CRIS's 17 words spilled on sm_80 and sm_86, with 32 rows others on sm_120.
_HALF = Config((("BLOCK_N", 32), ("BLOCK_D", 64), ("BLOCK_K", 64)), num_warps=8, num_stages=2, alternatives=FEWER_ROWS)
_SIXTEEN_ROWS = replace(FEWER_ROWS[0], alternatives=(replace(_HALF, alternatives=()),))
ROWS = {
    ("large", 2): _HALF,
    ("small", 2): _SIXTEEN_ROWS,
    ("tiny", 2): Config((("BLOCK_N", 32), ("BLOCK_D", 64), ("BLOCK_K", 64)), num_warps=8, num_stages=2),
    ("large", 4): Config((("BLOCK_N", 32), ("BLOCK_D", 32), ("BLOCK_K", 32)), num_warps=8, num_stages=2),
    ("small", 4): Config((("BLOCK_N", 32), ("BLOCK_D", 32), ("BLOCK_K", 32)), num_warps=8, num_stages=2),
    ("tiny", 4): Config((("BLOCK_N", 32), ("BLOCK_D", 32), ("BLOCK_K", 32)), num_warps=8, num_stages=2),
}
# With 32 rows of float32 Triton 3.6 spilled on sm_80.
_SINGLE = Config((("BLOCK_N", 16), ("BLOCK_D", 32), ("BLOCK_K", 32)), num_warps=4, num_stages=2)
BRANCH = {**ROWS, ("large", 4): _SINGLE, ("small", 4): _SINGLE}
# On sm_90 the query's gradient takes 16 rows: with 32 it spilled for 77 words. On gfx1100 Triton 3.6 unrolled the four
# steps of 16 words, and spilled.
_NARROW_STEPS = Config((("BLOCK_N", 32), ("BLOCK_D", 32), ("BLOCK_K", 16)), num_warps=8, num_stages=2)
QUERY = {**ROWS, ("large", 2): _SIXTEEN_ROWS, ("tiny", 4): _NARROW_STEPS}
_FEWER_WARPS = Config((("BLOCK_N", 32), ("BLOCK_D", 64)), num_warps=4, num_stages=2)
_HALF_WEIGHTS = Config((("BLOCK_N", 32), ("BLOCK_D", 64)), num_warps=8, num_stages=2, alternatives=(_FEWER_WARPS,))
WEIGHTS = {
    ("large", 2): _HALF_WEIGHTS,
    ("small", 2): _HALF_WEIGHTS,
    ("tiny", 2): Config((("BLOCK_N", 32), ("BLOCK_D", 64)), num_warps=8, num_stages=2),
    ("large", 4): Config((("BLOCK_N", 32), ("BLOCK_D", 32)), num_warps=8, num_stages=2),
    ("small", 4): Config((("BLOCK_N", 32), ("BLOCK_D", 32)), num_warps=8, num_stages=2),
    ("tiny", 4): Config((("BLOCK_N", 32), ("BLOCK_D", 32)), num_warps=8, num_stages=2),
}


@triton.jit(do_not_specialize=("rows",))
def _branch_backward_kernel(
    d_gathered_ptr, partial_ptr, upstream_ptr, weights_ptr, values_ptr, affine_ptr, statistics_ptr, seeds_ptr,
    stride_b, stride_n, rows,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS_DROPPED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dO of BLOCK_N pixels, and this program's share of the gradients of bo and of the second norm's vectors."""
    sample, row, present = row_block(rows, BLOCK_N)
    pixel = sample * rows + row
    mean, rstd = load_statistics(statistics_ptr, pixel, present, POST)
    weight_rows = weights_ptr + pixel * COLUMNS
    values_ptr += sample * COLUMNS * DIM
    upstream_rows = upstream_ptr + sample * stride_b + row * stride_n
    partial_ptr += tl.program_id(0).to(tl.int64) * 3 * DIM
    level = tl.zeros((BLOCK_N,), tl.float32)
    slope = tl.zeros((BLOCK_N,), tl.float32)
    ONE_DRAW: tl.constexpr = DIM <= 32 * BLOCK_D  # then the first walk's steps leave their mask, four bits each
    TWO_WORDS: tl.constexpr = DIM > 16 * BLOCK_D
    masks = tl.zeros((BLOCK_N, BLOCK_D // 4), tl.int64)
    more_masks = masks
    for walk in tl.static_range(2):
        for start in range(0, DIM, BLOCK_D):
            channel = start + tl.arange(0, BLOCK_D)
            gathered = gather(
                weight_rows, present, values_ptr, channel,
                DIM, COLUMNS, WEIGHTS_DROPPED, PRECISION, BLOCK_N, BLOCK_D, BLOCK_K,
            ) + load_vector(affine_ptr, OUT_BIAS, channel, DIM)  # fmt: skip
            normed = (gathered - mean[:, None]) * rstd[:, None]
            d_branch = load_tile(upstream_rows, present, channel, DIM)
            if DROPOUT > 0:
                place = start // BLOCK_D % 16 * 4
                first_word = start < 16 * BLOCK_D
                if walk == 0 or not ONE_DRAW:
                    bits = branch_bits(seeds_ptr, sample, rows, row, start, DIM, DROPOUT, BLOCK_D)
                    word = bits.to(tl.int64) << place
                    masks |= tl.where(first_word, word, 0) if TWO_WORDS else word
                    more_masks |= tl.where(first_word, 0, word) if TWO_WORDS else word
                else:
                    word = tl.where(first_word, masks, more_masks) if TWO_WORDS else masks
                    bits = (word >> place).to(tl.int32)
                d_branch *= kept_scale(bits, DROPOUT)
            d_normed = d_branch * load_vector(affine_ptr, POST_WEIGHT, channel, DIM)
            if walk == 0:
                level += tl.sum(d_normed, axis=1)
                slope += tl.sum(d_normed * normed, axis=1)
            else:
                d_gathered = norm_backward(d_normed, normed, rstd, level, slope, DIM)
                store_tile(d_gathered_ptr + pixel * DIM, d_gathered, present, channel, DIM)
                store_column_sums(partial_ptr, d_gathered, channel, DIM)
                store_column_sums(partial_ptr + DIM, d_branch * normed, channel, DIM)
                store_column_sums(partial_ptr + 2 * DIM, d_branch, channel, DIM)


@triton.jit(do_not_specialize=("rows",))
def _weights_backward_kernel(
    d_scores_ptr, d_gathered_ptr, weights_ptr, values_ptr, rows,
    DIM: tl.constexpr, HEADS: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dS of BLOCK_N pixels for GROUP heads: dO V^T, dropout, softmax."""
    sample, row, present = row_block(rows, BLOCK_N)
    pixel = sample * rows + row
    column = tl.program_id(1) * GROUP * WORDS + tl.arange(0, GROUP * WORDS)
    inside = column < HEADS * WORDS
    value_rows = values_ptr + (sample * HEADS * WORDS + column) * DIM
    d_weights = tl.zeros((BLOCK_N, GROUP * WORDS), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        d_gathered = load_tile(d_gathered_ptr + pixel * DIM, present, channel, DIM)
        mask = inside[None, :] & (channel < DIM)[:, None]
        values = tl.load(value_rows[None, :] + channel[:, None], mask=mask, other=0.0)
        d_weights = tl.dot(d_gathered.to(values.dtype), values, d_weights, input_precision=PRECISION)
    weights = load_tile(weights_ptr + pixel * HEADS * WORDS, present, column, HEADS * WORDS)
    product = tl.where(weights < 0, 0.0, d_weights * weights)
    weights = tl.reshape(tl.abs(weights), (BLOCK_N, GROUP, WORDS))
    product = tl.reshape(product, (BLOCK_N, GROUP, WORDS))
    d_scores = product - weights * tl.sum(product, axis=2)[:, :, None]
    d_scores = tl.reshape(d_scores, (BLOCK_N, GROUP * WORDS))
    store_tile(d_scores_ptr + pixel * HEADS * WORDS, d_scores, present, column, HEADS * WORDS)


@triton.jit(do_not_specialize=("rows",))
def _query_backward_kernel(
    d_x_ptr, query_ptr, d_query_ptr, partial_ptr, upstream_ptr, x_ptr, positions_ptr, d_scores_ptr, keys_ptr,
    affine_ptr, statistics_ptr, stride_b, stride_n, rows,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx and q of BLOCK_N pixels, this program's share of the first norm's gradients, and dq where it is asked for."""
    sample, row, present = row_block(rows, BLOCK_N)
    pixel = sample * rows + row
    mean, rstd = load_statistics(statistics_ptr, pixel, present, NORM)
    row_offset = sample * stride_b + row * stride_n
    keys_ptr += sample * COLUMNS * DIM
    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * DIM
    level = tl.zeros((BLOCK_N,), tl.float32)
    slope = tl.zeros((BLOCK_N,), tl.float32)
    for walk in tl.static_range(2):
        for start in range(0, DIM, BLOCK_D):
            channel = start + tl.arange(0, BLOCK_D)
            d_query = gather(
                d_scores_ptr + pixel * COLUMNS, present, keys_ptr, channel,
                DIM, COLUMNS, False, PRECISION, BLOCK_N, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            normed = (load_tile(x_ptr + row_offset, present, channel, DIM) - mean[:, None]) * rstd[:, None]
            norm_weight = load_vector(affine_ptr, NORM_WEIGHT, channel, DIM)
            d_normed = d_query * norm_weight
            if walk == 0:
                level += tl.sum(d_normed, axis=1)
                slope += tl.sum(d_normed * normed, axis=1)
            else:
                d_x = norm_backward(d_normed, normed, rstd, level, slope, DIM)
                d_x += load_tile(upstream_ptr + row_offset, present, channel, DIM)
                store_tile(d_x_ptr + row_offset, d_x, present, channel, DIM)
                query = normed * norm_weight + load_vector(affine_ptr, NORM_BIAS, channel, DIM)
                query += load_tile(positions_ptr + row * DIM, present, channel, DIM)
                store_tile(query_ptr + pixel * DIM, query, present, channel, DIM)
                if d_query_ptr is not None:
                    store_tile(d_query_ptr + pixel * DIM, d_query, present, channel, DIM)
                store_column_sums(partial_ptr, d_query * normed, channel, DIM)
                store_column_sums(partial_ptr + DIM, d_query, channel, DIM)


@torch.library.custom_op("fastris::cross_attention_branch_backward", mutates_args=())
def branch_backward(
    upstream: Tensor,
    weights: Tensor,
    values: Tensor,
    affine: Tensor,
    statistics: Tensor,
    seeds: Tensor | None,
    dropout: float,
    attention_dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dO (B, N, D), dS (B, N, heads * L) and the gradients (3, D) of bo, the second norm's weight and its bias."""
    upstream = as_rows(upstream)
    batch, rows, dim = upstream.shape
    heads, words = values.shape[1:3]
    d_gathered = values.new_empty(batch, rows, dim)
    d_scores = torch.empty_like(weights)
    kind = device_class(values.device), values.dtype.itemsize
    precision = dot_precision(values.dtype)
    config = choose(_branch_backward_kernel, BRANCH[kind], values.device, values.dtype, batch * rows)
    blocks = batch * triton.cdiv(rows, config["BLOCK_N"])
    partial = affine.new_empty(blocks, 3, dim)
    if blocks == 0:
        return d_gathered, d_scores, partial.sum(0)
    launch(
        _branch_backward_kernel, (blocks,),
        d_gathered, partial, upstream, weights, values, affine, statistics, seeds, *upstream.stride()[:2], rows,
        DIM=dim, COLUMNS=heads * words, WEIGHTS_DROPPED=attention_dropout > 0, DROPOUT=dropout,
        PRECISION=precision, config=config,
    )  # fmt: skip
    group = head_group(heads, words, values.dtype)
    config = choose(_weights_backward_kernel, WEIGHTS[kind], values.device, values.dtype, batch * rows)
    launch(
        _weights_backward_kernel, (batch * triton.cdiv(rows, config["BLOCK_N"]), triton.cdiv(heads, group)),
        d_scores, d_gathered, weights, values, rows,
        DIM=dim, HEADS=heads, WORDS=words, GROUP=group, PRECISION=precision, config=config,
    )  # fmt: skip
    return d_gathered, d_scores, partial.sum(0)


@branch_backward.register_fake
def _(upstream, weights, values, affine, statistics, seeds, dropout, attention_dropout):
    return values.new_empty(upstream.shape), torch.empty_like(weights), affine.new_empty(3, upstream.shape[2])


@torch.library.custom_op("fastris::cross_attention_query_backward", mutates_args=())
def query_backward(
    upstream: Tensor,
    x: Tensor,
    positions: Tensor,
    keys: Tensor,
    affine: Tensor,
    statistics: Tensor,
    d_scores: Tensor,
    need_d_query: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, q (B, N, D), dq (B, N, D) in float32 or empty, the gradients (2, D) of the first norm's weight and bias."""
    x, positions = as_rows(x), positions.contiguous()
    upstream = in_layout_of(upstream, x)
    batch, rows, dim = x.shape
    config = QUERY[device_class(keys.device), keys.dtype.itemsize]
    config = choose(_query_backward_kernel, config, keys.device, keys.dtype, batch * rows)
    d_x, query = torch.empty_like(x), keys.new_empty(batch, rows, dim)
    d_query = affine.new_empty((batch, rows, dim) if need_d_query else 0)
    blocks = batch * triton.cdiv(rows, config["BLOCK_N"])
    partial = affine.new_empty(blocks, 2, dim)
    if blocks:
        launch(
            _query_backward_kernel, (blocks,),
            d_x, query, d_query if need_d_query else None, partial, upstream, x, positions, d_scores, keys,
            affine, statistics, *x.stride()[:2], rows,
            DIM=dim, COLUMNS=keys.shape[1] * keys.shape[2], PRECISION=dot_precision(keys.dtype), config=config,
        )  # fmt: skip
    return d_x, query, d_query, partial.sum(0)


@query_backward.register_fake
def _(upstream, x, positions, keys, affine, statistics, d_scores, need_d_query):
    d_query = affine.new_empty(x.shape if need_d_query else 0)
    return torch.empty_like(as_rows(x)), keys.new_empty(x.shape), d_query, affine.new_empty(2, x.shape[2])


@register_flop_formula(torch.ops.fastris.cross_attention_branch_backward)
def _(upstream, weights, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(upstream) * weights[2]  # dP; what is multiplied twice counts once


@register_flop_formula(torch.ops.fastris.cross_attention_query_backward)
def _(upstream, x, positions, keys, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(x) * keys[1] * keys[2]
