"""conv3x3(up2(x)) on a GPU: a matrix product by cuBLAS at low resolution, then a gather of nine bilinear tap images.

Formula, per sample, with tap t = (t_y, t_x) and u the position in the upsampled image:

    taps[y, x, t, c']  =  sum_c x[y, x, c] W[c', c, t]                                    matrix product, C -> 9C'
    out[Y, X, c']      =  bias[c'] + sum_t sum_yx a(Y + t_y - 1, y) a(X + t_x - 1, x) taps[y, x, t, c']         gather

where a(u, y) is the bilinear weight of pixel y at u, 0 for u outside [0, 2H). In one dimension the two outputs over
pixel y use seven (tap, pixel) pairs, so one quad of outputs costs 49 loads; one at a time they would cost 36 each.

Shapes: x (B, C, H, W) and out (B, C', 2H, 2W), both read and written as pixels by channels (channels_last); taps
(n, H, W, 9, C') for n samples at a time, so that it stays below PART_BYTES. Kept for backward: x and weight.

Bytes saved: the 2H x 2W input of the convolution (written by the interpolation, read by the convolution, kept for
backward, float32 under autocast) never exists. Backward is the adjoint gather, which writes each element of d(taps)
once, in place of the atomic adds of bilinear backward: the same bits on every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .configs import Config, choose
from .launch import launch
from .upsample_conv_backward import ADJOINT, adjoint_kernel
from .upsample_conv_tiles import SIZES, tile

# Taps at a time, in bytes, for both passes. Parts of about the L2's size may still be there when the gather reads them,
# for more launches. A single sample is never divided, so one very large image may exceed this.
PARTS = Config((("PART_BYTES", 512 * 2**20),), alternatives=(Config((("PART_BYTES", 48 * 2**20),)),))

# By bytes of an element and whether C' is a multiple of 16. There is no shared memory to speak of, so one table serves
# every card. 128 bytes of channels are one cache line. Where C' has another width each element has its own address, and
# tiles of one element a thread keep the addresses in registers.
_FEWER_WARPS = (Config((("BLOCK_P", 16), ("BLOCK_C", 64)), num_warps=4, num_stages=1),)
GATHER = {
    (2, True): Config((("BLOCK_P", 16), ("BLOCK_C", 64)), num_warps=8, num_stages=1, alternatives=_FEWER_WARPS),
    (4, True): Config((("BLOCK_P", 16), ("BLOCK_C", 32)), num_warps=4, num_stages=1),
    (2, False): Config((("BLOCK_P", 4), ("BLOCK_C", 64)), num_warps=8, num_stages=1),
    (4, False): Config((("BLOCK_P", 4), ("BLOCK_C", 32)), num_warps=4, num_stages=1),
}


@triton.constexpr_function
def bilinear_weight(parity, tap, low):
    """Weight of pixel y + low in output 2y + parity through ``tap``: a tent around the tap's upsampled position."""
    return max(0.0, 1.0 - abs(low - (parity + tap - 1.5) / 2))


@triton.constexpr_function
def is_used(tap, low):
    """Whether pixel y + low reaches output 2y or 2y + 1 through ``tap``: seven of the nine pairs do."""
    return bilinear_weight(0, tap, low) + bilinear_weight(1, tap, low) > 0


@triton.jit
def _steps(y, height, line):
    """Elements from pixel y to the one before and to the one behind, 0 where the interpolation clamps its border."""
    return tl.where(y > 0, -1, 0) * line, tl.where(y < height - 1, 1, 0) * line


@triton.jit
def _sum_along_y(column, steps_y, y, height, channels, mask, TAP_X: tl.constexpr):
    """Taps (0..2, TAP_X) of one column of low-resolution pixels, interpolated to output rows 2y and 2y + 1."""
    above, below = y > 0, y < height - 1
    even = tl.zeros(mask.shape, tl.float32)
    odd = tl.zeros(mask.shape, tl.float32)
    for low in tl.static_range(-1, 2):
        source = column + steps_y[0] if low < 0 else (column + steps_y[1] if low > 0 else column)
        for tap in tl.static_range(3):
            if is_used(tap, low):
                value = tl.load(source + (3 * tap + TAP_X) * channels, mask=mask, other=0.0).to(tl.float32)
                if bilinear_weight(0, tap, low) > 0:  # the convolution pads with zeros: tap 0 of row 0 sees none
                    even += bilinear_weight(0, tap, low) * (tl.where(above, value, 0.0) if tap == 0 else value)
                if bilinear_weight(1, tap, low) > 0:
                    odd += bilinear_weight(1, tap, low) * (tl.where(below, value, 0.0) if tap == 2 else value)
    return even, odd


@triton.jit(do_not_specialize=SIZES)
def _gather_kernel(
    out_ptr,
    moments_ptr,
    taps_ptr,
    bias_ptr,
    pixels,
    height,
    width,
    channels,
    HAS_BIAS: tl.constexpr,
    HAS_STATS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[2y + i, 2x + j, c'] for the four i, j of every pixel, and the moments (4, tiles, C') of the tiles."""
    pixel, y, x, channel, mask = tile(pixels, height, width, channels, BLOCK_P, BLOCK_C)
    start = tl.zeros([1, BLOCK_C], tl.float32)
    if HAS_BIAS:
        start += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    start = tl.broadcast_to(start, [BLOCK_P, BLOCK_C])
    top_left, top_right, bottom_left, bottom_right = start, start, start, start
    steps_y = _steps(y, height, width.to(tl.int64) * (9 * channels))
    steps_x = _steps(x, width, 9 * channels)
    here = taps_ptr + (pixel * (9 * channels) + channel)
    for tap in tl.static_range(3):
        for low in tl.static_range(-1, 2):
            if is_used(tap, low):
                column = here + steps_x[0] if low < 0 else (here + steps_x[1] if low > 0 else here)
                top, bottom = _sum_along_y(column, steps_y, y, height, channels, mask, tap)
                if bilinear_weight(0, tap, low) > 0:
                    inside = x > 0 if tap == 0 else x >= 0
                    top_left += bilinear_weight(0, tap, low) * tl.where(inside, top, 0.0)
                    bottom_left += bilinear_weight(0, tap, low) * tl.where(inside, bottom, 0.0)
                if bilinear_weight(1, tap, low) > 0:
                    inside = x < width - 1 if tap == 2 else x >= 0
                    top_right += bilinear_weight(1, tap, low) * tl.where(inside, top, 0.0)
                    bottom_right += bilinear_weight(1, tap, low) * tl.where(inside, bottom, 0.0)
    # output (2y, 2x): over pixel line * width + x lies 2 line * 2 width + 2x
    corner = out_ptr + (4 * pixel - 2 * x) * channels + channel
    top_left = _store(corner, top_left, mask)
    top_right = _store(corner + channels, top_right, mask)
    corner += 2 * width.to(tl.int64) * channels
    bottom_left = _store(corner, bottom_left, mask)
    bottom_right = _store(corner + channels, bottom_right, mask)
    if HAS_STATS:
        count = (4 * tl.minimum(pixels - tl.program_id(0) * BLOCK_P, BLOCK_P)).to(tl.float32)
        total = tl.where(mask, top_left + top_right + bottom_left + bottom_right, 0.0)
        center = tl.sum(total, axis=0)[None, :] / count  # their mean, but for its rounding
        top_left, top_right = tl.where(mask, top_left - center, 0.0), tl.where(mask, top_right - center, 0.0)
        bottom_left, bottom_right = (
            tl.where(mask, bottom_left - center, 0.0),
            tl.where(mask, bottom_right - center, 0.0),
        )
        rest = tl.sum(top_left + top_right + bottom_left + bottom_right, axis=0)[None, :]
        square = top_left * top_left + top_right * top_right + bottom_left * bottom_left + bottom_right * bottom_right
        moments_ptr += tl.program_id(0) * channels + channel
        plane = tl.num_programs(0) * channels
        tl.store(moments_ptr, tl.broadcast_to(count, [1, BLOCK_C]), mask=channel < channels)
        tl.store(moments_ptr + plane, center, mask=channel < channels)
        tl.store(moments_ptr + 2 * plane, rest, mask=channel < channels)
        tl.store(moments_ptr + 3 * plane, tl.sum(square, axis=0)[None, :], mask=channel < channels)


@triton.jit
def _store(pointer, value, mask):
    """Store, and return as float32 what was stored."""
    rounded = value.to(pointer.dtype.element_ty)
    tl.store(pointer, rounded, mask=mask)
    return rounded.to(tl.float32)


def _parts(x: Tensor, channels: int) -> Iterator[slice]:
    """Slices of the batch whose tap images stay below the bound; with it, pixels stay below 2^31."""
    pixels = x.shape[2] * x.shape[3]
    config = choose("upsample_conv parts", PARTS, x.device, x.dtype, x.shape[0] * pixels)
    step = max(1, config["PART_BYTES"] // max(1, 9 * channels * pixels * x.element_size()))
    return (slice(first, first + step) for first in range(0, x.shape[0], step))


def _rows(image: Tensor) -> Tensor:
    """(n, C, H, W) -> (n H W, C), contiguous: a view of channels_last images, a copy of others."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1]).contiguous()


def _tap_matrix(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) -> (9C', C), taps outermost."""
    return weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1])


def _empty_image(like: Tensor, channels: int, scale: int = 1) -> Tensor:
    batch, _, height, width = like.shape
    pixels = torch.empty((batch, scale * height, scale * width, channels), dtype=like.dtype, device=like.device)
    return pixels.permute(0, 3, 1, 2)


def _config(kernel: Any, table: dict[tuple[int, bool], Config], x: Tensor, channels: int) -> Config:
    aligned = channels % 16 == 0
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    config = table[x.element_size(), aligned]
    return choose(kernel, config, x.device, x.dtype, pixels, "" if aligned else "odd width")


def _grid(config: Config, pixels: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(pixels, config["BLOCK_P"]), triton.cdiv(channels, config["BLOCK_C"])


def _gather(x: Tensor, weight: Tensor, bias: Tensor | None, with_stats: bool) -> tuple[Tensor, list[Tensor]]:
    """The output and, if wanted, the moments (4, tiles, C') of the tiles of every part: see _combine."""
    channels, (height, width) = weight.shape[0], x.shape[2:]
    out, moments = _empty_image(x, channels, 2), []
    matrix = _tap_matrix(weight).t()
    bias = None if bias is None else bias.contiguous()
    config = _config(_gather_kernel, GATHER, x, channels)
    flags = {"HAS_BIAS": bias is not None, "HAS_STATS": with_stats}
    for part in _parts(x, channels) if out.numel() else ():
        rows = _rows(x[part])
        grid = _grid(config, rows.shape[0], channels)
        if with_stats:
            moments.append(torch.empty((4, grid[0], channels), dtype=torch.float32, device=x.device))
        tensors = (out[part], moments[-1] if with_stats else None, torch.mm(rows, matrix), bias)
        launch(_gather_kernel, grid, *tensors, rows.shape[0], height, width, channels, config=config, **flags)
    return out, moments


def _combine(moments: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C',) of all outputs, in float64, in order.

    A tile's moments are the count of its outputs v, a center, and the sums of v - center and of its square. The center
    is near the tile's mean, so the sums lose no digits where the mean is large.
    """
    count, center, rest, square = torch.cat(moments, dim=1).double()
    total = count.sum(0)
    mean = (count * center + rest).sum(0) / total
    offset = center - mean
    var = (square + 2 * offset * rest + count * offset.square()).sum(0) / total
    return mean.float(), var.float()


def _gradients(dout: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """dx, channels_last, and dweight; an empty tensor in place of one that nobody needs."""
    channels, (height, width) = weight.shape[0], x.shape[2:]
    matrix = _tap_matrix(weight)
    dx = _empty_image(x, x.shape[1]) if need_x else x.new_empty(0)
    dmatrix = torch.zeros(matrix.shape, dtype=torch.float32, device=x.device) if need_weight else None
    config = _config(adjoint_kernel, ADJOINT, x, channels)
    for part in _parts(x, channels) if dout.numel() else ():
        rows = _rows(x[part])
        dtaps = torch.empty((rows.shape[0], matrix.shape[0]), dtype=x.dtype, device=x.device)
        sizes = (rows.shape[0], height, width, channels)
        grid = _grid(config, sizes[0], channels)
        launch(adjoint_kernel, grid, dtaps, _rows(dout[part]), *sizes, config=config)
        if need_x:
            torch.mm(dtaps, matrix, out=_rows(dx[part]))
        if dmatrix is not None:
            dmatrix += torch.mm(dtaps.t(), rows)
    if dmatrix is None:
        return dx, x.new_empty(0)
    dweight = dmatrix.view(3, 3, channels, -1).permute(2, 3, 0, 1)
    return dx, dweight.to(x.dtype).contiguous()


@torch.library.custom_op("fastris::upsample2x_conv3x3", mutates_args=())
def upsample2x_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv3x3(up2(x)) for x (B, C, H, W), weight (C', C, 3, 3), bias (C',): (B, C', 2H, 2W), channels_last."""
    with torch.autocast(x.device.type, enabled=False):
        return _gather(x, weight, bias, False)[0]


@upsample2x_conv3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _empty_image(x, weight.shape[0], 2)


@torch.library.custom_op("fastris::upsample2x_conv3x3_stats", mutates_args=())
def upsample2x_conv3x3_stats(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with the mean and biased variance (C',), float32, of the output over B, 2H and 2W. B >= 1."""
    with torch.autocast(x.device.type, enabled=False):
        out, moments = _gather(x, weight, bias, True)
    return out, *_combine(moments)


@upsample2x_conv3x3_stats.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(weight.shape[0], dtype=torch.float32)
    return _empty_image(x, weight.shape[0], 2), mean, torch.empty_like(mean)


@torch.library.custom_op("fastris::upsample2x_conv3x3_backward", mutates_args=())
def _convolution_backward(
    dout: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return _gradients(dout, x, weight, need_x, need_weight)


@_convolution_backward.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    dx = _empty_image(x, x.shape[1]) if need_x else x.new_empty(0)
    return dx, weight.new_empty(weight.shape if need_weight else 0)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _backward(ctx, dout: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors[:2]
    need_x, need_weight, need_bias = ctx.needs_input_grad
    dx = dweight = None
    if need_x or need_weight:
        dx, dweight = _convolution_backward(dout, x, weight, need_x, need_weight)
    dbias = dout.sum((0, 2, 3)) if need_bias else None
    return dx if need_x else None, dweight if need_weight else None, dbias


def _setup_stats_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[0], output[1])
    ctx.set_materialize_grads(False)


def _stats_backward(ctx, dout: Tensor | None, dmean: Tensor | None, dvar: Tensor | None):
    """d mean / d out = 1 / N and d var / d out = 2 (out - mean) / N for the N outputs of a channel.

    A BatchNorm that gives the whole gradient of ``out`` itself leaves the other two out, and nothing is added.
    """
    out, mean = ctx.saved_tensors[2:]
    count = out.numel() // out.shape[1]
    total = torch.zeros_like(out) if dout is None else dout
    if dvar is not None:
        total = total + 2 * dvar[:, None, None] * (out - mean[:, None, None]) / count
    if dmean is not None:
        total = total + dmean[:, None, None] / count
    return _backward(ctx, total.to(out.dtype))


upsample2x_conv3x3.register_autograd(_backward, setup_context=_setup_context)
upsample2x_conv3x3_stats.register_autograd(_stats_backward, setup_context=_setup_stats_context)


def _product_flops(x_shape, weight_shape) -> int:
    """Of the matrix product C -> 9C'; the gather is not counted, as PyTorch counts no interpolation."""
    batch, _, height, width = x_shape
    return 2 * batch * height * width * math.prod(weight_shape)


@register_flop_formula([torch.ops.fastris.upsample2x_conv3x3, torch.ops.fastris.upsample2x_conv3x3_stats])
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _product_flops(x_shape, weight_shape)


@register_flop_formula(torch.ops.fastris.upsample2x_conv3x3_backward)
def _(dout_shape, x_shape, weight_shape, need_x, need_weight, *args, out_shape=None, **kwargs) -> int:
    return (need_x + need_weight) * _product_flops(x_shape, weight_shape)
