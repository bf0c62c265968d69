"""Alignment loss of pixels in two passes over the map, with four numbers a pixel kept and nothing of its width.

With y_i the pixels, n_i their norms and f_i = y_i / n_i, the loss is a function of three cosines a pixel::

    pass 1:  n_i,  and the sums  A = mean_+ f_i,  B = mean_- f_i     (one product of the map with two rows of weights)
    pass 2:  s_i = (a . y_i, b . y_i, t . y_i) / n_i,  a = A / |A|, b = B / |B|     (one product with three vectors)

The contrasts themselves are log-sum-exps over rows of N numbers. With g the gradient of s (3 numbers a pixel)::

    d(a, b, t) = sum_i g_i f_i,   dA = (da - a (a . da)) / |A|,   dB alike
    df_i = g_i (a, b, t) + [i in +] dA / |+| + [i in -] dB / |-|,   dy_i = (df_i - f_i (f_i . df_i)) / n_i

where ``f_i . df_i`` needs the cosines, which are kept, and the products of f_i with dA and dB. The normalised map is
never formed. The map itself is the operator's input; the backward pass reads it for the sums, for those two products
and for its own gradient, which it writes once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops.checks import check_is_tensor, check_shape, check_tensors
from fastris.reference.pixel_contrast import pixel_sets

LEAST_NORM = 1e-6
"""What vectors are divided by at least, as in the definition."""


def pixel_contrast(
    features: Tensor,
    sentence: Tensor,
    mask: Tensor,
    *,
    known: Tensor | None = None,
    pixel_temperature: float = 0.1,
    text_temperature: float = 0.07,
    impl: str = "auto",
) -> Tensor:
    """The loss, a scalar: pixels inside a mask against those outside it, along two mean pixels and the sentence.

    Args:
        features: the pixel map (B, D, h, w), in any memory layout; its gradient has the same one where it is
            contiguous or channels_last.
        sentence: (B, D), in the pixels' space.
        mask: (B, 1, H, W) of any size and dtype, in [0, 1]. See
            :func:`fastris.reference.pixel_contrast.pixel_sets` for which cells are inside, outside or neither.
        known: (B, 1, H', W') or None; 0 on a letterbox's border, whose cells belong to neither.
        pixel_temperature, text_temperature: of the softmaxes along the mean pixels and along the sentence, above 0.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    Computed and returned in float32, or float64 for float64 features, under autocast, too. Gradients reach features and
    sentence; mask and ``known`` are data. For the backward pass the fast path keeps the features, and three cosines, a
    norm and two bytes a cell; it can be differentiated once. ``triton`` reads the map in its own dtype. An empty
    batch, or one in which no sample has both an inside and an outside, has loss 0.

    Raises ValueError for a wrong shape or temperature, or tensors on different devices; TypeError for dtypes that do
    not fit; RuntimeError when ``impl="triton"`` cannot run here.

    Source: :func:`fastris.reference.pixel_contrast`, which defines the loss.
    """
    _check(features, sentence, mask, known, pixel_temperature, text_temperature)
    mask = mask.detach()
    known = None if known is None else known.detach()
    path = resolve("pixel_contrast", features.device, features.dtype, impl, len(features))
    if path == "reference":
        temperature = {"pixel_temperature": pixel_temperature, "text_temperature": text_temperature}
        return reference.pixel_contrast(features, sentence, mask, known=known, **temperature)
    wide = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        height, width = features.shape[-2:]
        sets = torch.stack(pixel_sets(mask, (height, width), known=known), dim=1).flatten(2)  # [B, 2, N]
        unit = F.normalize(sentence.to(wide), dim=-1, eps=LEAST_NORM)
        temperatures = pixel_temperature, pixel_temperature, text_temperature
        by_kernels = path == "triton"
        features = features if by_kernels else features.to(wide)
        losses = _PixelContrast.apply(features, unit, sets, temperatures, by_kernels)
        counts = sets.any(-1).all(1)
        return torch.where(counts, losses, 0).sum() / counts.sum().clamp_min(1)


class _PixelContrast(torch.autograd.Function):
    """The losses (B,) of features (B, D, h, w), unit vectors (B, D), sets (B, 2, N) and three temperatures.

    A function of its own because its products stay wide where the backward pass runs under autocast, too. What reads or
    writes the map is done ``by_kernels``, of any dtype, or by products of the vectors' dtype.
    """

    @staticmethod
    def forward(
        ctx, features: Tensor, sentence: Tensor, sets: Tensor, temperatures: tuple[float, ...], by_kernels: bool
    ) -> Tensor:
        pixels = features.flatten(2)
        norm, means = _norms_and_means(pixels, _shares(sets, sentence.dtype), by_kernels)
        lengths = torch.linalg.vector_norm(means, dim=-1, keepdim=True).clamp_min(LEAST_NORM)
        vectors = torch.cat([means / lengths, sentence[:, None]], dim=1)  # [B, 3, D]
        cosines = _cosines(vectors, pixels, norm, by_kernels)
        ctx.save_for_backward(features, sets, norm, lengths, vectors, cosines)
        ctx.temperatures, ctx.by_kernels = temperatures, by_kernels
        own, other, scores = _in_turns(cosines, sets, temperatures)
        excess = F.softplus(_log_sum(scores, other) - scores)
        return (excess * own).sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        features, sets, norm, lengths, vectors, cosines = ctx.saved_tensors
        with torch.autocast(features.device.type, enabled=False):
            pixels = features.flatten(2)
            slopes = upstream[:, None, None] * _slopes(cosines, sets, ctx.temperatures)  # [B, 3, N]
            d_vectors = _sums(slopes / norm, pixels, ctx.by_kernels)
            d_features = None
            if ctx.needs_input_grad[0]:
                anchors, d_anchors = vectors[:, :2], d_vectors[:, :2]
                across = d_anchors - anchors * (anchors * d_anchors).sum(-1, keepdim=True)
                d_means = torch.where(lengths > LEAST_NORM, across, d_anchors) / lengths
                weights = torch.cat([slopes, _shares(sets, norm.dtype)], dim=1) / norm
                along = (slopes * cosines).sum(1, keepdim=True)
                d_features = _combined(
                    torch.cat([vectors, d_means], dim=1), weights, pixels, along, norm, ctx.by_kernels
                )
                d_features = d_features.unflatten(2, features.shape[2:])
        return d_features, d_vectors[:, 2], None, None, None


def _norms_and_means(pixels: Tensor, shares: Tensor, by_kernels: bool) -> tuple[Tensor, Tensor]:
    """The pixels' norms (B, 1, N), and the sums (B, 2, D) of unit vectors by their shares (B, 2, N)."""
    if by_kernels:
        from fastris.kernels.pixel_contrast import norms

        return norms(pixels, shares)
    norm = torch.linalg.vector_norm(pixels, dim=1, keepdim=True).clamp_min(LEAST_NORM)
    return norm, torch.bmm(shares / norm, pixels.mT)


def _cosines(vectors: Tensor, pixels: Tensor, norm: Tensor, by_kernels: bool) -> Tensor:
    """Products (B, 3, N) of the vectors (B, 3, D) with the unit vectors of the pixels."""
    if by_kernels:
        from fastris.kernels.pixel_contrast import cosines

        return cosines(pixels, norm, vectors)
    return torch.bmm(vectors, pixels) / norm


def _sums(weights: Tensor, pixels: Tensor, by_kernels: bool) -> Tensor:
    """The sums (B, 3, D) of the pixels by their weights (B, 3, N)."""
    if by_kernels:
        from fastris.kernels.pixel_contrast import sums

        return sums(pixels, weights)
    return torch.bmm(weights, pixels.mT)


def _combined(
    vectors: Tensor, weights: Tensor, pixels: Tensor, along: Tensor, norm: Tensor, by_kernels: bool
) -> Tensor:
    """The pixels' gradient (B, D, N): their weights (B, 5, N) times five vectors (B, 5, D), less what is along them.

    ``along`` (B, 1, N) is what the first three have along a pixel's unit vector. It lies in memory as the pixels do.
    """
    inverse = (norm > LEAST_NORM) / norm.square()
    if by_kernels:
        from fastris.kernels.pixel_contrast import gradient

        return gradient(pixels, vectors, weights, along, inverse)
    along = along + (weights[:, 3:] * torch.bmm(vectors[:, 3:], pixels)).sum(1, keepdim=True)
    along = along * inverse
    if pixels.stride(1) == 1:
        return torch.bmm(weights.mT, vectors).addcmul_(pixels.mT, along.mT, value=-1).mT
    return torch.bmm(vectors.mT, weights).addcmul_(pixels, along, value=-1)


def _shares(sets: Tensor, dtype: torch.dtype) -> Tensor:
    """Each cell's weight in the mean over its set, (B, 2, N)."""
    return sets.to(dtype) / sets.sum(-1, keepdim=True).clamp_min(1)


def _in_turns(cosines: Tensor, sets: Tensor, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the three contrasts, (B, 3, N) each: shares of the own set, membership of the other one, and the scores."""
    scores = torch.stack([row / t for row, t in zip(cosines.unbind(1), temperatures, strict=True)], dim=1)
    shares = _shares(sets, cosines.dtype)
    return shares[:, [0, 1, 0]], sets[:, [1, 0, 1]], scores


def _log_sum(scores: Tensor, other: Tensor) -> Tensor:
    """Log-sum-exp of the scores over the other set, (B, 3, 1); minus infinity where it is empty."""
    return scores.masked_fill(~other, -torch.inf).logsumexp(-1, keepdim=True)


def _slopes(cosines: Tensor, sets: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """Derivatives (B, 3, N) of each sample's loss by its cosines."""
    own, other, scores = _in_turns(cosines, sets, temperatures)
    log_sum = _log_sum(scores, other)
    pushed = own * torch.sigmoid(log_sum - scores)
    drawn = torch.where(other, pushed.sum(-1, keepdim=True) * torch.exp(scores - log_sum), 0)
    slopes = drawn - pushed
    return torch.stack([row / t for row, t in zip(slopes.unbind(1), temperatures, strict=True)], dim=1)


def _check(
    features: Tensor,
    sentence: Tensor,
    mask: Tensor,
    known: Tensor | None,
    pixel_temperature: float,
    text_temperature: float,
) -> None:
    name = "pixel_contrast"
    check_tensors(name, features=features, sentence=sentence)
    check_shape(name, "features", features, ("B", "D", "h", "w"))
    batch, channels = features.shape[:2]
    if 0 in features.shape[1:]:
        raise ValueError(f"{name}: features must have channels and pixels, got {tuple(features.shape)}")
    check_shape(name, "sentence", sentence, (batch, channels))
    for field, data in (("mask", mask), ("known", known)):
        if data is not None or field == "mask":
            _check_data(name, field, data, features)
    for field, value in (("pixel_temperature", pixel_temperature), ("text_temperature", text_temperature)):
        if not value > 0:
            raise ValueError(f"{name}: {field} must be above 0, got {value}")


def _check_data(name: str, field: str, tensor: Tensor | None, features: Tensor) -> None:
    """Masks are (B, 1, H, W) with pixels, on the features' device."""
    check_is_tensor(name, field, tensor)
    assert tensor is not None
    check_shape(name, field, tensor, (len(features), 1, "H", "W"))
    if 0 in tensor.shape[2:]:
        raise ValueError(f"{name}: {field} must have pixels, got {tuple(tensor.shape)}")
    if tensor.device != features.device:
        raise ValueError(
            f"{name}: {field} is on {tensor.device} but features is on {features.device}; move them to one device"
        )
