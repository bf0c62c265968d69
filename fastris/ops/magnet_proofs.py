"""The proofs of MagNet's own operators; see :mod:`.proofs`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fastris.ops.pixel_contrast import pixel_contrast
from fastris.ops.proving import drawn, hold, sizes_on


def prove_pixel_contrast(device: torch.device, dtype: torch.dtype) -> None:
    """Of a map as wide as MagNet's, in both memory layouts; temperatures that leave every pixel a weight."""
    channels, height = sizes_on(device)[:2]
    mask = torch.zeros(2, 1, 4 * height, 44, device=device)
    mask[0, :, : 2 * height, :30], mask[1, :, 2 * height :, 14:] = 1, 1
    inputs = drawn({"features": (2, channels, height, 11), "sentence": (2, channels)}, device, 1.0)
    loss = partial(pixel_contrast, mask=mask, pixel_temperature=0.5, text_temperature=0.3)
    fast, published = (partial(loss, impl=impl) for impl in ("triton", "reference"))
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs["features"] = inputs["features"].contiguous(memory_format=layout)
        hold(fast, published, inputs, dtype)


MAGNET: dict[str, Callable[[torch.device, torch.dtype], None]] = {
    "pixel_contrast": prove_pixel_contrast,
}
"""By the operator's name."""
