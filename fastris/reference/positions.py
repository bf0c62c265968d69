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


def sine_positions_of_box(height: int, width: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Position table (height*width, dim) on a grid whose sides both measure 2 pi, as DETR's (arXiv 2005.12872).

    Pixel i of n is at ``2 pi (i + 1) / (n + 1e-6)``; the first half of the channels codes y, the second half x; channel
    i of those n_c divides by ``10000^(2 floor(i / 2) / n_c)``, sine and cosine in turn. In float32.
    """
    if dim % 4:
        raise ValueError(f"dim must be divisible by 4 to hold sine and cosine of x and of y, got {dim}")

    def table(length: int) -> Tensor:
        place = (torch.arange(length, dtype=torch.float32, device=device) + 1) / (length + 1e-6) * (2 * math.pi)
        divisor = 10000 ** (torch.arange(0, dim // 2, 2, dtype=torch.float32, device=device) / (dim // 2))
        angle = place[:, None] / divisor
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)

    y = table(height)[:, None, :].expand(height, width, dim // 2)
    x = table(width)[None, :, :].expand(height, width, dim // 2)
    return torch.cat([y, x], dim=-1).reshape(height * width, dim)


def append_coordinates(x: Tensor) -> Tensor:
    """CoordConv's input: (B, C, H, W) -> (B, C+2, H, W), with x and then y running over [-1, 1]."""
    batch, _, height, width = x.shape
    column = torch.linspace(-1, 1, width, device=x.device)
    row = torch.linspace(-1, 1, height, device=x.device)
    y_grid, x_grid = torch.meshgrid(row, column, indexing="ij")
    return torch.cat([x, x_grid.expand(batch, 1, -1, -1), y_grid.expand(batch, 1, -1, -1)], dim=1)
