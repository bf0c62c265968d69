"""MagNet's pooled maps and what mixes them with the full one (arXiv 2312.12198, released evaluation code)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pyramid_mix(
    pooled: Sequence[Tensor],
    residual: Tensor,
    size: tuple[int, int],
    sides: Sequence[int],
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """``W [up(pooled_1), ..., residual] + b``, (B, N, D): the first layer of the mixer.

    ``pooled``: maps (B, p * p, C / 4) for each side p of ``sides``, resized to ``size`` = (H, W) bilinearly, corners
    aligned. ``residual`` (B, N, C) with N = H * W comes last. ``weight`` (D, C + sum of the pooled widths).
    """
    grown = []
    for side, each in zip(sides, pooled, strict=True):
        maps = each.transpose(1, 2).unflatten(2, (side, side))
        grown.append(F.interpolate(maps, size, mode="bilinear", align_corners=True).flatten(2).transpose(1, 2))
    return F.linear(torch.cat([*grown, residual], dim=-1), weight, bias)


def spread_matrix(height: int, width: int, *sides: int, device: torch.device | str = "cpu") -> Tensor:
    """The resizing above as a matrix (height * width, sum of p * p) in float64: a row for each pixel."""
    columns = []
    for side in sides:
        units = torch.eye(side * side, dtype=torch.float64, device=device).view(1, side * side, side, side)
        columns.append(F.interpolate(units, (height, width), mode="bilinear", align_corners=True)[0].flatten(1).T)
    return torch.cat(columns, dim=1)
