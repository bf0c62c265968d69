"""Multi-scale deformable attention: each query reads a few bilinear samples of several maps (arXiv 2010.04159).

The part between the projections, in the form of ``grid_sample``. Shapes: B batch, Q queries, H heads of width D,
S levels, P points per level, M = sum of the levels' pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def multiscale_deformable_attention(
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor:
    """Weighted sums of samples at learned offsets from each query's own place: (B, Q, H * D).

    Args:
        value: (B, M, H, D), the levels one behind the other, each row by row.
        sizes: height and width in pixels of each level.
        reference_points: (Q, 2), each query's x and y in [0, 1], the same in every level.
        offsets: (B, Q, H, S, P, 2), x and y in pixels of the level that is sampled.
        logits: (B, Q, H, S * P); softmax over the last axis gives the samples' weights.

    A sample is bilinear with pixel centres at half-integers (align_corners=False); outside a map there are zeros.
    """
    batch, queries, heads, levels, points, _ = offsets.shape
    weights = logits.softmax(dim=-1).reshape(batch, queries, heads, levels, points)
    scale = offsets.new_tensor([(width, height) for height, width in sizes])  # [S, 2]
    places = reference_points.to(offsets)[:, None, None, None] + offsets / scale[:, None]  # [B, Q, H, S, P, 2]
    total: Tensor | float = 0.0
    for level, maps in enumerate(value.split([height * width for height, width in sizes], dim=1)):
        height, width = sizes[level]
        maps = maps.permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
        grid = 2 * places[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # [B*H, Q, P, 2]
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        total = total + (samples * weight).sum(-1)  # [B*H, D, Q]
    assert isinstance(total, Tensor)
    return total.reshape(batch, -1, queries).transpose(1, 2)


def pixel_centres(
    sizes: Sequence[tuple[int, int]], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Reference points (M, 2) of queries that are the levels' own pixels: x and y in [0, 1]."""
    levels = []
    for height, width in sizes:
        y = (torch.arange(height, dtype=dtype, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=dtype, device=device) + 0.5) / width
        levels.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1))
    return torch.cat(levels)
