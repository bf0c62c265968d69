"""What MagNet's own operators launch, at its sizes for a picture of 480 x 480; see :mod:`.scenarios`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastris.ops.pixel_word_attention import pixel_word_attention
from fastris.ops.word_pixel_attention import word_pixel_attention
from fastris.reference import PixelWordWeights, WordPixelWeights

HALF = (torch.float16, torch.bfloat16)


def stage(width: int, text_width: int, count: int, words: int) -> Callable[[torch.dtype], None]:
    """The alignment module behind one stage of the trunk, of ``count`` pixels; half precision is autocast's."""

    def run(dtype: torch.dtype) -> None:
        def leaf(*shape: int) -> Tensor:
            return torch.zeros(shape, requires_grad=True)

        pixels = torch.zeros(2, count, width, dtype=dtype if dtype in HALF else torch.float32, requires_grad=True)
        said, valid = leaf(2, words, text_width), torch.ones(2, words)
        own = PixelWordWeights(
            *(leaf(width, width), leaf(width)),
            *(leaf(width, width), leaf(width), leaf(width), leaf(width)),
            *(leaf(width, text_width), leaf(width)),
            *(leaf(width, text_width), leaf(width)),
            *(leaf(width, width), leaf(width), leaf(width), leaf(width)),
            *(leaf(width, width), leaf(width)),
        )
        sides = ((text_width, text_width),) * 2 + ((text_width, width),) * 2 + ((text_width, text_width),) * 2
        of_words = WordPixelWeights(*(each for rows, columns in sides for each in (leaf(rows, columns), leaf(rows))))
        with torch.autocast("cpu", dtype, enabled=dtype in HALF):
            seen = pixel_word_attention(pixels, said, valid, own)
            heard = word_pixel_attention(said, pixels, valid, of_words, "masked")
        (seen.sum() + heard.sum()).backward()

    return run
