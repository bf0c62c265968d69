"""Backward of the few-query attention: one launch that reads every pixel once and writes its gradient.

With the notation of :mod:`.few_query_attention`, g (B, R, K) the gradient of what was pooled, and P = exp(S - log l):

    dP = g y^T    dS = P (dP - delta), delta = g . pooled    dy = P^T g + dS^T a    da = dS y

delta is known beforehand, so dS of a tile needs no other tile. da is summed over the pixels in float32, one partial
sum a chunk and then one torch sum: no atomics, the same bits on every run. dS (B, R, N) is the gradient of the
positions' scores as well and is written for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .common import dot_precision
from .configs import Config, choose
from .few_query_attention_tiles import MAX_ROWS, SIZES, channel_block, flops, largest_of, scaled_rows
from .launch import launch


def gradients_config(dtype: torch.dtype, channels: int) -> Config:
    """As the forward pass's; half as high where tiles are very wide, and where they are narrow, for fewer registers."""
    pixels = 16 if dtype is torch.float32 or not 64 < channels <= 256 else 32
    tile = (("BLOCK_P", pixels), ("TILES", 128 // pixels))
    stages = 1 if dtype is torch.float32 else 2
    return Config(tile, num_warps=16 if dtype is torch.float32 and channels > 128 else 8, num_stages=stages)


@triton.jit(do_not_specialize=SIZES)
def _gradients_kernel(
    dy_ptr,
    dabsorbed_ptr,  # [chunks, B, R, K] float32
    dscores_ptr,  # [B, R, N] float32
    y_ptr,
    upstream_ptr,  # [B, R, K] float32
    absorbed_ptr,  # [B, R, K] float32
    scores_ptr,  # [B, R, N] float32
    log_total_ptr,  # [B, R] float32
    delta_ptr,  # [B, R] float32
    stride_yb,
    stride_yn,
    stride_yk,
    stride_db,
    stride_dn,
    stride_dk,
    batch,
    rows,
    pixels,
    channels,
    WANTS_PIXELS: tl.constexpr,
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
    absorbed, absorbed_scale = scaled_rows(absorbed_ptr, sample * rows, rows, channels, dtype, BLOCK_R, BLOCK_K)
    upstream, upstream_scale = scaled_rows(upstream_ptr, sample * rows, rows, channels, dtype, BLOCK_R, BLOCK_K)
    log_total = tl.load(log_total_ptr + sample * rows + row, mask=row < rows, other=0.0)
    delta = tl.load(delta_ptr + sample * rows + row, mask=row < rows, other=0.0)
    y_tile = y_ptr + sample * stride_yb + channel[None, :].to(tl.int64) * stride_yk
    dy_tile = dy_ptr + sample * stride_db + channel[None, :].to(tl.int64) * stride_dk

    dabsorbed = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for tile in range(TILES):
        pixel = (chunk * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside_y = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        y = tl.load(y_tile + pixel[:, None] * stride_yn, mask=inside_y, other=0.0)  # [BLOCK_P, BLOCK_K]
        place = (sample * rows + row)[None, :] * pixels + pixel[:, None]
        inside = (row < rows)[None, :] & (pixel < pixels)[:, None]
        weights = tl.exp(tl.load(scores_ptr + place, mask=inside, other=float("-inf")) - log_total[None, :])
        dweights = tl.dot(y, tl.trans(upstream), input_precision=PRECISION) * upstream_scale[None, :]
        dscores = weights * (dweights - delta[None, :])  # [BLOCK_P, BLOCK_R]
        tl.store(dscores_ptr + place, dscores, mask=inside)
        if WANTS_PIXELS:
            left = (weights * upstream_scale[None, :]).to(dtype)
            dy = tl.dot(left, upstream, input_precision=PRECISION)  # [BLOCK_P, BLOCK_K]
            left = (dscores * absorbed_scale[None, :]).to(dtype)
            dy = tl.dot(left, absorbed, dy, input_precision=PRECISION)
            tl.store(dy_tile + pixel[:, None] * stride_dn, dy.to(dtype), mask=inside_y)
        slope = tl.trans(dscores)
        if dtype == tl.float32:
            dabsorbed = tl.dot(slope, y, dabsorbed, input_precision=PRECISION)
        else:  # slopes of thousands of pixels are too small for float16
            scale = largest_of(slope)
            dabsorbed += tl.dot((slope / scale[:, None]).to(dtype), y, input_precision=PRECISION) * scale[:, None]
    row_of = (chunk * batch + sample) * rows + row
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    tl.store(dabsorbed_ptr + row_of[:, None] * channels + channel[None, :], dabsorbed, mask=inside)


@torch.library.custom_op("fastris::few_query_attention_gradients", mutates_args=())
def gradients(
    y: Tensor,
    absorbed: Tensor,
    scores: Tensor,
    log_total: Tensor,
    upstream: Tensor,
    delta: Tensor,
    wants_pixels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy in the layout of ``y``, of no meaning unless wanted, da (B, R, K) and dS (B, R, N), both float32."""
    (batch, pixels, channels), rows = y.shape, absorbed.shape[1]
    dy, dscores = torch.empty_like(y), torch.empty_like(scores)
    if not batch:
        return dy, torch.zeros_like(absorbed), dscores
    config = gradients_config(y.dtype, channel_block(channels))
    variant = f"K{channel_block(channels)}"
    config = choose(_gradients_kernel, config, y.device, y.dtype, batch * pixels, variant)
    chunks = triton.cdiv(pixels, config["BLOCK_P"] * config["TILES"])
    dabsorbed = torch.empty((chunks, batch, rows, channels), dtype=torch.float32, device=y.device)
    tensors = (dy, dabsorbed, dscores, y, upstream.contiguous(), absorbed.contiguous(), scores, log_total)
    sizes = (batch, rows, pixels, channels, wants_pixels, dot_precision(y.dtype))
    blocks = (MAX_ROWS, channel_block(channels))
    strides = (*y.stride(), *dy.stride())
    launch(_gradients_kernel, (chunks * batch,), *tensors, delta.contiguous(), *strides, *sizes, *blocks, config=config)
    return dy, dabsorbed.sum(0), dscores


@gradients.register_fake
def _(y, absorbed, scores, log_total, upstream, delta, wants_pixels) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(absorbed), torch.empty_like(scores)


@register_flop_formula(torch.ops.fastris.few_query_attention_gradients)
def _(y_shape, absorbed_shape, scores, log_total, upstream, delta, wants_pixels, *args, out_shape=None, **kw) -> int:
    return (4 if wants_pixels else 2) * flops(y_shape, absorbed_shape[1])
