"""Convolution of a map and its coordinates, in plain PyTorch: the coordinates are convolved once for the whole batch.

CoordConv's two coordinate channels do not depend on the input:  W * cat[x, grid] = W_x * x + W_grid * grid.  The last
term is one map for the whole batch, and x keeps its width, which tensor cores like better than two channels more.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastris import reference
from fastris.dispatch import requested_impl
from fastris.ops.checks import check_shape, check_tensors


def coord_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Convolution of x with x and y coordinates in [-1, 1] appended as two channels: (B, C, H, W) -> (B, C', H', W').

    Args:
        x: (B, C, H, W).
        weight: (C', C + 2, k, k), its last two input channels for x and for y; bias (C',) or None.
        stride, padding: those of the convolution; H' = (H + 2 padding - k) // stride + 1.
        impl: ``"reference"`` concatenates and convolves as published; every other choice splits the coordinates off,
            in plain PyTorch on any device and dtype.

    The coordinates are float32 numbers, as published, rounded to the dtype that the convolution computes in. The result
    is in autocast's dtype where autocast is on, else in x's. Raises ValueError for a weight that does not fit or
    tensors on different devices, TypeError for dtypes that do not fit.

    Source: CRIS section 3.2; published ``CoordConv``; :func:`fastris.reference.coord_conv`.
    """
    check_tensors("coord_conv", x=x, weight=weight, bias=bias)
    check_shape("coord_conv", "x", x, ("B", "C", "H", "W"))
    channels = x.shape[1]
    check_shape("coord_conv", "weight", weight, ("C'", channels + 2, "k", "k"))
    if bias is not None:
        check_shape("coord_conv", "bias", bias, (weight.shape[0],))
    if requested_impl(impl) == "reference":
        return reference.coord_conv(x, weight, bias, stride, padding)
    grid = reference.append_coordinates(x.new_empty(1, 0, *x.shape[2:])).to(x.dtype)
    own, fixed = weight.split([channels, 2], dim=1)
    return F.conv2d(x, own, None, stride, padding) + F.conv2d(grid, fixed, bias, stride, padding)
