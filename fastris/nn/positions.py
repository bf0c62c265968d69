"""Fixed tables, of sine positions and of resizing, computed once per size and device and then cached."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastris import reference


def pixel_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """The table of a pixel grid, (height*width, dim) float32; see :func:`fastris.reference.sine_positions_2d`."""
    if torch.compiler.is_compiling():
        return reference.sine_positions_2d(height, width, dim, device)
    return _cached(reference.sine_positions_2d, device, height, width, dim)


def word_positions(length: int, dim: int, device: torch.device) -> Tensor:
    """The table of a sentence's words, (length, dim) float32; see :func:`fastris.reference.sine_positions_1d`."""
    if torch.compiler.is_compiling():
        return reference.sine_positions_1d(length, dim, device)
    return _cached(reference.sine_positions_1d, device, length, dim)


def box_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """The table of a pixel grid in AlignFormer; see :func:`fastris.reference.sine_positions_of_box`."""
    if torch.compiler.is_compiling():
        return reference.sine_positions_of_box(height, width, dim, device)
    return _cached(reference.sine_positions_of_box, device, height, width, dim)


def pyramid_spread(height: int, width: int, sides: tuple[int, ...], device: torch.device) -> Tensor:
    """The matrix that resizes pooled maps; see :func:`fastris.reference.spread_matrix`."""
    if torch.compiler.is_compiling():
        return reference.spread_matrix(height, width, *sides, device=device)
    return _cached(reference.spread_matrix, device, height, width, *sides)


@functools.lru_cache(maxsize=64)
def _cached(table: Callable[..., Tensor], device: torch.device, *sizes: int) -> Tensor:
    with torch.inference_mode(False):  # a table made under inference mode could not take part in training later
        return table(*sizes).to(device)
