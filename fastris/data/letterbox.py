"""How an image becomes a model's square, and back: CRIS's letterbox, or squashed without regard to its shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fastris.data.formats.usable import MAX_SIDE
from fastris.models.inputs import CLIP_INPUTS, Inputs

if TYPE_CHECKING:
    import torch

CV2_LIMIT = MAX_SIDE


@dataclass(frozen=True)
class Letterbox:
    """The warp between an image of `height` x `width` pixels and a square of `size` x `size`; see `letterbox`."""

    height: int
    width: int
    size: int

    @cached_property
    def matrix(self) -> np.ndarray:
        """(2, 3) float64: the image's (x, y, 1) to the square's (x, y), in pixels."""
        import cv2

        return cv2.getAffineTransform(*self._corners())

    @cached_property
    def inverse(self) -> np.ndarray:
        """(2, 3) float64: the square's (x, y, 1) to the image's (x, y), in pixels."""
        import cv2

        source, target = self._corners()
        return cv2.getAffineTransform(target, source)

    def _corners(self) -> tuple[np.ndarray, np.ndarray]:
        """Top left, top right and bottom left corner, (3, 2) float32: in the image, and in the square."""
        height, width = self.height, self.width
        scale = min(self.size / height, self.size / width)
        new_height, new_width = height * scale, width * scale
        left, top = (self.size - new_width) / 2, (self.size - new_height) / 2
        source = [[0, 0], [width, 0], [0, height]]
        target = [[left, top], [new_width + left, top], [left, new_height + top]]
        return np.array(source, np.float32), np.array(target, np.float32)

    def warp_image(self, rgb: np.ndarray, inputs: Inputs = CLIP_INPUTS) -> torch.Tensor:
        """Warp an image with cubic interpolation and a border of the mean colour, then normalise it.

        Args:
            rgb: (H, W, 3) uint8.
            inputs: the mean and standard deviation of each channel, by default CLIP's.

        Returns:
            (3, S, S) float32 on the CPU.
        """
        import cv2

        rgb = self._checked("rgb", rgb, (self.height, self.width, 3), np.uint8)
        border = [mean * 255 for mean in inputs.mean]
        square = (self.size, self.size)
        warped = cv2.warpAffine(rgb, self.matrix, square, flags=cv2.INTER_CUBIC, borderValue=border)
        return _normalised(warped, inputs)

    def warp_mask(self, mask: np.ndarray) -> torch.Tensor:
        """Warp a mask with linear interpolation and a border of zeros: soft at the edges, in steps of 1/255.

        Args:
            mask: (H, W) bool.

        Returns:
            (1, S, S) float32 in [0, 1] on the CPU.
        """
        import cv2
        import torch

        mask = self._checked("mask", mask, (self.height, self.width), np.bool_)
        square = (self.size, self.size)
        levels = mask.astype(np.uint8) * 255
        warped = cv2.warpAffine(levels, self.matrix, square, flags=cv2.INTER_LINEAR, borderValue=0)
        return torch.from_numpy(warped / 255).float()[None]

    def known(self) -> torch.Tensor:
        """Which pixels of the square lie on the image, and with no part on the border: (1, S, S) bool on the CPU."""
        import torch

        (left, top), (right, _), (_, bottom) = self._corners()[1].tolist()
        known = torch.zeros(1, self.size, self.size, dtype=torch.bool)
        rows, columns = ((math.ceil(a - 0.01), math.floor(b + 0.01)) for a, b in ((top, bottom), (left, right)))
        known[:, slice(*rows), slice(*columns)] = True
        return known

    def unwarp(self, probabilities: np.ndarray) -> np.ndarray:
        """Warp a map of the square back to the image, with cubic interpolation and zeros outside.

        Cubic interpolation overshoots at steep edges, so values may leave [0, 1] by a little, as published.

        Args:
            probabilities: (S, S) float32.

        Returns:
            (H, W) float32.
        """
        import cv2

        probabilities = self._checked("probabilities", probabilities, (self.size, self.size), np.float32)
        original = (self.width, self.height)
        return cv2.warpAffine(probabilities, self.inverse, original, flags=cv2.INTER_CUBIC, borderValue=0)

    def _checked(self, name: str, array: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
            was = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f"{name} is {was}, but this letterbox takes a NumPy array {np.dtype(dtype)} {shape}")
        return np.ascontiguousarray(array)


@dataclass(frozen=True)
class Squash(Letterbox):
    """The image resized to the whole square; other than a letterbox's, pixel *centres* correspond. See `squash`."""

    @cached_property
    def matrix(self) -> np.ndarray:
        """(2, 3) float64: the image's (x, y, 1) to the square's (x, y), in pixels."""
        return _scaling(self.size / self.width, self.size / self.height)

    @cached_property
    def inverse(self) -> np.ndarray:
        """(2, 3) float64: the square's (x, y, 1) to the image's (x, y), in pixels."""
        return _scaling(self.width / self.size, self.height / self.size)

    def warp_image(self, rgb: np.ndarray, inputs: Inputs = CLIP_INPUTS) -> torch.Tensor:
        """As a letterbox's, but resized as Pillow does: bilinear, averaging where it shrinks, without a border."""
        from PIL import Image

        rgb = self._checked("rgb", rgb, (self.height, self.width, 3), np.uint8)
        square = Image.fromarray(rgb).resize((self.size, self.size), Image.Resampling.BILINEAR)
        return _normalised(np.array(square), inputs)

    def warp_mask(self, mask: np.ndarray) -> torch.Tensor:
        """Resize a mask (H, W) bool by nearest neighbour: (1, S, S) float32, 0 or 1, on the CPU."""
        import torch

        mask = self._checked("mask", mask, (self.height, self.width), np.bool_)
        rows, columns = (((np.arange(self.size) + 0.5) * side / self.size).astype(int) for side in mask.shape)
        return torch.from_numpy(mask[np.ix_(rows, columns)]).float()[None]

    def known(self) -> torch.Tensor:
        """All pixels: (1, S, S) bool on the CPU. There is no border."""
        import torch

        return torch.ones(1, self.size, self.size, dtype=torch.bool)

    def unwarp(self, probabilities: np.ndarray) -> np.ndarray:
        """Resize a map (S, S) float32 of the square to the image's (H, W), linearly."""
        import cv2

        probabilities = self._checked("probabilities", probabilities, (self.size, self.size), np.float32)
        return cv2.resize(probabilities, (self.width, self.height), interpolation=cv2.INTER_LINEAR)


def _scaling(x: float, y: float) -> np.ndarray:
    return np.array([[x, 0, 0.5 * x - 0.5], [0, y, 0.5 * y - 0.5]])


def _normalised(rgb: np.ndarray, inputs: Inputs) -> torch.Tensor:
    import torch

    mean, std = torch.tensor(inputs.mean).view(3, 1, 1), torch.tensor(inputs.std).view(3, 1, 1)
    pixels = torch.from_numpy(rgb).permute(2, 0, 1).float().contiguous()
    return pixels.div_(255).sub_(mean).div_(std)


def letterbox(height: int, width: int, size: int) -> Letterbox:
    """The warp that scales an image to fit a square, keeping its shape, and centres it there.

    Args:
        height, width: the image's, in pixels, 1 to 32766.
        size: side S of the square, in pixels, 1 to 32766; published: 416.

    Raises:
        ValueError: a side is out of range; the message names it and what to do.

    Source: `getTransformMat` in the published `utils/dataset.py`. OpenCV 4 rounds the coordinates of a warp to 1/32
    pixel, OpenCV 5 does not: between the two, pixels and soft edges of masks differ by up to about 4 of 255 levels.
    """
    _check_sides(height, width, size)
    return Letterbox(int(height), int(width), int(size))


def squash(height: int, width: int, size: int) -> Squash:
    """The resize of an image to the whole square, whatever its shape, as most systems but CRIS do it.

    Arguments and errors as for :func:`letterbox`.
    """
    _check_sides(height, width, size)
    return Squash(int(height), int(width), int(size))


FITS = {"letterbox": letterbox, "squash": squash}
"""Ways of an image into a square by name; a model names its own in :class:`fastris.models.inputs.Inputs`."""


def to_square(height: int, width: int, size: int, inputs: Inputs) -> Letterbox:
    """The model's own way of an image of `height` x `width` pixels into its square. Raises ValueError."""
    if inputs.fit not in FITS:
        raise ValueError(f"fit {inputs.fit!r} is unknown; known are {', '.join(FITS)}: add it to FITS")
    return FITS[inputs.fit](height, width, size)


def _check_sides(height: int, width: int, size: int) -> None:
    for name, side in (("height", height), ("width", width), ("size", size)):
        if not 1 <= side <= CV2_LIMIT:
            raise ValueError(
                f"{name}={side} pixels must lie in 1..{CV2_LIMIT} (OpenCV's limit for warps); "
                "shrink or crop the image first"
            )
