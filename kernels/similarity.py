"""Text-to-pixel similarity after folding: a skinny product that reads the features once, then a shift-add.

Shapes: features x (B, C, P) with P = H*W pixels and any strides, folded text kernels w (B, N, C) and tap constants
c (B, N), both float32, with N = Q*k*k columns. Column n = q*k*k + t belongs to tap t of query q, whose map is shifted
by s_t = (t // k - k // 2, t % k - k // 2):

    taps   T[b, n, p] = sum_c w[b, n, c] x[b, c, p] + c[b, n]
    shift  logits[b, q, p] = sum_t T[b, q*k*k + t, p - s_t], nothing where p - s_t is outside the image

The taps live between two launches, in float32: k*k numbers per pixel and query beside the C of the features. Kept for
backward: x and w, see :mod:`.similarity_backward`. Against the 1x1 convolution and grouped convolution that this
replaces, a map of the features' size is neither written, read nor kept.

A BatchNorm and ReLU before it are applied as x is read, rounded as a map between the two would be:

    x~[c] = relu((x[c] - mean[c]) rate[c] weight[c] + bias[c])        rate = 1 / sqrt(var + eps)

so that neither the norm's answer nor the ReLU's is written and read, and only the raw x is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .common import dot_precision
from .configs import Config, choose, device_class
from .launch import launch
from .similarity_backward import similarity_gradients
from .similarity_tiles import (
    COLUMN_BLOCKS,
    NORMED_WARPS,
    SIZES,
    STAGES,
    column_block,
    norm_of,
    similarity_flops,
    variant_of,
)

SHIFT_CONFIG = Config((("BLOCK", 256),), num_warps=4, num_stages=1)


def taps_config(shared: str, dtype: torch.dtype, columns: int, normed: bool = False) -> Config:
    channels = 32 if dtype is torch.float32 else 64
    pixels = 64 if dtype is torch.float32 or shared == "tiny" else 128
    if normed and dtype is torch.float32:
        pixels = 32
    block, stages = column_block(columns), STAGES[shared]
    tile = (("BLOCK_N", block), ("BLOCK_C", channels), ("BLOCK_P", pixels))
    alternatives: tuple[Config, ...] = ()
    if block == COLUMN_BLOCKS[0] and (channels, pixels) == (64, 128):
        alternatives = (Config((*tile[:2], ("BLOCK_P", 64)), num_warps=4, num_stages=stages),)
    warps = NORMED_WARPS if normed else 4
    if block > COLUMN_BLOCKS[0] and pixels == 128:
        warps = 8  # Triton 3.6 spilled odd maps by 4
    return Config(tile, num_warps=warps, num_stages=stages, alternatives=alternatives)


@triton.jit(do_not_specialize=SIZES)
def _taps_kernel(
    taps_ptr,  # [B, N, P] float32
    x_ptr,
    weight_ptr,  # [B, N, C] float32
    constants_ptr,  # [B, N] float32
    norm_ptr,  # [4, C] float32, or None
    stride_xb,
    stride_xc,
    stride_xp,
    channels,
    columns,
    pixels,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tiles = tl.cdiv(pixels, BLOCK_P)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = sample * columns + column  # of weight and constants, and of the taps
    x_tile = x_ptr + sample * stride_xb + pixel[None, :].to(tl.int64) * stride_xp
    weight_tile = weight_ptr + row[:, None] * channels

    total = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for first in range(0, channels, BLOCK_C):
        channel = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
        inside = channel < channels
        x = tl.load(x_tile + channel[:, None] * stride_xc, mask=inside[:, None] & (pixel < pixels)[None, :], other=0.0)
        if norm_ptr is not None:
            mean, rate, scale, shift = norm_of(norm_ptr, channel, channels)
            value = (x.to(tl.float32) - mean[:, None]) * rate[:, None] * scale[:, None] + shift[:, None]
            x = tl.where(value <= 0, 0.0, value).to(x.dtype)  # NaN stays
        weight = tl.load(weight_tile + channel[None, :], mask=inside[None, :] & (column < columns)[:, None], other=0.0)
        total = tl.dot(weight.to(x.dtype), x, total, input_precision=PRECISION)  # [BLOCK_N, BLOCK_P]
    total += tl.load(constants_ptr + row, mask=column < columns, other=0.0)[:, None]
    inside = (column < columns)[:, None] & (pixel < pixels)[None, :]
    tl.store(taps_ptr + row[:, None] * pixels + pixel[None, :], total, mask=inside)


@triton.jit
def shifted_sum(taps_ptr, plane, pixel, height, width, SIZE: tl.constexpr):
    """Logits of the pixels [BLOCK] of one (sample, query) ``plane`` (int64): its k*k maps, shifted and added."""
    pixels = height * width
    y = pixel // width
    x = pixel % width
    total = tl.zeros(pixel.shape, tl.float32)
    for tap in tl.static_range(SIZE * SIZE):
        shift_y = tap // SIZE - SIZE // 2
        shift_x = tap % SIZE - SIZE // 2
        inside = (y >= shift_y) & (y < height + shift_y) & (x >= shift_x) & (x < width + shift_x)
        source = (plane * (SIZE * SIZE) + tap) * pixels + (pixel - shift_y * width - shift_x)
        total += tl.load(taps_ptr + source, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=SIZES)
def _shift_kernel(
    logits_ptr,  # [B, Q, P]
    taps_ptr,  # [B, Q*SIZE*SIZE, P] float32
    height,
    width,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixels = height * width
    tiles = tl.cdiv(pixels, BLOCK)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    logits = shifted_sum(taps_ptr, plane, pixel, height, width, SIZE)
    tl.store(logits_ptr + plane * pixels + pixel, logits.to(logits_ptr.dtype.element_ty), mask=pixel < pixels)


def launch_taps(x: Tensor, weight: Tensor, constants: Tensor, norm: Tensor | None) -> Tensor:
    """Taps (B, N, P) in float32, of features normed by the rows (4, C) of ``norm``."""
    (batch, channels, pixels), columns = x.shape, weight.shape[1]
    weight, constants = weight.contiguous(), constants.contiguous()
    taps = torch.empty((batch, columns, pixels), dtype=torch.float32, device=x.device)
    config = taps_config(device_class(x.device), x.dtype, columns, norm is not None)
    variant = variant_of(f"N{column_block(columns)}", norm)
    config = choose(_taps_kernel, config, x.device, x.dtype, batch * pixels, variant)
    grid = (batch * triton.cdiv(pixels, config["BLOCK_P"]), triton.cdiv(columns, config["BLOCK_N"]))
    sizes = (channels, columns, pixels, dot_precision(x.dtype))
    launch(_taps_kernel, grid, taps, x, weight, constants, norm, *x.stride(), *sizes, config=config)
    return taps


@torch.library.custom_op("fastris::text_similarity", mutates_args=())
def _similarity(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    norm: Tensor | None,
    of_batch: bool,
    height: int,
    width: int,
    size: int,
) -> Tensor:
    batch, queries = x.shape[0], weight.shape[1] // size**2
    logits = torch.empty((batch, queries, height, width), dtype=x.dtype, device=x.device)
    if logits.numel():
        taps = launch_taps(x, weight, constants, norm)
        config = choose(_shift_kernel, SHIFT_CONFIG, x.device, x.dtype, batch * height * width)
        grid = (batch * queries * triton.cdiv(height * width, config["BLOCK"]),)
        launch(_shift_kernel, grid, logits, taps, height, width, size, config=config)
    return logits


@_similarity.register_fake
def _(x, weight, constants, norm, of_batch: bool, height: int, width: int, size: int) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1] // size**2, height, width))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, norm, ctx.of_batch, _, _, ctx.size = inputs
    ctx.save_for_backward(x, weight, norm)


def _backward(ctx, dlogits: Tensor):
    return (*similarity_gradients(ctx, dlogits.float()), None, None, None, None)


_similarity.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastris.text_similarity)
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return similarity_flops(x_shape, weight_shape[1])


def similarity(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    norm: Tensor | None,
    of_batch: bool,
    height: int,
    width: int,
    size: int,
) -> Tensor:
    """Logits (B, Q, H, W) in the dtype of ``x``, from features (B, C, H*W) and kernels folded in float32.

    ``norm`` (4, C), float32, or None: mean, 1 / deviation, weight and bias of a BatchNorm that is applied first, with a
    ReLU. Where the first two are those of ``x`` itself, ``of_batch``, its gradient goes through them.
    """
    return _similarity(x, weight, constants, norm, of_batch, height, width, size)
