"""Fixed tables, of sine positions and of resizing, computed once per size and device and then cached.

While compiling, and under PyTorch's fake tensors, which have shapes and no numbers, they are computed anew: what is
made there means nothing outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastris import reference


def pixel_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """The table of a pixel grid, (height*width, dim) float32; see :func:`fastris.reference.sine_positions_2d`."""
    return _table(reference.sine_positions_2d, device, height, width, dim)


def word_positions(length: int, dim: int, device: torch.device) -> Tensor:
    """The table of a sentence's words, (length, dim) float32; see :func:`fastris.reference.sine_positions_1d`."""
    return _table(reference.sine_positions_1d, device, length, dim)


def box_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """The table of a pixel grid in AlignFormer; see :func:`fastris.reference.sine_positions_of_box`."""
    return _table(reference.sine_positions_of_box, device, height, width, dim)


def _table(table: Callable[..., Tensor], device: torch.device, *sizes: int) -> Tensor:
    if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:
        return table(*sizes, device=device)
    return _cached(table, device, *sizes)


def pyramid_spread(height: int, width: int, sides: tuple[int, ...], device: torch.device) -> Tensor:
    """The matrix that resizes pooled maps; see :func:`fastris.reference.spread_matrix`."""
    return _table(reference.spread_matrix, device, height, width, *sides)


@functools.lru_cache(maxsize=64)
def _cached(table: Callable[..., Tensor], device: torch.device, *sizes: int) -> Tensor:
    with torch.inference_mode(False):  # a table made under inference mode could not take part in training later
        return table(*sizes).to(device)
