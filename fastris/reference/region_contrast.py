"""Instance contrast: a sentence's centre against the mean pixels of objects and of their backgrounds.

AlignFormer's abstract names a cross-modal instance contrastive loss, and neither its formula nor code is public. This
definition is ours: InfoNCE in both directions on means of regions, so that single ambiguous pixels carry no weight.
Shapes: B expressions, D width of the pixel map (h, w).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Regions(NamedTuple):
    """Weights of the cells, (B, h, w): inside the object and outside it; 0 in both where a cell is ambiguous."""

    inside: Tensor
    outside: Tensor


def regions(mask: Tensor, size: tuple[int, int], *, known: Tensor | None = None, band: int = 0) -> Regions:
    """Sort the cells of a map of ``size`` (h, w) by how much of each the mask (B, 1, H, W), hard or soft, covers.

    A cell is inside where more than 0.99 of it is covered, outside where less than 0.01 is, else ambiguous. Cells
    within ``band`` of an ambiguous one are dropped, too. An object without any cell inside has its coverage as weights
    instead. ``known`` (B, 1, H, W) is 0 on a letterbox's border, whose cells belong to neither.
    """
    covered = F.adaptive_avg_pool2d(mask.float(), size)[:, 0]
    seen = torch.ones_like(covered, dtype=torch.bool) if known is None else known_cells(known, size)
    sure_inside, sure_outside = covered > 0.99, covered < 0.01
    if band:
        ambiguous = (~(sure_inside | sure_outside)).float()
        clear = F.max_pool2d(ambiguous, 2 * band + 1, stride=1, padding=band) == 0
        sure_inside, sure_outside = sure_inside & clear, sure_outside & clear
    sure_inside, sure_outside = sure_inside & seen, sure_outside & seen
    has_sure = sure_inside.flatten(1).any(1)[:, None, None]
    inside = torch.where(has_sure, sure_inside.to(covered.dtype), covered * seen)
    return Regions(inside, sure_outside.to(covered.dtype))


def known_cells(known: Tensor, size: tuple[int, int]) -> Tensor:
    """Which cells (B, h, w) show the image alone: more than 0.99 of them is not a letterbox's border. Bool.

    ``known`` (B, 1, H, W) of any size and dtype is 0 on the border and 1 on the image.
    """
    return F.adaptive_avg_pool2d(known.float(), size)[:, 0] > 0.99


def region_means(features: Tensor, weights: Tensor) -> Tensor:
    """Unit vectors (B, D) of the means of ``features`` (B, D, h, w) under the weights (B, h, w); 0 of empty regions."""
    total = torch.einsum("bdhw,bhw->bd", features, weights)
    return F.normalize(total / weights.sum((1, 2)).clamp_min(1e-6)[:, None], dim=-1, eps=1e-6)


def region_contrast(
    features: Tensor,
    centres: Tensor,
    mask: Tensor,
    *,
    known: Tensor | None = None,
    image_ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
    band: int = 0,
    temperature: float = 0.07,
    pointwise_weight: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
) -> Tensor:
    """The loss, a scalar in float32 (float64 for float64): mean over objects of two cross-entropies, halved.

    With unit vectors c of the centres, p of the insides and n of the outsides, and target b in both::

        Z1_b = [c_b . p_1 ... p_B, c_b . n_1 ... n_B] / temperature,    Z2_b = [p_b . c_1 ... c_B] / temperature

    Args:
        features: (B, D, h, w), the map that the sentences' kernels score.
        centres: (B, D), those kernels without their biases (of k x k kernels the sum over the taps).
        mask: (B, 1, H, W) at full size, in [0, 1].
        known: as for :func:`regions`.
        image_ids, ref_ids: (B,) int64. Another row of the same reference (the same image, too, where both are given)
            is no negative; a background of the same image is none either, since it holds b's own object.
        band: as for :func:`regions`.
        pointwise_weight, pointwise_bias: (D, C, 1, 1) and (D,), a 1x1 convolution before, of features (B, C, h, w).

    An object without a cell inside counts nowhere; if there is none at all, the loss is 0. A background without a cell
    is left out. Other objects of the same image stay: they are the hard negatives.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    features, centres = features.to(wide), centres.to(wide)
    with torch.autocast(features.device.type, enabled=False):
        if pointwise_weight is not None:
            bias = None if pointwise_bias is None else pointwise_bias.to(wide)
            features = F.conv2d(features, pointwise_weight.to(wide), bias)
        height, width = features.shape[-2:]
        cells = regions(mask, (height, width), known=known, band=band)
        inside, outside = (weights.to(wide) for weights in cells)
        centre = F.normalize(centres, dim=-1, eps=1e-6)
        vectors = torch.cat([region_means(features, inside), region_means(features, outside)])
        logits = centre @ vectors.t() / temperature
        return info_nce(logits, inside.flatten(1).any(1), outside.flatten(1).any(1), image_ids, ref_ids)


def info_nce(
    logits: Tensor,
    has_inside: Tensor,
    has_outside: Tensor,
    image_ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
) -> Tensor:
    """The two cross-entropies of :func:`region_contrast` on logits (B, 2B): objects first, then backgrounds."""
    count = len(logits)
    nobody = torch.zeros(count, count, dtype=torch.bool, device=logits.device)
    own = torch.eye(count, dtype=torch.bool, device=logits.device)
    same_image = nobody if image_ids is None else _equal(image_ids) & ~own
    same_reference = nobody if ref_ids is None else _equal(ref_ids) & ~own
    if image_ids is not None:
        same_reference = same_reference & same_image
    no_object = same_reference | ~has_inside[None]
    no_background = same_reference | same_image | ~has_outside[None]
    first = logits.masked_fill(torch.cat([no_object, no_background], dim=1), float("-inf"))
    second = logits[:, :count].t().masked_fill(no_object, float("-inf"))
    # Rows that count nowhere have no target: any finite row in their place keeps NaN out of the gradient.
    first, second = (torch.where(has_inside[:, None], rows, torch.zeros_like(rows)) for rows in (first, second))
    target = torch.arange(count, device=logits.device)
    both = F.cross_entropy(first, target, reduction="none") + F.cross_entropy(second, target, reduction="none")
    return (both * has_inside).sum() / (2 * has_inside.sum().clamp_min(1))


def _equal(ids: Tensor) -> Tensor:
    return ids[:, None] == ids[None]
