"""Training pictures varied so that their phrases stay true: mirrored with them, and in other colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastris.data.mirror import mirrored, names_colour

STRONGEST = 0.2
"""Brightness, contrast and saturation are changed by a factor of 1 - this to 1 + this."""
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def augment(
    image: np.ndarray, masks: Sequence[np.ndarray], phrases: Sequence[str], rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray], list[str]]:
    """A picture (H, W, 3) uint8 with masks (H, W) and phrases about it, varied; what is given is left as it is.

    Half of the pictures are mirrored, with left and right swapped in the phrases, unless that is unclear for any of
    them. Colours change unless any of the phrases may speak of them. See :mod:`fastris.data.mirror`.
    """
    flips, factors = rng.random() < 0.5, rng.uniform(1 - STRONGEST, 1 + STRONGEST, 3).astype(np.float32)
    others = [mirrored(phrase) for phrase in phrases]
    turned = [phrase for phrase in others if phrase is not None]
    if flips and len(turned) == len(phrases):
        image, masks, phrases = _flipped(image), [_flipped(mask) for mask in masks], turned
    if not any(map(names_colour, phrases)):
        image = jittered(image, *factors)
    return image, list(masks), list(phrases)


def jittered(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """The picture with these factors on its values, on their distance from the mean grey and from each pixel's grey."""
    pixels = image.astype(np.float32) * brightness
    grey = (pixels @ _LUMA).mean()
    pixels = grey + contrast * (pixels - grey)
    greys = (pixels @ _LUMA)[..., None]
    pixels = greys + saturation * (pixels - greys)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _flipped(picture: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(picture[:, ::-1])
