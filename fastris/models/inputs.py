"""How a model wants its inputs, as plain data: pixel normalisation and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Inputs:
    """How pixels are normalised and sentences become token ids. The defaults are CLIP's.

    Attributes:
        mean, std: of each channel (red, green, blue), for pixels in [0, 1]; the letterbox's border has the mean colour.
        tokenizer: a name in :data:`fastris.data.tokens.TOKENIZERS`, or name:vocabulary.
        fit: how an image becomes the square, a name in :data:`fastris.data.letterbox.FITS`.
    """

    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    tokenizer: str = "clip"
    fit: str = "letterbox"


CLIP_INPUTS = Inputs()


def inputs_of(config: Any) -> Inputs:
    """The ``inputs`` of a model's configuration; CLIP's if it has none."""
    return getattr(config, "inputs", CLIP_INPUTS)
