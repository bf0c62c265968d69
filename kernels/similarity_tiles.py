"""What both passes of the text-to-pixel similarity share: tiles, and the count of operations."""

from __future__ import annotations

# Columns of a tile: 16, the least that a matrix product takes, hold one query at k = 3, and 32 hold k = 5 or three
# queries. Beyond that the features are read once per 32 columns.
COLUMN_BLOCKS = (16, 32)
# Tiles of the features in flight, 8 to 16 KiB each. Warps and tile sizes are such that nothing spills where H*W is odd
# and every element of a tile has an address of its own. float32 products are IEEE, outside the tensor cores, and take
# smaller tiles.
STAGES = {"large": 4, "small": 3, "tiny": 2}


def column_block(columns: int) -> int:
    """The smallest tile that holds all columns, or the largest."""
    return next((block for block in COLUMN_BLOCKS if columns <= block), COLUMN_BLOCKS[-1])


def similarity_flops(x_shape, columns: int) -> int:
    """Of the skinny product, or of one of its two gradients; the shift-add is left out, as counters do."""
    batch, channels, pixels = x_shape
    return 2 * batch * channels * pixels * columns


# Another batch, height or number of text kernels compiles no other program.
SIZES = ("batch", "columns", "height", "width")
