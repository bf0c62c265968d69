"""CRIS's training objective as a module."""

from __future__ import annotations

from torch import Tensor, nn

from fastris import reference


class TextToPixelContrastiveLoss(nn.Module):
    """Text-to-pixel contrastive loss (CRIS equations 9 and 10) from logits (B, 1, h, w) and a mask (B, 1, H, W).

    The mask, in [0, 1], is resized to the logits by nearest neighbour, as published. Replaces
    ``F.interpolate(mask, ...)`` followed by ``F.binary_cross_entropy_with_logits``. Returns a scalar for
    ``reduction`` "mean" or "sum", the loss of every pixel (B, 1, h, w) for "none". Raises ValueError for another one.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
        self.reduction = reduction

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        target = reference.resize_target(mask, logits.shape[-2:])
        return reference.contrastive_loss(logits, target, reduction=self.reduction)
