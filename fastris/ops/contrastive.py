"""Text-to-pixel contrastive loss from one pass over the features (CRIS section 3.5, equations 9 and 10).

The loss ``-log sigma(z)`` on the referred pixels and ``-log(1 - sigma(z))`` on the others is binary cross-entropy on
the similarity's logits ``z``. It and its slope need the logits alone, which are C times smaller than the features:
scoring, loss and slope come from one pass over the features, and the backward is one more. See
:mod:`fastris.ops.similarity` for the algebra of the logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops.checks import check_is_tensor, check_shape, compute_dtype
from fastris.ops.similarity import (
    check_arguments,
    check_norm,
    fold,
    norm_rows,
    normed_first,
    reference_similarity,
    shifted_tap_sum,
    wide_dtype,
)
from fastris.reference import PixelNorm

REDUCTIONS = ("mean", "sum", "none")


def text_to_pixel_contrastive_loss(
    features: Tensor,
    kernel: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    pointwise_weight: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    norm: PixelNorm | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | float | None = None,
    ignore_mask: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Score every pixel and compare it with the mask: (B, C, H, W) -> loss, logits (B, Q, H, W).

    Args:
        features, kernel, bias, pointwise_weight, pointwise_bias, norm, impl: as in
            :func:`~fastris.ops.similarity.text_to_pixel_similarity`, and so are the logits.
        target: the masks (B, Q, H', W'), floating point of any dtype, hard or soft, in [0, 1]. Where H' x W' is not
            the logits' size they are resized by nearest neighbour, as published.
        reduction: ``"mean"`` over the counted pixels of all samples and queries, ``"sum"``, or ``"none"`` for the
            loss of every pixel (B, Q, H, W).
        pos_weight: factor of the loss on referred pixels, a number or a tensor that broadcasts to the logits, as in
            ``F.binary_cross_entropy_with_logits``.
        ignore_mask: (B, Q, H', W') bool, resized like target: True where a pixel does not count. Its loss and the
            loss's gradient are 0 there, whatever the logit is. Where no pixel counts, the mean is 0 with gradient 0.

    The loss is computed and summed in float32, or float64 for float64 features, and returned so under autocast; without
    autocast it has the logits' dtype. The mean over an empty batch is NaN, as everywhere in PyTorch.

    Gradients flow back from both the loss and the logits. target, pos_weight and ignore_mask are data: no gradient
    reaches them.

    Raises ValueError for a wrong shape, an unknown reduction or tensors on different devices; TypeError for dtypes that
    do not fit; RuntimeError when ``impl="triton"`` cannot run here.

    Source: CRIS section 3.5, equations 9 and 10; :func:`fastris.reference.contrastive_loss`.
    """
    operator = "text_to_pixel_contrastive_loss"
    check_arguments(operator, features, kernel, bias, pointwise_weight, pointwise_bias)
    check_norm(operator, features, norm)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{operator}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    dtype = compute_dtype(features)
    path = resolve(operator, features.device, dtype, impl, features.shape[0])
    loss_dtype = wide_dtype(dtype) if torch.is_autocast_enabled(features.device.type) else dtype
    shape = (features.shape[0], kernel.shape[1] if kernel.ndim == 5 else 1, *features.shape[-2:])
    counted = _counted_pixels(operator, features, target, pos_weight, ignore_mask, shape, wide_dtype(dtype))

    features, norm = normed_first(path, features, kernel, norm, dtype)
    if path == "reference" and len(features):
        logits = reference_similarity(features, kernel, bias, pointwise_weight, pointwise_bias)
        if counted.pos_weight is None and counted.ignored is None:
            target = counted.target.to(loss_dtype)
            return reference.contrastive_loss(logits.to(loss_dtype), target, reduction=reduction), logits
        return _reduce(_pixel_loss(logits.to(loss_dtype), counted), counted, reduction), logits

    with torch.autocast(features.device.type, enabled=False):
        folded = fold(kernel, bias, pointwise_weight, pointwise_bias, wide_dtype(dtype))
        pixels = features.to(dtype).flatten(2)
        if path == "triton":
            from fastris.kernels.contrastive import contrastive

            loss, logits = contrastive(pixels, *folded[:2], *norm_rows(norm), *counted.factors(), folded.size)
        else:
            logits = shifted_tap_sum(pixels, folded, *shape[-2:])
            loss = _pixel_loss(logits, counted)
        return _reduce(loss, counted, reduction).to(loss_dtype), logits.to(dtype)


class _CountedPixels(NamedTuple):
    """The loss's data at the logits' size: ``target`` and, where given, ``ignored`` (B, Q, H, W) and ``pos_weight``.

    ``pos_weight`` may have any shape that broadcasts to (B, Q, H, W).
    """

    target: Tensor
    pos_weight: Tensor | None
    ignored: Tensor | None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Factors (B, Q, H, W) of ``-log sigma(z)`` and of ``-log(1 - sigma(z))`` in each pixel's loss."""
        positive = self.target if self.pos_weight is None else self.target * self.pos_weight
        negative = 1 - self.target
        if self.ignored is not None:
            positive, negative = positive.masked_fill(self.ignored, 0), negative.masked_fill(self.ignored, 0)
        return positive, negative


def _counted_pixels(
    operator: str,
    features: Tensor,
    target: Tensor,
    pos_weight: Tensor | float | None,
    ignore_mask: Tensor | None,
    shape: tuple[int, int, int, int],
    wide: torch.dtype,
) -> _CountedPixels:
    """Check target, pos_weight and ignore_mask, and bring them to the logits' ``shape`` and the dtype ``wide``."""
    check_is_tensor(operator, "target", target)
    if not target.is_floating_point():
        raise TypeError(f"{operator}: target must be floating point, got {target.dtype}; convert it with .float()")
    _check_map(operator, "target", target, features, shape)
    target = reference.resize_target(target.detach(), shape[-2:]).to(wide)
    if ignore_mask is not None:
        check_is_tensor(operator, "ignore_mask", ignore_mask)
        if ignore_mask.dtype is not torch.bool:
            raise TypeError(f"{operator}: ignore_mask must be bool, True where not counted, got {ignore_mask.dtype}")
        _check_map(operator, "ignore_mask", ignore_mask, features, shape)
        ignore_mask = reference.resize_target(ignore_mask.to(torch.uint8), shape[-2:]).bool()
    if pos_weight is not None:
        pos_weight = _checked_pos_weight(operator, pos_weight, features.device, shape, wide)
    return _CountedPixels(target, pos_weight, ignore_mask)


def _checked_pos_weight(
    operator: str, pos_weight: Tensor | float, device: torch.device, shape: tuple[int, int, int, int], wide: torch.dtype
) -> Tensor:
    if not isinstance(pos_weight, Tensor):
        if not isinstance(pos_weight, int | float) or not math.isfinite(pos_weight):
            raise TypeError(f"{operator}: pos_weight must be a finite number or a tensor, got {pos_weight!r}")
        return torch.full((), pos_weight, dtype=wide, device=device)
    if pos_weight.device != device:
        raise ValueError(f"{operator}: pos_weight is on {pos_weight.device} but features is on {device}")
    have = (1,) * (len(shape) - pos_weight.ndim) + tuple(pos_weight.shape)
    if len(have) != len(shape) or any(size not in (1, want) for size, want in zip(have, shape, strict=True)):
        raise ValueError(f"{operator}: pos_weight must broadcast to the logits {shape}, got {tuple(pos_weight.shape)}")
    return pos_weight.detach().to(wide)


def _check_map(operator: str, name: str, data: Tensor, features: Tensor, shape: tuple[int, int, int, int]) -> None:
    check_shape(operator, name, data, (*shape[:2], "H'", "W'"))
    if 0 in data.shape[2:]:
        raise ValueError(f"{operator}: {name} must have pixels, got {tuple(data.shape)}")
    if data.device != features.device:
        raise ValueError(
            f"{operator}: {name} is on {data.device} but features is on {features.device}; move them to one device"
        )


def _pixel_loss(logits: Tensor, counted: _CountedPixels) -> Tensor:
    """The published loss of every pixel, in the logits' dtype; 0 where it is ignored, even if the logit is NaN."""
    target, pos_weight, ignored = counted
    if ignored is not None:
        logits, target = logits.masked_fill(ignored, 0), target.masked_fill(ignored, 0)
    if pos_weight is not None:
        pos_weight = pos_weight.to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none", pos_weight=pos_weight)
    return loss if ignored is None else loss.masked_fill(ignored, 0)


def _reduce(loss: Tensor, counted: _CountedPixels, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if counted.ignored is None:
        return loss.mean()
    return loss.sum() / counted.ignored.logical_not().sum().clamp(min=1)
