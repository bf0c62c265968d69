"""Weighted means of a pixel map over two regions, and their gradient: the map is read once, or written once.

Shapes: features x (B, C, P) with any strides and of any dtype, the cells' weights w (B, 2, P), a factor s (B, 2, 1) and
a 1x1 convolution W (D, C) or none, all float32:

    means = (sum_p w[., p] x[., p]) s      answer = means W^T      dx[c, p] = sum_r w[r, p] s[r] (g W)[r, c]

* sums: one program goes through a chunk of a sample's pixels and leaves partial sums of some channels, of both regions;
  the chunks are added up by one torch.sum, so every run gives the same bits.
* spread: a cell's gradient is two numbers times two vectors of its sample, written in x's dtype and layout.

x is read as it is: in half precision no float32 copy of the map is made, of it or of its gradient. Kept for the
backward pass are w and what belongs to samples. It is a pass of its own: the similarity's kernel reads the same map,
and multiplying by both at once would save this one, but not while the two are operators of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, choose
from .launch import launch

SIZES = ("batch", "channels", "pixels")
_WIDE = Config((("BLOCK_C", 64), ("BLOCK_P", 32), ("TILES", 16)), 4, 1)
SUMS_CONFIG = Config((("BLOCK_C", 32), ("BLOCK_P", 64), ("TILES", 8)), 4, 1, (_WIDE,))
SPREAD_CONFIG = Config((("BLOCK_C", 32), ("BLOCK_P", 64)), 4, 1, (Config((("BLOCK_C", 64), ("BLOCK_P", 32)), 4, 1),))


@triton.jit(do_not_specialize=SIZES)
def _sums_kernel(
    sums_ptr,  # [chunks, B, 2, C] float32
    x_ptr,
    weights_ptr,  # [B, 2, P] float32
    stride_xb,
    stride_xc,
    stride_xp,
    batch,
    channels,
    pixels,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
):
    sample = (tl.program_id(0) % batch).to(tl.int64)
    chunk = (tl.program_id(0) // batch).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_rows = x_ptr + sample * stride_xb + channel[:, None].to(tl.int64) * stride_xc
    weights_ptr += sample * 2 * pixels
    inside = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    outside = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for tile in range(TILES):
        pixel = (chunk * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        present = (channel < channels)[:, None] & (pixel < pixels)[None, :]
        x = tl.load(x_rows + pixel[None, :] * stride_xp, mask=present, other=0.0).to(tl.float32)
        inside += x * tl.load(weights_ptr + pixel, mask=pixel < pixels, other=0.0)[None, :]
        outside += x * tl.load(weights_ptr + pixels + pixel, mask=pixel < pixels, other=0.0)[None, :]
    sums = sums_ptr + (chunk * batch + sample) * 2 * channels + channel
    tl.store(sums, tl.sum(inside, axis=1), mask=channel < channels)
    tl.store(sums + channels, tl.sum(outside, axis=1), mask=channel < channels)


@triton.jit(do_not_specialize=SIZES)
def _spread_kernel(
    d_x_ptr,
    vectors_ptr,  # [B, 2, C] float32
    weights_ptr,  # [B, 2, P] float32
    stride_xb,
    stride_xc,
    stride_xp,
    batch,
    channels,
    pixels,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sample = (tl.program_id(0) % batch).to(tl.int64)
    pixel = (tl.program_id(0) // batch).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    vectors = vectors_ptr + sample * 2 * channels + channel
    weights = weights_ptr + sample * 2 * pixels + pixel
    d_inside = tl.load(vectors, mask=channel < channels, other=0.0)[:, None]
    d_outside = tl.load(vectors + channels, mask=channel < channels, other=0.0)[:, None]
    d_x = d_inside * tl.load(weights, mask=pixel < pixels, other=0.0)[None, :]
    d_x += d_outside * tl.load(weights + pixels, mask=pixel < pixels, other=0.0)[None, :]
    present = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    d_x_rows = d_x_ptr + sample * stride_xb + channel[:, None].to(tl.int64) * stride_xc
    tl.store(d_x_rows + pixel[None, :] * stride_xp, d_x.to(d_x_ptr.dtype.element_ty), mask=present)


def _sums(x: Tensor, weights: Tensor) -> Tensor:
    """``sum_p w x``: (B, 2, C) float32."""
    batch, channels, pixels = x.shape
    config = choose(_sums_kernel, SUMS_CONFIG, x.device, x.dtype, batch * pixels)
    chunks = triton.cdiv(pixels, config["BLOCK_P"] * config["TILES"])
    sums = torch.empty(chunks, batch, 2, channels, dtype=torch.float32, device=x.device)
    grid = (chunks * batch, triton.cdiv(channels, config["BLOCK_C"]))
    if batch:
        launch(_sums_kernel, grid, sums, x, weights.contiguous(), *x.stride(), *x.shape, config=config)
    return sums.sum(0)


def _spread(vectors: Tensor, weights: Tensor, d_x: Tensor) -> Tensor:
    """``d_x`` (B, C, P), filled with the cells' weights (B, 2, P) times the vectors (B, 2, C)."""
    batch, channels, pixels = d_x.shape
    config = choose(_spread_kernel, SPREAD_CONFIG, d_x.device, d_x.dtype, batch * pixels)
    grid = (batch * triton.cdiv(pixels, config["BLOCK_P"]), triton.cdiv(channels, config["BLOCK_C"]))
    if batch:
        tensors = d_x, vectors.contiguous(), weights.contiguous()
        launch(_spread_kernel, grid, *tensors, *d_x.stride(), *d_x.shape, config=config)
    return d_x


@torch.library.custom_op("fastris::region_means", mutates_args=())
def _region_means(x: Tensor, weights: Tensor, scale: Tensor, pointwise: Tensor | None) -> tuple[Tensor, Tensor]:
    """The answer (B, 2, D), and the means before the convolution (B, 2, C)."""
    means = _sums(x, weights) * scale
    return means.clone() if pointwise is None else _rows_times(means, pointwise.t()), means


@_region_means.register_fake
def _(x: Tensor, weights: Tensor, scale: Tensor, pointwise: Tensor | None) -> tuple[Tensor, Tensor]:
    means = weights.new_empty(len(x), 2, x.shape[1])
    return torch.empty_like(means) if pointwise is None else means.new_empty(len(x), 2, len(pointwise)), means


@torch.library.custom_op("fastris::region_means_gradient", mutates_args=())
def gradient(vectors: Tensor, weights: Tensor, channels_inside: bool, dtype: torch.dtype) -> Tensor:
    """dx (B, C, P) in ``dtype``, its channels next to each other in memory if they are ``channels_inside``."""
    return _spread(vectors, weights, _empty_gradient(vectors, weights, channels_inside, dtype))


@gradient.register_fake
def _empty_gradient(vectors: Tensor, weights: Tensor, channels_inside: bool, dtype: torch.dtype) -> Tensor:
    batch, channels, pixels = len(vectors), vectors.shape[2], weights.shape[2]
    if channels_inside:
        return vectors.new_empty(batch, pixels, channels, dtype=dtype).mT
    return vectors.new_empty(batch, channels, pixels, dtype=dtype)


def _rows_times(rows: Tensor, matrix: Tensor) -> Tensor:
    """(B, 2, X) times (X, Y): (B, 2, Y)."""
    return (rows.flatten(0, 1) @ matrix).unflatten(0, (-1, 2))


def _setup_context(ctx, inputs, output) -> None:
    x, weights, scale, pointwise = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(weights, scale, pointwise, output[1])
    ctx.layout = x.stride(1) == 1, x.dtype


def _backward(ctx, upstream: Tensor, _):
    weights, scale, pointwise, means = ctx.saved_tensors
    d_x = d_pointwise = None
    with torch.autocast(weights.device.type, enabled=False):
        if ctx.needs_input_grad[3]:
            d_pointwise = upstream.flatten(0, 1).t() @ means.flatten(0, 1)
        if ctx.needs_input_grad[0]:
            vectors = (upstream if pointwise is None else _rows_times(upstream, pointwise)) * scale
            d_x = gradient(vectors, weights, *ctx.layout)
    return d_x, None, None, d_pointwise


_region_means.register_autograd(_backward, setup_context=_setup_context)


def region_means(x: Tensor, weights: Tensor, scale: Tensor, pointwise: Tensor | None) -> Tensor:
    """Means (B, 2, D) in float32 of features (B, C, P), as the module has them."""
    answer, _ = _region_means(x, weights, scale, pointwise)
    return answer
