"""Cross-modal alignment loss: an object's pixels against the rest's, and against the sentence.

MagNet's paper (arXiv 2312.12198) has such a loss, and its code is not public. This definition is ours: anchors stand
for the pairs of pixels, so that its cost grows with their number and not with its square. Negatives are of the same
image. Shapes: B samples, D width of the pixel map (h, w).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris.reference.region_contrast import known_cells


class PixelSets(NamedTuple):
    """Which cells (B, h, w) belong to the object, and which to the background; an ambiguous one to neither. Bool."""

    inside: Tensor
    outside: Tensor


def pixel_sets(mask: Tensor, size: tuple[int, int], *, known: Tensor | None = None) -> PixelSets:
    """Sort the cells of a map of ``size`` (h, w) by how much of each the mask (B, 1, H, W) covers.

    A cell is inside where more than half of it is covered, outside where nothing is. An object too small for that has
    its most covered cells as its inside. ``known`` (B, 1, H', W') is 0 on a letterbox's border; a cell with
    more than 1 % of border belongs to neither: see :func:`fastris.reference.region_contrast.known_cells`.
    """
    covered = F.adaptive_avg_pool2d(mask.float(), size)[:, 0]
    outside = covered == 0
    if known is not None:
        seen = known_cells(known, size)
        covered, outside = covered * seen, outside & seen
    inside, most = covered > 0.5, covered.amax((1, 2), keepdim=True)
    small = ~inside.flatten(1).any(1)[:, None, None] & (most > 0)
    return PixelSets(inside | (small & (covered == most)), outside)


def pixel_contrast(
    features: Tensor,
    sentence: Tensor,
    mask: Tensor,
    *,
    known: Tensor | None = None,
    pixel_temperature: float = 0.1,
    text_temperature: float = 0.07,
) -> Tensor:
    """The loss, a scalar in float32 (float64 for float64): the mean over samples of three contrasts.

    With unit vectors f of the pixels and t of the sentence, + the pixels inside and - those outside, a the unit vector
    of the mean of f over +, and b that over -::

        contrast(P, N, v) = mean over i in P of  -log(e^(f_i . v / tau) / (e^(f_i . v / tau) + sum_N e^(f_j . v / tau)))
        loss = contrast(+, -, t) + contrast(+, -, a) + contrast(-, +, b)

    Args:
        features: (B, D, h, w), the pixel map.
        sentence: (B, D), in the pixels' space.
        mask: (B, 1, H, W) at full size, in [0, 1].
        known: as for :func:`pixel_sets`.
        pixel_temperature: tau for a and b. text_temperature: tau for t.

    A sample without an inside or an outside is left out; if there is no other, the loss is 0. Gradients flow through a
    and b, too.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        height, width = features.shape[-2:]
        inside, outside = (cells.flatten(1) for cells in pixel_sets(mask, (height, width), known=known))
        pixels = F.normalize(features.to(wide).flatten(2), dim=1, eps=1e-6)  # [B, D, N]
        counts = inside.any(1) & outside.any(1)
        total = contrast(_along(pixels, sentence.to(wide)), inside, outside, text_temperature)
        for own, other in ((inside, outside), (outside, inside)):
            anchor = (pixels * own[:, None]).sum(2) / own.sum(1, keepdim=True).clamp_min(1)
            total = total + contrast(_along(pixels, anchor), own, other, pixel_temperature)
        return torch.where(counts, total, 0).sum() / counts.sum().clamp_min(1)


def _along(pixels: Tensor, vector: Tensor) -> Tensor:
    """Products (B, N) of the pixels (B, D, N) with the unit vector of ``vector`` (B, D)."""
    return torch.einsum("bdn,bd->bn", pixels, F.normalize(vector, dim=-1, eps=1e-6))


def contrast(cosines: Tensor, own: Tensor, other: Tensor, temperature: float) -> Tensor:
    """The mean over the pixels of ``own`` of the cross-entropy of each against all pixels of ``other``: (B,).

    ``cosines`` (B, N), the two sets (B, N) bool. As ``-log(e^s / (e^s + sum e^s_j)) = softplus(logsumexp s_j - s)``.
    Where one of the sets is empty the result has no meaning, but is finite.
    """
    scores = cosines / temperature
    empty = ~(own.any(1) & other.any(1))[:, None]
    negatives = scores.masked_fill(~(other | empty), -torch.inf).logsumexp(1, keepdim=True)
    return (F.softplus(negatives - scores) * own).sum(1) / own.sum(1).clamp_min(1)
