"""The projector's two heavy layers (CRIS, section 3.4): upsample, then convolve."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def upsample2x_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``conv3x3(up2(x))``: (B, C, H, W) -> (B, C', 2H, 2W); bilinear, align_corners=False, zero-padded."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="bilinear"), weight, bias, padding=1)
