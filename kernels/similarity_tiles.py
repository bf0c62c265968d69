"""What both passes of the text-to-pixel similarity share: tiles, the norm before it, and the count of operations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import device_class

# Columns of a tile: 16, the least that a matrix product takes, hold one query at k = 3, and 32 hold k = 5 or three
# queries. Beyond that the features are read once per 32 columns.
COLUMN_BLOCKS = (16, 32)
# Tiles of the features in flight, 8 to 16 KiB each. Warps and tile sizes are such that nothing spills where H*W is odd
# and every element of a tile has an address of its own. float32 products are IEEE, outside the tensor cores, and take
# smaller tiles.
STAGES = {"large": 4, "small": 3, "tiny": 2}
# A norm that is applied as the features are read takes registers of its own: tiles by twice the warps. Where a tile's
# addresses do not follow from one another, or its columns are more, or on AMD, builds spilled: there it is no part.
NORMED_WARPS = 8
NORMED_CHANNELS = 16


def column_block(columns: int) -> int:
    """The smallest tile that holds all columns, or the largest."""
    return next((block for block in COLUMN_BLOCKS if columns <= block), COLUMN_BLOCKS[-1])


def similarity_flops(x_shape, columns: int) -> int:
    """Of the skinny product, or of one of its two gradients; the shift-add is left out, as counters do."""
    batch, channels, pixels = x_shape
    return 2 * batch * channels * pixels * columns


# Another batch, height or number of text kernels compiles no other program.
SIZES = ("batch", "columns", "height", "width")


def norm_fits(device: torch.device, channels: int, columns: int) -> bool:
    """Whether kernels apply the norm of channels_last features themselves, so many channels for so many columns."""
    return device_class(device) != "tiny" and channels % NORMED_CHANNELS == 0 and columns <= COLUMN_BLOCKS[0]


def variant_of(block: str, norm: object) -> str:
    """What a launch table depends on beside card and dtype: ``block``, and whether the features are normed as read."""
    return block if norm is None else f"{block} norm"


@triton.jit
def norm_of(norm_ptr, channel, channels):
    """Mean, 1 / deviation, weight and bias of these channels, from a norm's rows [4, C]; zeros beyond the last one."""
    inside = channel < channels
    mean = tl.load(norm_ptr + channel, mask=inside, other=0.0)
    rate = tl.load(norm_ptr + channels + channel, mask=inside, other=0.0)
    weight = tl.load(norm_ptr + 2 * channels + channel, mask=inside, other=0.0)
    bias = tl.load(norm_ptr + 3 * channels + channel, mask=inside, other=0.0)
    return mean, rate, weight, bias
