"""MagNet's segmentation loss: binary cross-entropy and Dice of several predictions at the images' size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BCE_WEIGHT = DICE_WEIGHT = 2.0


def upsampled_bce_and_dice(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over batch and Q maps of 2 BCE + 2 Dice. A scalar, in float32, or float64 for float64 logits.

    ``logits`` (B, Q, h, w) are resized to the masks ``target`` (B, 1, H, W) bilinearly, corners *aligned* as in
    MagNet's prediction. BCE is the mean over pixels; Dice is ``1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)`` with
    probabilities p. The weights are said of the paper (arXiv 2312.12198), the rest is our choice: no training code was
    released.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    full = F.interpolate(logits.to(wide), tuple(target.shape[-2:]), mode="bilinear", align_corners=True)
    truth = target.to(wide).expand_as(full)
    cross_entropy = F.binary_cross_entropy_with_logits(full, truth)
    found = full.sigmoid()
    common, both = (found * truth).sum((-2, -1)), found.sum((-2, -1)) + truth.sum((-2, -1))
    dice = 1 - (2 * common + 1) / (both + 1)
    return BCE_WEIGHT * cross_entropy + DICE_WEIGHT * dice.mean()
