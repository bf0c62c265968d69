"""The published letterbox: an affine warp of an image into a square, and its inverse."""

from __future__ import annotations

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
        import torch

        rgb = self._checked("rgb", rgb, (self.height, self.width, 3), np.uint8)
        border = [mean * 255 for mean in inputs.mean]
        square = (self.size, self.size)
        warped = cv2.warpAffine(rgb, self.matrix, square, flags=cv2.INTER_CUBIC, borderValue=border)
        mean, std = torch.tensor(inputs.mean).view(3, 1, 1), torch.tensor(inputs.std).view(3, 1, 1)
        pixels = torch.from_numpy(warped).permute(2, 0, 1).float().contiguous()
        return pixels.div_(255).sub_(mean).div_(std)

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
    for name, side in (("height", height), ("width", width), ("size", size)):
        if not 1 <= side <= CV2_LIMIT:
            raise ValueError(
                f"{name}={side} pixels must lie in 1..{CV2_LIMIT} (OpenCV's limit for warps); "
                "shrink or crop the image first"
            )
    return Letterbox(int(height), int(width), int(size))
