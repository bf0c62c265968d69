"""Turn the model's logits into probabilities at the picture's size, by CRIS's published rule.

The other rules are in :mod:`fastris.evaluation.rules`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from fastris.data.letterbox import Letterbox

THRESHOLD = 0.35
"""A pixel belongs to the mask if its probability is above this, as CRIS published."""


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless ``threshold`` is a probability, from 0 to 1."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in 0..1 (a probability), got {threshold}")


def on_square(maps: Tensor, size: int, resize: str = "bicubic", align_corners: bool = True) -> np.ndarray:
    """Maps (E, 1, h, w) resized to the letterboxed square: (E, S, S) float32, by PyTorch's interpolation `resize`."""
    if maps.shape[-1] != size:
        import torch.nn.functional as F

        maps = F.interpolate(maps, size=(size, size), mode=resize, align_corners=align_corners)
    return maps[:, 0].cpu().numpy()


def probability_on_image(logits: np.ndarray, warp: Letterbox) -> np.ndarray:
    """Turn logits (h, w) of the letterboxed square into probabilities (H, W) float32 at the image's size.

    Sigmoid, bicubic to the square, cubic inverse letterbox. Cubic interpolation overshoots at steep edges, so
    probabilities may leave [0, 1] by a little, as published.
    """
    import torch

    return warp.unwarp(on_square(torch.from_numpy(logits)[None, None].float().sigmoid(), warp.size)[0])
