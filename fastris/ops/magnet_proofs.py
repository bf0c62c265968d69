"""The proofs of MagNet's own operators; see :mod:`.proofs`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastris.ops.pixel_contrast import pixel_contrast
from fastris.ops.pixel_word_attention import pixel_word_attention
from fastris.ops.proving import REAL_WORDS, Inputs, drawn, hold, sizes_on
from fastris.ops.word_pixel_attention import word_pixel_attention
from fastris.reference import PixelWordWeights, WordPixelWeights


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


def prove_word_pixel_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Through projected maps, and through the pixels' covariance; the biases that a norm takes out are zeros."""
    channels, height = sizes_on(device)[:2]
    valid = torch.arange(max(REAL_WORDS), device=device)[None] < torch.tensor(REAL_WORDS, device=device)[:, None]
    for width, text_width in ((channels, 2 * channels), (channels // 8, channels // 8)):
        columns = {
            name: width if name.startswith(("key", "value")) else text_width for name in WordPixelWeights._fields
        }
        shapes: dict[str, tuple[int, ...]] = {
            name: (text_width, columns[name]) for name in columns if name.endswith("weight")
        }
        shapes |= {f"{part}_bias": (text_width,) for part in ("project", "query", "mixed")}
        inputs = {name: value / columns[name] ** 0.5 for name, value in drawn(shapes, device, 1.0).items()}
        inputs |= drawn({"pixels": (2, 11 * height, width), "words": (2, max(REAL_WORDS), text_width)}, device, 1.0)

        def by(impl: str, text_width: int = text_width) -> Callable[..., Tensor]:
            def attend(words: Tensor, pixels: Tensor, **given: Tensor) -> Tensor:
                zeros = dict.fromkeys(("key_bias", "value_bias", "out_bias"), words.new_zeros(text_width))
                return word_pixel_attention(
                    words, pixels, valid, WordPixelWeights(**given, **zeros), "masked", impl=impl
                )

            return attend

        hold(by("triton"), by("reference"), inputs, dtype)
        if dtype is not torch.float32:
            hold(by("triton"), by("reference"), inputs, torch.float32, autocast=dtype)


MAGNET: dict[str, Callable[[torch.device, torch.dtype], None]] = {
    "pixel_contrast": prove_pixel_contrast,
    "pixel_word_attention": prove_pixel_word_attention,
    "word_pixel_attention": prove_word_pixel_attention,
}
"""By the operator's name."""
