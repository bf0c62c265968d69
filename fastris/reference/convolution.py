"""The neck's 1x1 and coordinate convolutions and the projector's upsampled 3x3 one (CRIS, sections 3.2 and 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris.reference.positions import append_coordinates


def upsample2x_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``conv3x3(up2(x))``: (B, C, H, W) -> (B, C', 2H, 2W); bilinear, align_corners=False, zero-padded."""
    return F.conv2d(_up2(x), weight, bias, padding=1)


def pointwise_conv_cat(
    full: Sequence[Tensor], half: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """1x1 convolution of ``cat[*full, *(up2(h) for h in half)]``: maps (B, C_i, 2H, 2W) and (B, C_j, H, W)."""
    return F.conv2d(torch.cat([*full, *map(_up2, half)], dim=1), weight, bias)


def coord_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolution of x (B, C, H, W) with its coordinates appended as two channels, in x's dtype: (B, C', H', W')."""
    return F.conv2d(append_coordinates(x).to(x.dtype), weight, bias, stride, padding)


def _up2(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")
