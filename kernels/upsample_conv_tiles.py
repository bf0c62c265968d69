"""What both passes of the upsampling convolution share: which sizes are free, and the tile of a program."""

from __future__ import annotations

import triton
import triton.language as tl

# Another batch or picture compiles no other program; the channels' divisibility decides how wide loads are.
SIZES = ("pixels", "height", "width")


@triton.jit
def tile(pixels, height, width, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's pixels [BLOCK_P, 1] of all samples in one row, their y and x, channels [1, BLOCK_C], and mask."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (pixel < pixels) & (channel < channels)
    return pixel.to(tl.int64), pixel // width % height, pixel % width, channel, mask
