"""What every proof of kernels uses: sizes, numbers drawn, and the comparison of two paths. See :mod:`.proofs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastris.testing import EPS, assert_path_same

Inputs = dict[str, Tensor]

TF32_ROUNDING = 2**-11
"""Half a unit in the last place of 1, in TF32."""
REAL_WORDS = (17, 9)
SEED = 3


class Sizes(NamedTuple):
    """``channels`` and ``height`` of the projector's maps; pixels and heads of the decoder, which is twice as wide.

    ``draws`` of upstream gradients in low precision, whose errors are pooled.
    """

    channels: int
    height: int
    rows: int
    heads: int
    draws: int


ON_A_GPU, INTERPRETED = Sizes(256, 13, 41, 8, 8), Sizes(32, 2, 5, 2, 2)
"""CRIS's own, and what Triton's interpreter does in a second."""


def hold(
    fast: Callable, published: Callable, inputs: Inputs, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> None:
    """Raise :class:`fastris.testing.WrongNumber` where ``fast`` is further from float64 than in any test."""
    device, computed = next(iter(inputs.values())).device, autocast or dtype
    if computed is torch.float32:
        from fastris.kernels.common import dot_precision

        tf32 = device.type == "cuda" and dot_precision(computed) == "tf32"
        draws, rounding = 1, TF32_ROUNDING if tf32 else None
    else:
        draws, rounding = sizes_on(device).draws, EPS[computed]
    assert_path_same(fast, published, inputs, dtype, draws, autocast=autocast, rounding=rounding)


def sizes_on(device: torch.device) -> Sizes:
    """Of what a proof on ``device`` runs."""
    return ON_A_GPU if device.type == "cuda" else INTERPRETED


def drawn(shapes: dict[str, tuple[int, ...]], device: torch.device, scale: float) -> Inputs:
    """Random numbers by name, the same on every device."""
    generator = torch.Generator().manual_seed(SEED)
    return {name: (scale * torch.randn(shape, generator=generator)).to(device) for name, shape in shapes.items()}
