"""The adjoint of the upsampling convolution's gather: from d(out) to d(taps), in the notation of :mod:`.upsample_conv`.

    dtaps[y, x, t, c']  =  sum_YX a(Y + t_y - 1, y) a(X + t_x - 1, x) dout[Y, X, c']

The nine taps of one pixel read 6x6 outputs together. Each output is read once, and each element of d(taps) written
once. What is left of backward are two matrix products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .configs import Config
from .upsample_conv_tiles import SIZES, tile

# As the gather's table. An element's nine sums live in registers together, so fewer warps share a block.
_MORE_WARPS = (Config((("BLOCK_P", 16), ("BLOCK_C", 64)), num_warps=8, num_stages=1),)
ADJOINT = {
    (2, True): Config((("BLOCK_P", 8), ("BLOCK_C", 64)), num_warps=4, num_stages=1, alternatives=_MORE_WARPS),
    (4, True): Config((("BLOCK_P", 16), ("BLOCK_C", 32)), num_warps=4, num_stages=1),
    (2, False): Config((("BLOCK_P", 2), ("BLOCK_C", 64)), num_warps=4, num_stages=1),
    (4, False): Config((("BLOCK_P", 4), ("BLOCK_C", 32)), num_warps=4, num_stages=1),
}


@triton.jit
def _reach(y, height):
    """Weights of pixel y in the upsampled positions 2y - 1 .. 2y + 2; the image's border is clamped."""
    first, last = y == 0, y == height - 1
    inner_first, inner_last = tl.where(first, 1.0, 0.75), tl.where(last, 1.0, 0.75)
    return tl.where(first, 0.0, 0.25), inner_first, inner_last, tl.where(last, 0.0, 0.25)


@triton.jit
def _add_to_taps(taps, weights, PLACE: tl.constexpr, value):
    """The three taps' sums, with the output at 2y + PLACE added: tap t took upsampled position 2y + PLACE + t - 1."""
    first, second, third = taps
    if PLACE >= 0:
        first += weights[PLACE] * value
    if PLACE >= -1 and PLACE <= 2:
        second += weights[PLACE + 1] * value
    if PLACE <= 1:
        third += weights[PLACE + 2] * value
    return first, second, third


@triton.jit
def _store_taps(pointers, taps, channels, mask):
    tl.store(pointers, taps[0].to(pointers.dtype.element_ty), mask=mask)
    tl.store(pointers + channels, taps[1].to(pointers.dtype.element_ty), mask=mask)
    tl.store(pointers + 2 * channels, taps[2].to(pointers.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def adjoint_kernel(
    dtaps_ptr,
    dout_ptr,
    pixels,
    height,
    width,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dtaps[y, x, t, c']: tap t takes upsampled position u to output u + 1 - t, so 4x4 outputs used it, and 6x6 the
    nine taps together: each is loaded once, and added along y, then along x."""
    pixel, y, x, channel, mask = tile(pixels, height, width, channels, BLOCK_P, BLOCK_C)
    weight_y = _reach(y, height)
    weight_x = _reach(x, width)
    line = 2 * width.to(tl.int64) * channels
    corner = dout_ptr + (4 * pixel - 2 * x) * channels + channel  # output (2y, 2x)
    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    top, middle, bottom = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)
    for column in tl.static_range(-2, 4):
        has_column = mask & (2 * x + column >= 0) & (2 * x + column < 2 * width)
        sums = (zero, zero, zero)
        for row in tl.static_range(-2, 4):
            inside = has_column & (2 * y + row >= 0) & (2 * y + row < 2 * height)
            value = tl.load(corner + (row * line + column * channels), mask=inside, other=0.0).to(tl.float32)
            sums = _add_to_taps(sums, weight_y, row, value)
        top = _add_to_taps(top, weight_x, column, sums[0])
        middle = _add_to_taps(middle, weight_x, column, sums[1])
        bottom = _add_to_taps(bottom, weight_x, column, sums[2])
    target = dtaps_ptr + pixel * 9 * channels + channel
    _store_taps(target, top, channels, mask)
    _store_taps(target + 3 * channels, middle, channels, mask)
    _store_taps(target + 6 * channels, bottom, channels, mask)
