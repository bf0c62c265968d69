"""The proofs of MagNet's own operators; see :mod:`.proofs`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastris.ops.pixel_contrast import pixel_contrast
from fastris.ops.pixel_word_attention import pixel_word_attention
from fastris.ops.proving import REAL_WORDS, Inputs, drawn, hold, sizes_on
from fastris.reference import PixelWordWeights


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


def prove_pixel_word_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Through the query's weights and through the queries, as training does, in low precision under autocast, too.

    The keys' bias, which a softmax takes out, is zeros: its gradient is nothing but rounding.
    """
    channels, height = sizes_on(device)[:2]
    valid = torch.arange(max(REAL_WORDS), device=device)[None] < torch.tensor(REAL_WORDS, device=device)[:, None]
    for width, count in ((channels // 2, 11 * height), (channels, 2 * height + 28)):
        inputs = _pixel_word_inputs(device, width, 3 * width, count)

        def by(impl: str, width: int = width) -> Callable[..., Tensor]:
            def attend(pixels: Tensor, words: Tensor, **given: Tensor) -> Tensor:
                weights = PixelWordWeights(**given, key_bias=words.new_zeros(width))
                return pixel_word_attention(pixels, words, valid, weights, impl=impl)

            return attend

        hold(by("triton"), by("reference"), inputs, dtype)
        if dtype is not torch.float32:
            hold(by("triton"), by("reference"), inputs, torch.float32, autocast=dtype)


def _pixel_word_inputs(device: torch.device, width: int, text_width: int, count: int) -> Inputs:
    """Pixels, words, and all weights but the keys' bias."""
    rows = {name: text_width if name.startswith(("key", "value")) else width for name in PixelWordWeights._fields}
    matrices = [name for name in rows if name.endswith("weight") and "norm" not in name]
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= {name: (width, rows[name]) if name in matrices else (width,) for name in rows if name != "key_bias"}
    inputs = {name: value / rows[name] ** 0.5 for name, value in drawn(shapes, device, 1.0).items()}
    for name in ("query_norm_weight", "out_norm_weight"):
        inputs[name] += 1
    words = (2, max(REAL_WORDS), text_width)
    return inputs | drawn({"pixels": (2, count, width), "words": words}, device, 1.0)


MAGNET: dict[str, Callable[[torch.device, torch.dtype], None]] = {
    "pixel_contrast": prove_pixel_contrast,
    "pixel_word_attention": prove_pixel_word_attention,
}
"""By the operator's name."""
