"""Backward of the text-to-pixel similarity: one launch for the features, one for the text kernels.

With the notation of :mod:`.similarity`, and the slope G[b, n, p] = dlogits[b, q, p + s_t], the transpose of the shift
(0 where p + s_t is outside the image):

    dx[b, c, p] = sum_n w[b, n, c] G[b, n, p]
    dw[b, n, c] = sum_p G[b, n, p] x[b, c, p]    dc[b, n] = sum_p G[b, n, p]

G is never in memory: both kernels gather it from dlogits (B, Q, H, W), which is C times smaller than the features and
stays in cache. The features are read once, for dw, and their gradient is written once, for dx; each launch is left
out where nobody wants its result. dw and dc are summed over pixels in float32, one partial sum per program and then one
torch sum: no atomics, the same bits on every run.

Of features that a BatchNorm and a ReLU change as they are read, x^ = (x - mean) rate and x~ = relu(x^ weight + bias),
only x is kept, and whether the ReLU is open, m = [x~ > 0], is seen again. The norm's sums over all pixels need no pass:
they are sums over columns of two products that the text kernels' gradient is made of,

    X[b, n, c] = sum_p G m x^,  M[b, n, c] = sum_p G m        dw = weight X + bias M
    dweight[c] = sum_bn w X,    dbias[c] = sum_bn w M

which come first; and then dx = weight rate (m sum_n w G - (dbias + x^ dweight) / count), where mean and rate are those
of x itself over ``count`` pixels of the batch, and the first term alone where they are given numbers.
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

# A program gathers its slopes once for all channels of its tile, so wide tiles of few pixels gather least: where a tile
# of 64 channels gathers 16 slopes a thread for 64 results, one of 256 gathers 4. Narrower features, of which a wide
# tile would be mostly empty, keep the tile of 64. The only loop is over columns, and mostly one step: no pipeline.
WIDE_CHANNELS = 256

# Rows of a norm: mean, rate, weight, bias.
NORM_ROWS = 4


def features_config(shared: str, dtype: torch.dtype, channels: int, normed: bool = False) -> Config:
    """Launch of the features' gradient. AMD's registers hold half as many float32 products."""
    warps = NORMED_WARPS if normed else 4
    tile = (("BLOCK_N", 16), ("BLOCK_C", 64), ("BLOCK_P", 64 if dtype is torch.float32 else 128))
    narrow = Config(tile, num_warps=warps, num_stages=1)
    if channels <= WIDE_CHANNELS // 2:
        return narrow
    pixels = 16 if dtype is torch.float32 and shared == "tiny" else 32
    tile = (("BLOCK_N", 16), ("BLOCK_C", WIDE_CHANNELS), ("BLOCK_P", pixels))
    other = narrow
    if normed:
        other = Config((*tile[:2], ("BLOCK_P", 16)), num_warps=4, num_stages=1)
    return Config(tile, num_warps=warps, num_stages=1, alternatives=(other,))


def kernel_config(shared: str, dtype: torch.dtype, columns: int) -> Config:
    """Launch of the kernels' gradient: one partial sum per 256 pixels."""
    block = ("BLOCK_N", column_block(columns))
    if dtype is torch.float32:
        tile = (block, ("BLOCK_C", 32), ("BLOCK_P", 32), ("TILES", 8))
        # Triton 3.6 spilled 32 columns of odd maps by 4 warps on sm_80, and by 8 on sm_86.
        warps = 8 if shared == "large" and column_block(columns) > COLUMN_BLOCKS[0] else 4
        return Config(tile, num_warps=warps, num_stages=STAGES[shared])
    if shared == "tiny":  # larger tiles spilled on gfx1100 under Triton 3.6
        return Config((block, ("BLOCK_C", 64), ("BLOCK_P", 32), ("TILES", 8)), num_warps=4, num_stages=STAGES[shared])
    tile = (block, ("BLOCK_C", 64), ("BLOCK_P", 64), ("TILES", 4))
    alternatives: tuple[Config, ...] = ()
    if column_block(columns) == COLUMN_BLOCKS[0]:
        alternatives = (Config(tile, num_warps=4, num_stages=STAGES[shared]),)
    return Config(tile, num_warps=8, num_stages=STAGES[shared], alternatives=alternatives)


@triton.jit
def _slope(dlogits_ptr, sample, pixel, column, columns, height, width, SIZE: tl.constexpr):
    """G of broadcastable ``pixel`` and ``column`` index tiles: dlogits where the column's tap carries the pixel to."""
    query = column // (SIZE * SIZE)
    shift_y = column % (SIZE * SIZE) // SIZE - SIZE // 2
    shift_x = column % SIZE - SIZE // 2
    y = pixel // width + shift_y
    x = pixel % width + shift_x
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (column < columns) & (pixel < height * width)
    plane = sample * (columns // (SIZE * SIZE)) + query
    source = plane * (height * width) + (pixel + shift_y * width + shift_x)
    return tl.load(dlogits_ptr + source, mask=inside, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def _features_gradient_kernel(
    dx_ptr,
    dlogits_ptr,  # [B, Q, P] float32
    weight_ptr,  # [B, N, C] float32
    x_ptr,  # in the layout of dx, or None
    norm_ptr,  # [4, C] float32; [6, C] with dbias / count and dweight / count behind it; or None
    stride_xb,
    stride_xc,
    stride_xp,
    channels,
    columns,
    pixels,
    height,
    width,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    OF_BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tiles = tl.cdiv(pixels, BLOCK_P)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    dtype = dx_ptr.dtype.element_ty

    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, columns, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        slope = _slope(dlogits_ptr, sample, pixel[:, None], column[None, :], columns, height, width, SIZE)
        source = weight_ptr + (sample * columns + column)[:, None] * channels + channel[None, :]
        weight = tl.load(source, mask=(column < columns)[:, None] & (channel < channels)[None, :], other=0.0)
        total = tl.dot(slope.to(dtype), weight.to(dtype), total, input_precision=PRECISION)  # [BLOCK_P, BLOCK_C]
    place = sample * stride_xb + pixel[:, None].to(tl.int64) * stride_xp + channel[None, :] * stride_xc
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    if norm_ptr is not None:
        mean, rate, scale, shift = norm_of(norm_ptr, channel, channels)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        normalised = (x - mean[None, :]) * rate[None, :]
        total = tl.where(normalised * scale[None, :] + shift[None, :] <= 0, 0.0, total)
        if OF_BATCH:
            dbias = tl.load(norm_ptr + 4 * channels + channel, mask=channel < channels, other=0.0)
            dscale = tl.load(norm_ptr + 5 * channels + channel, mask=channel < channels, other=0.0)
            total -= dbias[None, :] + normalised * dscale[None, :]
        total *= (scale * rate)[None, :]
    tl.store(dx_ptr + place, total.to(dtype), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _kernel_gradient_kernel(
    dweight_ptr,  # [chunks, B, N, C] float32, one partial sum per chunk of pixels; with a norm X, and M behind it
    dconstants_ptr,  # [chunks, B, N] float32
    dlogits_ptr,  # [B, Q, P] float32
    x_ptr,
    norm_ptr,  # [4, C] float32, or None
    stride_xb,
    stride_xc,
    stride_xp,
    batch,
    channels,
    columns,
    pixels,
    height,
    width,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
):
    sample = (tl.program_id(0) % batch).to(tl.int64)
    chunk = tl.program_id(0) // batch
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    column = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_tile = x_ptr + sample * stride_xb + channel[None, :] * stride_xc

    dweight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dopen = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if norm_ptr is not None:
        mean, rate, scale, shift = norm_of(norm_ptr, channel, channels)
    dconstants = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(TILES):
        pixel = (chunk * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        x = tl.load(x_tile + pixel[:, None].to(tl.int64) * stride_xp, mask=inside, other=0.0)
        slope = _slope(dlogits_ptr, sample, pixel[None, :], column[:, None], columns, height, width, SIZE)
        if norm_ptr is not None:
            normalised = (x.to(tl.float32) - mean[None, :]) * rate[None, :]
            closed = normalised * scale[None, :] + shift[None, :] <= 0
            opened = tl.where(closed, 0.0, 1.0).to(x.dtype)
            dopen = tl.dot(slope.to(x.dtype), opened, dopen, input_precision=PRECISION)
            x = tl.where(closed, 0.0, normalised).to(x.dtype)
        dweight = tl.dot(slope.to(x.dtype), x, dweight, input_precision=PRECISION)  # [BLOCK_N, BLOCK_C]
        dconstants += tl.sum(slope, axis=1)
    row = (chunk * batch + sample) * columns + column
    inside = (column < columns)[:, None] & (channel < channels)[None, :]
    place = row[:, None] * channels + channel[None, :]
    tl.store(dweight_ptr + place, dweight, mask=inside)
    if norm_ptr is not None:
        behind = tl.num_programs(0).to(tl.int64) * columns * channels
        tl.store(dweight_ptr + behind + place, dopen, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(dconstants_ptr + row, dconstants, mask=column < columns)


@torch.library.custom_op("fastris::text_similarity_features_gradient", mutates_args=())
def _features_gradient(dlogits: Tensor, weight: Tensor, x: Tensor, norm: Tensor | None, size: int) -> Tensor:
    """dx in the layout of ``x``, which is read for its norm alone; ``dlogits`` (B, Q, H, W) float32.

    ``norm`` (4, C) or, where its statistics are those of ``x``, (6, C) with dbias / count and dweight / count.
    """
    dx = torch.empty_like(x)
    if dx.numel():
        (batch, channels, pixels), (height, width) = x.shape, dlogits.shape[-2:]
        dlogits, weight = dlogits.contiguous(), weight.contiguous()
        source = None if norm is None else x if x.stride() == dx.stride() else torch.empty_like(x).copy_(x)
        config = features_config(device_class(x.device), x.dtype, channels, norm is not None)
        variant = variant_of(f"C{config['BLOCK_C']}", norm)
        config = choose(_features_gradient_kernel, config, x.device, x.dtype, batch * pixels, variant)
        grid = (batch * triton.cdiv(pixels, config["BLOCK_P"]), triton.cdiv(channels, config["BLOCK_C"]))
        tensors = (dx, dlogits, weight, source, norm)
        options = (size, dot_precision(x.dtype), norm is not None and len(norm) > NORM_ROWS)
        sizes = (channels, weight.shape[1], pixels, height, width, *options)
        launch(_features_gradient_kernel, grid, *tensors, *dx.stride(), *sizes, config=config)
    return dx


@_features_gradient.register_fake
def _(dlogits: Tensor, weight: Tensor, x: Tensor, norm: Tensor | None, size: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fastris::text_similarity_kernel_gradient", mutates_args=())
def _kernel_gradient(dlogits: Tensor, x: Tensor, norm: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """dw (1, B, N, C), or, with a norm, X and M (2, B, N, C); and dc (B, N). float32, as ``dlogits`` (B, Q, H, W)."""
    (batch, channels, pixels), (queries, height, width) = x.shape, dlogits.shape[-3:]
    columns = queries * size**2
    config = kernel_config(device_class(x.device), x.dtype, columns)
    variant = variant_of(f"N{column_block(columns)}", norm)
    config = choose(_kernel_gradient_kernel, config, x.device, x.dtype, batch * pixels, variant)
    chunks = triton.cdiv(pixels, config["BLOCK_P"] * config["TILES"])
    sums = 1 if norm is None else 2
    dweight = torch.empty((sums, chunks, batch, columns, channels), dtype=torch.float32, device=x.device)
    dconstants = torch.empty((chunks, batch, columns), dtype=torch.float32, device=x.device)
    if batch:
        grid = (chunks * batch, triton.cdiv(channels, config["BLOCK_C"]), triton.cdiv(columns, config["BLOCK_N"]))
        tensors = (dweight, dconstants, dlogits.contiguous(), x, norm)
        sizes = (batch, channels, columns, pixels, height, width, size, dot_precision(x.dtype))
        launch(_kernel_gradient_kernel, grid, *tensors, *x.stride(), *sizes, config=config)
    return dweight.sum(1), dconstants.sum(0)


@_kernel_gradient.register_fake
def _(dlogits: Tensor, x: Tensor, norm: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    batch, columns = x.shape[0], dlogits.shape[1] * size**2
    dweight = x.new_empty((1 if norm is None else 2, batch, columns, x.shape[1]), dtype=torch.float32)
    return dweight, x.new_empty((batch, columns), dtype=torch.float32)


def similarity_gradients(ctx, dlogits: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dw, dc and the norm's (4, C), as far as ``ctx`` wants them, from the float32 gradient of the logits.

    Mean and rate of the norm have no gradient: what goes through them is in dx.
    """
    x, weight, norm = ctx.saved_tensors[:3]
    wants_x, *wanted = ctx.needs_input_grad[:4]
    dx, dweight, dconstants, dnorm, terms = None, None, None, None, norm
    through_statistics = wants_x and norm is not None and ctx.of_batch
    if any(wanted) or through_statistics:
        sums, dconstants = _kernel_gradient(dlogits, x, norm, ctx.size)
        dweight = sums[0]
        if norm is not None:
            dweight = norm[2] * sums[0] + norm[3] * sums[1]
            dscale, dbias = (weight * sums).sum((1, 2))
            if through_statistics:
                terms = torch.cat([norm, torch.stack([dbias, dscale]) / max(1, x.shape[0] * x.shape[2])])
            dnorm = torch.stack([torch.zeros_like(dbias), torch.zeros_like(dbias), dscale, dbias])
    if wants_x:
        dx = _features_gradient(dlogits, weight, x, terms, ctx.size)
    return dx, dweight, dconstants, dnorm


@register_flop_formula(torch.ops.fastris.text_similarity_features_gradient)
def _(dlogits_shape, weight_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
    return similarity_flops(x_shape, weight_shape[1])


@register_flop_formula(torch.ops.fastris.text_similarity_kernel_gradient)
def _(dlogits_shape, x_shape, norm_shape, size, *args, out_shape=None, **kwargs) -> int:
    return (1 if norm_shape is None else 2) * similarity_flops(x_shape, dlogits_shape[1] * size**2)
