"""The absorbed cross-attention sub-layer in two kernels: ``x + drop(LN(sum_h drop(softmax(q K_h^T + b_h)) V_h + bo))``.

q = LN(x) + pos. x (B, N, D); pos (N, D); the absorbed text K, V (B, heads * L, D) and b (B, heads * L), as
:mod:`fastris.ops.cross_attention` derives them, with L padded to a bucket so that a new sentence length rarely compiles
a new kernel (b is -inf there); every vector of the sub-layer in one float32 tensor (5, D).

* scores: LN + pos as the prologue of q K^T, softmax within each head, dropout; writes the weights P (B, N, heads * L).
* output: P V + bo, LN, dropout, residual; writes (B, N, D).

Neither q, nor the scores, nor the branch before or behind its LN is ever written: of the published formula's
activations of size (B, N, D), only x is read and the answer written.

Kept for the backward pass: x, P, and four floats per pixel (mean and deviation of both norms). Dropout of the weights
flips the sign of a dropped P, which loses nothing since softmax has no negative ones; the branch's mask is drawn again.
A D-wide row does not fit the registers, so the output kernel multiplies P V twice: for the norm's statistics, and to
apply them. P and V come from the cache the second time, and nothing goes through memory between the two.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .common import dot_precision, drop_bits, drop_threshold, philox_of_four, spread_bits
from .configs import Config, choose, device_class
from .cross_attention_backward import FEWER_ROWS, ROWS, branch_backward, query_backward
from .cross_attention_tiles import (
    BRANCH_SEED,
    NORM,
    OUT_BIAS,
    POST,
    POST_BIAS,
    POST_WEIGHT,
    WEIGHTS_SEED,
    as_rows,
    branch_bits,
    gather,
    head_group,
    kept_scale,
    load_query,
    load_tile,
    load_vector,
    merge_statistics,
    row_block,
    softmax_by_head,
    store_tile,
)
from .launch import launch

BUCKETS = (16, 32, 64, 128)  # padded sentence lengths; 16 is the narrowest tile of tl.dot
KEPT = Config((("BLOCK", 1024),), num_warps=4, num_stages=1)
# (shared-memory class, bytes per element of the products' dtype) -> launch.
_FEWER_WARPS = Config((("BLOCK_N", 32), ("BLOCK_D", 64)), num_warps=8, num_stages=2)
_HALF = Config((("BLOCK_N", 32), ("BLOCK_D", 64)), num_warps=16, num_stages=2, alternatives=(_FEWER_WARPS,))
SCORES = {
    ("large", 2): _HALF,
    ("small", 2): _HALF,
    ("tiny", 2): Config((("BLOCK_N", 32), ("BLOCK_D", 32)), num_warps=8, num_stages=2),
    ("large", 4): Config((("BLOCK_N", 32), ("BLOCK_D", 32)), num_warps=8, num_stages=2),
    ("small", 4): Config((("BLOCK_N", 32), ("BLOCK_D", 32)), num_warps=8, num_stages=2),
    ("tiny", 4): Config((("BLOCK_N", 16), ("BLOCK_D", 32)), num_warps=8, num_stages=2),
}
# Steps of 128 columns spilled under Triton 3.6 on sm_90 and sm_100.
OUTPUT = {**ROWS, ("large", 2): replace(ROWS["large", 2], alternatives=FEWER_ROWS[:1])}
# 8 warps spilled them under Triton 3.6 on sm_100.
FEW_COLUMNS = 128


def output_config(kind: tuple[str, int], columns: int) -> Config:
    return replace(OUTPUT[kind], num_warps=16) if columns <= FEW_COLUMNS and kind == ("large", 2) else OUTPUT[kind]


@triton.jit(do_not_specialize=("rows",))
def _scores_kernel(
    weights_ptr, statistics_ptr, x_ptr, positions_ptr, keys_ptr, key_bias_ptr, affine_ptr, seeds_ptr,
    stride_b, stride_n, rows, eps,
    DIM: tl.constexpr, HEADS: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Signed attention weights of BLOCK_N pixels for GROUP heads: LN, + pos, q K^T + b, softmax, dropout."""
    sample, row, present = row_block(rows, BLOCK_N)
    column = tl.program_id(1) * GROUP * WORDS + tl.arange(0, GROUP * WORDS)
    inside = column < HEADS * WORDS
    x_rows = x_ptr + sample * stride_b + row * stride_n

    mean = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        x = load_tile(x_rows, present, channel, DIM)
        mean, squares = merge_statistics(mean, squares, x, start, channel, DIM, BLOCK_D)
    rstd = 1.0 / tl.sqrt(squares / DIM + eps)

    scores = tl.zeros((BLOCK_N, GROUP * WORDS), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        query = load_query(x_rows, positions_ptr, affine_ptr, mean, rstd, row, present, channel, DIM)
        key_rows = keys_ptr + (sample * HEADS * WORDS + column) * DIM
        keys = tl.load(key_rows[None, :] + channel[:, None], mask=inside[None, :] & (channel < DIM)[:, None], other=0.0)
        scores = tl.dot(query.to(keys.dtype), keys, scores, input_precision=PRECISION)
    bias = tl.load(key_bias_ptr + sample * HEADS * WORDS + column, mask=inside, other=float("-inf"))
    weights = softmax_by_head(scores + bias[None, :], GROUP, WORDS, BLOCK_N)
    if DROPOUT > 0:
        group = tl.program_id(1) * GROUP * (WORDS // 4) + tl.arange(0, GROUP * WORDS // 4)  # four words each
        head, word = group // (WORDS // 4), group % (WORDS // 4)
        index = ((sample * HEADS + head)[None, :] * rows + row[:, None]) * (WORDS // 4) + word[None, :]
        dropped = spread_bits(drop_bits(tl.load(seeds_ptr + WEIGHTS_SEED), index, DROPOUT))
        weights = tl.where(dropped, -weights, weights)

    pixel = sample * rows + row
    store_tile(weights_ptr + pixel * HEADS * WORDS, weights, present, column, HEADS * WORDS)
    if tl.program_id(1) == 0:
        tl.store(statistics_ptr + pixel * 4 + NORM, mean, mask=present)
        tl.store(statistics_ptr + pixel * 4 + NORM + 1, rstd, mask=present)


@triton.jit(do_not_specialize=("rows",))
def _output_kernel(
    y_ptr, statistics_ptr, x_ptr, weights_ptr, values_ptr, affine_ptr, seeds_ptr,
    stride_b, stride_n, rows, eps,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS_DROPPED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N pixels of the answer: P V + bo, LN, dropout, residual."""
    sample, row, present = row_block(rows, BLOCK_N)
    pixel = sample * rows + row
    weight_rows = weights_ptr + pixel * COLUMNS
    values_ptr += sample * COLUMNS * DIM

    row_offset = sample * stride_b + row * stride_n
    mean = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for walk in tl.static_range(2):
        rstd = 1.0 / tl.sqrt(squares / DIM + eps)
        for start in range(0, DIM, BLOCK_D):
            channel = start + tl.arange(0, BLOCK_D)
            gathered = gather(
                weight_rows, present, values_ptr, channel,
                DIM, COLUMNS, WEIGHTS_DROPPED, PRECISION, BLOCK_N, BLOCK_D, BLOCK_K,
            ) + load_vector(affine_ptr, OUT_BIAS, channel, DIM)  # fmt: skip
            if walk == 0:
                mean, squares = merge_statistics(mean, squares, gathered, start, channel, DIM, BLOCK_D)
            else:
                branch = (gathered - mean[:, None]) * rstd[:, None] * load_vector(affine_ptr, POST_WEIGHT, channel, DIM)
                branch += load_vector(affine_ptr, POST_BIAS, channel, DIM)
                if DROPOUT > 0:
                    bits = branch_bits(seeds_ptr, sample, rows, row, start, DIM, DROPOUT, BLOCK_D)
                    branch *= kept_scale(bits, DROPOUT)
                x = load_tile(x_ptr + row_offset, present, channel, DIM)
                store_tile(y_ptr + row_offset, x + branch, present, channel, DIM)
    tl.store(statistics_ptr + pixel * 4 + POST, mean, mask=present)
    tl.store(statistics_ptr + pixel * 4 + POST + 1, 1.0 / tl.sqrt(squares / DIM + eps), mask=present)


@triton.jit(do_not_specialize=("count",))
def _kept_kernel(
    kept_ptr, seeds_ptr, count, WIDTH: tl.constexpr, WHICH: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A dropout mask by itself, for tests: element by element, in a contiguous tensor of rows of WIDTH."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = element % WIDTH
    draws = philox_of_four(tl.load(seeds_ptr + WHICH), element // WIDTH * ((WIDTH + 3) // 4) + place // 4)
    even, odd = tl.where(place % 4 < 2, draws[0], draws[2]), tl.where(place % 4 < 2, draws[1], draws[3])
    bits = tl.where(place % 2 == 0, even, odd)
    THRESHOLD: tl.constexpr = drop_threshold(DROPOUT)
    kept = bits >= THRESHOLD if DROPOUT < 1 else bits < 0
    tl.store(kept_ptr + element, kept, mask=element < count)


@torch.library.custom_op("fastris::cross_attention", mutates_args=())
def _forward(
    x: Tensor,
    positions: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    affine: Tensor,
    seeds: Tensor | None,
    dropout: float,
    attention_dropout: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The answer (B, N, D), the signed weights P (B, N, heads * L) and the norms' statistics (B, N, 4)."""
    x, positions = as_rows(x), positions.contiguous()
    batch, rows, dim = x.shape
    heads, words = keys.shape[1:3]
    y = torch.empty_like(x)
    weights = keys.new_empty(batch, rows, heads * words)
    statistics = affine.new_empty(batch, rows, 4)
    if x.numel() == 0:
        return y, weights, statistics
    kind = device_class(x.device), keys.dtype.itemsize
    group, common = head_group(heads, words, keys.dtype), {"DIM": dim, "PRECISION": dot_precision(keys.dtype)}
    config = choose(_scores_kernel, SCORES[kind], x.device, keys.dtype, batch * rows)
    launch(
        _scores_kernel, (batch * triton.cdiv(rows, config["BLOCK_N"]), triton.cdiv(heads, group)),
        weights, statistics, x, positions, keys, key_bias, affine, seeds, *x.stride()[:2], rows, eps,
        HEADS=heads, WORDS=words, GROUP=group, DROPOUT=attention_dropout, **common, config=config,
    )  # fmt: skip
    config = choose(_output_kernel, output_config(kind, heads * words), x.device, keys.dtype, batch * rows)
    launch(
        _output_kernel, (batch * triton.cdiv(rows, config["BLOCK_N"]),),
        y, statistics, x, weights, values, affine, seeds, *x.stride()[:2], rows, eps,
        COLUMNS=heads * words, WEIGHTS_DROPPED=attention_dropout > 0, DROPOUT=dropout, **common, config=config,
    )  # fmt: skip
    return y, weights, statistics


@_forward.register_fake
def _(x, positions, keys, key_bias, values, affine, seeds, dropout, attention_dropout, eps):
    weights = keys.new_empty(*x.shape[:2], keys.shape[1] * keys.shape[2])
    return torch.empty_like(as_rows(x)), weights, affine.new_empty(*x.shape[:2], 4)


@register_flop_formula(torch.ops.fastris.cross_attention)
def _(x, positions, keys, *_, out_shape=None, **__) -> int:
    return 4 * math.prod(x) * keys[1] * keys[2]  # what is multiplied twice counts once


def _setup_context(ctx, inputs, output) -> None:
    x, positions, keys, _, values, affine, seeds, *ctx.dropouts, _ = inputs
    _, weights, statistics = output
    ctx.save_for_backward(x, positions, keys, values, affine, seeds, weights, statistics)
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *_):
    x, positions, keys, values, affine, seeds, weights, statistics = ctx.saved_tensors
    _, need_positions, need_keys, need_key_bias, need_values, *_ = ctx.needs_input_grad
    d_gathered, d_scores, d_branch = branch_backward(
        upstream, weights, values, affine, statistics, seeds, *ctx.dropouts
    )
    d_x, query, d_query, d_norm = query_backward(
        upstream, x, positions, keys, affine, statistics, d_scores, need_positions
    )
    d_positions = d_query.sum(0).to(positions.dtype) if need_positions else None
    d_keys = torch.bmm(d_scores.mT, query).view_as(keys) if need_keys else None
    d_key_bias = d_scores.sum(1, dtype=affine.dtype).view(keys.shape[:3]) if need_key_bias else None
    d_values = None
    if need_values:
        kept = weights.clamp_min(0) if ctx.dropouts[1] > 0 else weights
        d_values = torch.bmm(kept.mT, d_gathered).view_as(values)
    return d_x, d_positions, d_keys, d_key_bias, d_values, torch.cat([d_norm, d_branch]), None, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def fused_attention(
    x: Tensor,
    positions: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    affine: Tensor,
    dropout: float,
    attention_dropout: float,
    eps: float,
) -> Tensor:
    """The sub-layer's answer (B, N, D) in x's dtype and layout.

    x (B, N, D), positions (N, D); keys and values (B, heads, L, D) in the products' dtype, ``key_bias`` (B, heads, L)
    and ``affine`` (5, D) in float32. ``values`` carry the scale of the weights' dropout.
    """
    seeds = None
    if dropout > 0 or attention_dropout > 0:
        seeds = torch.randint(2**62, (2,), dtype=torch.int64, device=x.device)
    short = _bucket(keys.shape[2]) - keys.shape[2]
    keys, values = (F.pad(rows, (0, 0, 0, short)).contiguous() for rows in (keys, values))
    key_bias = F.pad(key_bias, (0, short), value=float("-inf")).contiguous()
    y, *_ = _forward(x, positions, keys, key_bias, values, affine, seeds, dropout, attention_dropout, eps)
    return y


def _bucket(words: int) -> int:
    """The padded length. Comparisons alone, so that torch.compile guards on the bucket and not on the length."""
    return next(bucket for bucket in BUCKETS if words <= bucket)


def dropout_masks(
    seeds: Tensor, keys_shape: tuple[int, int, int, int], rows: int, dropout: float, attention_dropout: float
) -> tuple[Tensor, Tensor]:
    """The masks that ``seeds`` (2,) stand for, True where kept: weights (B, N, heads, L) and branch (B, N, D).

    ``keys_shape`` is the (B, heads, L, D) given to :func:`fused_attention`.
    """
    batch, heads, words, dim = keys_shape
    weights = _kept(seeds, WEIGHTS_SEED, (batch, heads, rows, _bucket(words)), attention_dropout)
    return weights[..., :words].transpose(1, 2), _kept(seeds, BRANCH_SEED, (batch, rows, dim), dropout)


def _kept(seeds: Tensor, which: tl.constexpr, shape: tuple[int, ...], dropout: float) -> Tensor:
    kept = torch.empty(shape, dtype=torch.uint8, device=seeds.device)
    grid = (triton.cdiv(kept.numel(), KEPT["BLOCK"]),)
    launch(_kept_kernel, grid, kept, seeds, kept.numel(), WIDTH=shape[-1], WHICH=which, DROPOUT=dropout, config=KEPT)
    return kept.bool()
