"""Text-to-pixel similarity and the contrastive loss on it (CRIS, section 3.4, equations 8 to 10).

Shapes: B batch, C channels of the pixel map, Q text kernels per sample, k their side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PixelNorm(NamedTuple):
    """A BatchNorm and the ReLU behind it, of a map (B, C, H, W): relu((x - mean) / sqrt(var + eps) * weight + bias).

    ``mean`` and the biased ``var`` (C,) are the map's own over B, H and W where ``of_batch`` says so, as in training,
    and the map's gradient goes through them; else they are given, as in evaluation. They have no gradient themselves.
    ``weight`` and ``bias`` (C,), or None for 1 and 0.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    of_batch: bool

    @classmethod
    def by_statistics_of(
        cls, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> PixelNorm:
        """The norm of training: by the statistics of ``x`` itself, in float32 or wider."""
        wide = x.detach() if x.dtype is torch.float64 else x.detach().float()
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        return cls(mean, var, weight, bias, eps, True)


def normed_pixels(x: Tensor, norm: PixelNorm) -> Tensor:
    """The map behind a BatchNorm and a ReLU, as the projector's last block has them.

    The norm's own numbers count in float32, or float64 for float64 features, whatever dtype they came in.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    weight, bias = (None if each is None else each.to(wide) for each in (norm.weight, norm.bias))
    if norm.of_batch:
        return F.relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=norm.eps))
    mean, var = norm.mean.detach().to(wide), norm.var.detach().to(wide)
    return F.relu(F.batch_norm(x, mean, var, weight, bias, eps=norm.eps))


def text_to_pixel_similarity(
    features: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    *,
    pointwise_weight: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
) -> Tensor:
    """Score every pixel against its own sample's text: (B, C, H, W) -> logits (B, Q, H, W).

    ``kernel`` (B, Q, C, k, k) or (B, C, k, k) is the text projected to one convolution kernel per sample (and query),
    ``bias`` (B, Q) or (B,). As published: one convolution whose groups are the samples, with padding k // 2.
    ``pointwise_weight`` (C, Cin, 1, 1) and ``pointwise_bias`` (C,) are the projector's 1x1 convolution before it.
    """
    if pointwise_weight is not None:
        features = F.conv2d(features, pointwise_weight, pointwise_bias)
    if kernel.ndim == 4:
        kernel = kernel[:, None]
    batch, channels, height, width = features.shape
    queries, size = kernel.shape[1], kernel.shape[-1]
    logits = F.conv2d(
        features.reshape(1, batch * channels, height, width),
        kernel.reshape(batch * queries, channels, size, size),
        None if bias is None else bias.reshape(batch * queries),
        padding=size // 2,
        groups=batch,
    )
    return logits.reshape(batch, queries, height, width)


def contrastive_loss(logits: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """The text-to-pixel contrastive loss (paper, equations 9 and 10) on given logits.

    ``-log sigma(z_t . z_i)`` where pixel i belongs to the referred object and ``-log(1 - sigma(z_t . z_i))`` where it
    does not, averaged over all pixels; for soft targets the two are mixed, which is binary cross-entropy with logits.
    ``target`` must have the logits' shape: see :func:`resize_target`.
    """
    return F.binary_cross_entropy_with_logits(logits, target, reduction=reduction)


def upsampled_bce_with_logits(logits: Tensor, target: Tensor, *, pos_weight: float = 1.0) -> Tensor:
    """AlignFormer's loss: the sum, over Q maps, of the mean binary cross-entropy at the masks' size. A scalar.

    ``logits`` (B, Q, h, w) are upsampled bilinearly (corners not aligned) to the masks ``target`` (B, 1, H, W), which
    all maps share; ``pos_weight`` multiplies the loss on the object. In float32, or float64 for float64 logits.
    Source: arXiv 2301.06429, released code.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    full = F.interpolate(logits.to(wide), tuple(target.shape[-2:]), mode="bilinear", align_corners=False)
    weight = torch.full((), pos_weight, dtype=wide, device=logits.device)
    mean = F.binary_cross_entropy_with_logits(full, target.to(wide).expand_as(full), pos_weight=weight)
    return mean * logits.shape[1]


def resize_target(target: Tensor, size: Sequence[int]) -> Tensor:
    """Resize the mask (B, 1, H, W) to ``size``, the logits' (h, w), by nearest neighbour, as published."""
    if tuple(target.shape[-2:]) == tuple(size):
        return target
    return F.interpolate(target, tuple(size), mode="nearest").detach()
