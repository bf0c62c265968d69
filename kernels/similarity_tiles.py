"""What both passes of the text-to-pixel similarity share: tiles, the count of operations, and variants for the gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .configs import Config

if TYPE_CHECKING:
    from .gate import GateSpec

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


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel that touches the features: their dtype, memory format and the product's precision."""

    label: str
    dtype: torch.dtype
    precision: str
    unit_stride: str
    aligned: bool

    def spec(self, name: str, kernel: Any, config: Config, **constexprs: int) -> GateSpec:
        """The build of ``kernel``; argument types follow from the names that all these kernels share."""
        from .gate import POINTER, GateSpec

        constexprs_here = {"PRECISION": self.precision, self.unit_stride: 1, **constexprs}
        names = [n for n in kernel.arg_names if n not in constexprs_here and n not in dict(config.blocks)]
        signature = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in names}
        signature |= {n: POINTER[self.dtype] for n in ("x_ptr", "dx_ptr") if n in names} | {"stride_xb": "i64"}
        even = [n for n in ("stride_xb", "stride_xc", "stride_xp", "channels", "pixels") if n in names]
        label = f"similarity {name} {self.label}"
        return GateSpec(label, kernel, signature, constexprs_here, config, tuple(even) if self.aligned else ())


def variants(shared: str, dtype: torch.dtype) -> Iterator[Variant]:
    """NCHW with H*W a multiple of 16 or not, channels_last, and TF32 where float32 may use it."""
    yield Variant("NCHW", dtype, "ieee", "stride_xp", True)
    yield Variant("NCHW odd", dtype, "ieee", "stride_xp", False)
    yield Variant("NHWC", dtype, "ieee", "stride_xc", True)
    if dtype is torch.float32 and shared != "tiny":
        yield Variant("NCHW tf32", dtype, "tf32", "stride_xp", True)
