"""From the model's logits to a map of the picture, by CRIS's published rule; other rules are evaluation's."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastris.data.letterbox import Letterbox

THRESHOLD = 0.35
"""A pixel belongs to the mask if its probability is above this, as CRIS published."""


def on_square(maps: Tensor, size: int, resize: str = "bicubic", align_corners: bool = True) -> np.ndarray:
    """Maps (E, 1, h, w) resized to the letterboxed square: (E, S, S) float32, by PyTorch's interpolation `resize`."""
    if maps.shape[-1] != size:
        maps = F.interpolate(maps, size=(size, size), mode=resize, align_corners=align_corners)
    return maps[:, 0].cpu().numpy()


def probability_on_image(logits: np.ndarray, warp: Letterbox) -> np.ndarray:
    """Logits (h, w) of the letterboxed square as probabilities (H, W) float32 of the image.

    Sigmoid, bicubic to the square, cubic inverse letterbox. Cubic interpolation overshoots at steep edges, so
    probabilities may leave [0, 1] by a little, as published.
    """
    return warp.unwarp(on_square(torch.from_numpy(logits)[None, None].float().sigmoid(), warp.size)[0])
