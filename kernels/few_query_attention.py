"""Few-query attention after absorbing: every pixel is read once for its score and for the mean that it enters.

Shapes: pixels y (B, N, K) with any strides, absorbed queries a (B, R, K) with R = heads * queries rows, the scores of
the positions t (B, R, N); a and t float32. See :mod:`fastris.ops.few_query_attention` for the algebra.

    S = y a^T + t    P = softmax over the N pixels of S    pooled = P y

One program takes a chunk of a sample's pixels, keeps each row's largest score m, the sum l of exp(S - m) and the sum of
exp(S - m) y while it goes through them, and leaves the three; combining the chunks is three small sums. Kept for
backward: the pixels, S in float32 and log l: see :mod:`.few_query_attention_backward`. A tile of pixels is used for
both products where two BLAS calls read all pixels twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .common import dot_precision
from .configs import Config, choose
from .few_query_attention_backward import gradients
from .few_query_attention_tiles import MAX_ROWS, SIZES, channel_block, flops, scaled_rows
from .launch import launch


def pool_config(dtype: torch.dtype, channels: int) -> Config:
    """Chunks of 128 pixels; more warps for wide tiles, where every element may have an address of its own."""
    pixels = 16 if dtype is torch.float32 else 32
    tile = (("BLOCK_P", pixels), ("TILES", 128 // pixels))
    stages = 1 if dtype is torch.float32 else 2
    return Config(tile, num_warps=8 if channels > 64 and dtype is not torch.float32 else 4, num_stages=stages)


@triton.jit(do_not_specialize=SIZES)
def _pool_kernel(
    sums_ptr,  # [chunks, B, R, K] float32
    largest_ptr,  # [chunks, B, R] float32
    total_ptr,  # [chunks, B, R] float32
    scores_ptr,  # [B, R, N] float32
    y_ptr,
    absorbed_ptr,  # [B, R, K] float32
    positions_ptr,  # [B, R, N] float32
    stride_yb,
    stride_yn,
    stride_yk,
    batch,
    rows,
    pixels,
    channels,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
):
    sample = (tl.program_id(0) % batch).to(tl.int64)
    chunk = (tl.program_id(0) // batch).to(tl.int64)
    row, channel = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    dtype = y_ptr.dtype.element_ty
    absorbed, scale = scaled_rows(absorbed_ptr, sample * rows, rows, channels, dtype, BLOCK_R, BLOCK_K)
    y_tile = y_ptr + sample * stride_yb + channel[None, :].to(tl.int64) * stride_yk

    sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for tile in range(TILES):
        pixel = (chunk * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        y = tl.load(y_tile + pixel[:, None] * stride_yn, mask=inside, other=0.0)  # [BLOCK_P, BLOCK_K]
        place = (sample * rows + row)[:, None] * pixels + pixel[None, :]
        inside = (row < rows)[:, None] & (pixel < pixels)[None, :]
        scores = tl.dot(absorbed, tl.trans(y), input_precision=PRECISION) * scale[:, None]  # [BLOCK_R, BLOCK_P]
        scores += tl.load(positions_ptr + place, mask=inside, other=0.0)
        tl.store(scores_ptr + place, scores, mask=inside)
        scores = tl.where((pixel < pixels)[None, :], scores, float("-inf"))
        above = tl.maximum(largest, tl.max(scores, axis=1))
        shrunk = tl.exp(largest - above)
        weights = tl.exp(scores - above[:, None])
        total = total * shrunk + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(dtype), y, sums * shrunk[:, None], input_precision=PRECISION)
        largest = above
    row_of = (chunk * batch + sample) * rows + row
    tl.store(largest_ptr + row_of, largest, mask=row < rows)
    tl.store(total_ptr + row_of, total, mask=row < rows)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    tl.store(sums_ptr + row_of[:, None] * channels + channel[None, :], sums, mask=inside)


def _combined(sums: Tensor, largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the pixels (B, R, K) and the logarithm of the softmax's denominator (B, R), of all chunks."""
    above = largest.amax(0)
    share = (largest - above).exp()
    whole = (total * share).sum(0)
    return (sums * share[..., None]).sum(0) / whole[..., None], above + whole.log()


@torch.library.custom_op("fastris::few_query_attention", mutates_args=())
def _pooled(y: Tensor, absorbed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (batch, pixels, channels), rows = y.shape, absorbed.shape[1]
    scores = torch.empty((batch, rows, pixels), dtype=torch.float32, device=y.device)
    if not batch:
        return torch.zeros_like(absorbed), scores, absorbed.new_zeros((batch, rows))
    config = pool_config(y.dtype, channel_block(channels))
    variant = f"K{channel_block(channels)}"
    config = choose(_pool_kernel, config, y.device, y.dtype, batch * pixels, variant)
    chunks = triton.cdiv(pixels, config["BLOCK_P"] * config["TILES"])
    sums = torch.empty((chunks, batch, rows, channels), dtype=torch.float32, device=y.device)
    largest, total = (torch.empty((chunks, batch, rows), dtype=torch.float32, device=y.device) for _ in range(2))
    tensors = (sums, largest, total, scores, y, absorbed.contiguous(), positions.contiguous())
    sizes = (batch, rows, pixels, channels, dot_precision(y.dtype), MAX_ROWS, channel_block(channels))
    launch(_pool_kernel, (chunks * batch,), *tensors, *y.stride(), *sizes, config=config)
    pooled, log_total = _combined(sums, largest, total)
    return pooled, scores, log_total


@_pooled.register_fake
def _(y: Tensor, absorbed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(absorbed), torch.empty_like(positions), absorbed.new_empty(absorbed.shape[:2])


def _setup_context(ctx, inputs, output) -> None:
    y, absorbed, _ = inputs
    pooled, scores, log_total = output
    ctx.save_for_backward(y, absorbed, scores, log_total, pooled)
    ctx.mark_non_differentiable(scores, log_total)


def _backward(ctx, upstream: Tensor, *_):
    y, absorbed, scores, log_total, pooled = ctx.saved_tensors
    delta = (upstream * pooled).sum(-1)
    return gradients(y, absorbed, scores, log_total, upstream, delta, ctx.needs_input_grad[0])


_pooled.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastris.few_query_attention)
def _(y_shape, absorbed_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * flops(y_shape, absorbed_shape[1])


def pooled_pixels(y: Tensor, absorbed: Tensor, positions: Tensor) -> Tensor:
    """The means (B, R, K) in float32 of pixels (B, N, K), from float32 a (B, R, K) and position scores (B, R, N)."""
    pooled, _, _ = _pooled(y, absorbed, positions)
    return pooled
