"""Position encodings: the decoder's sine tables and CoordConv's coordinate channels (CRIS, sections 3.2 and 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_positions_1d(length: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Fixed sine/cosine position table (length, dim), sine and cosine interleaved, in float32."""
    if dim % 2:
        raise ValueError(f"dim must be even to hold sine and cosine pairs, got {dim}")
    frequency = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32, device=device) * (-math.log(10000.0) / dim))
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def sine_positions_2d(height: int, width: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Position table (height*width, dim) of a pixel grid: the first half of the channels codes x, the second half y."""
    if dim % 4:
        raise ValueError(f"dim must be divisible by 4 to hold sine and cosine of x and of y, got {dim}")
    x = sine_positions_1d(width, dim // 2, device)[None, :, :].expand(height, width, dim // 2)
    y = sine_positions_1d(height, dim // 2, device)[:, None, :].expand(height, width, dim // 2)
    return torch.cat([x, y], dim=-1).reshape(height * width, dim)


def append_coordinates(x: Tensor) -> Tensor:
    """CoordConv's input: (B, C, H, W) -> (B, C+2, H, W), with x and then y running over [-1, 1]."""
    batch, _, height, width = x.shape
    column = torch.linspace(-1, 1, width, device=x.device)
    row = torch.linspace(-1, 1, height, device=x.device)
    y_grid, x_grid = torch.meshgrid(row, column, indexing="ij")
    return torch.cat([x, x_grid.expand(batch, 1, -1, -1), y_grid.expand(batch, 1, -1, -1)], dim=1)
