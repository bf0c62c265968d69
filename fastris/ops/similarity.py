"""Text-to-pixel similarity: every pixel scored by its own sample's text kernel (CRIS section 3.4).

The algebra, exact in every step. The published projector ends in a 1x1 convolution ``z = W1 x + b1`` and then convolves
each sample's map with that sample's own k x k kernel ``w``, which PyTorch can only write as a grouped convolution.

1. Both are linear, so ``w . (W1 x + b1) = (W1^T w) . x + w . b1``: folding is one small product per *sample* instead
   of one per pixel, and the 1x1 convolution is never computed.
2. ``w_t . b1`` must be counted only where tap t falls inside the image. Every tap is therefore a map of its own,
   ``T_t = w'_t . x + c_t`` at every pixel, and the logits are the sum of the T_t, each shifted by its tap. What is
   shifted in from outside is zero, constants included, so the border needs no special case.
3. The middle tap is inside the image everywhere, so the bias is added to its constant.

What is left is one skinny product (H*W, C) x (C, Q*k*k) that reads the features once, and a shift-add of Q*k*k small
maps. Only the features and the folded kernels are kept for the backward. A BatchNorm and a ReLU before all this may be
given as ``norm``: the kernels apply them as they read, and neither's answer is written or kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops.checks import check_is_tensor, check_shape, check_tensors, compute_dtype
from fastris.ops.cpu.streamed_taps import streamed_tap_sum, streams
from fastris.reference import PixelNorm

KERNEL_SIZES = (1, 3, 5)


class FoldedKernel(NamedTuple):
    """Text kernels after folding, in float32 or wider: the columns of the skinny product.

    ``weight`` (B, Q*k*k, C), ``constants`` (B, Q*k*k), ``size`` = k. Column ``q*k*k + t`` is tap t of query q, rows
    before columns and *flipped*: its map is shifted by (t // k - k // 2, t % k - k // 2), the order of ``F.fold``.
    """

    weight: Tensor
    constants: Tensor
    size: int


def text_to_pixel_similarity(
    features: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    *,
    pointwise_weight: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    norm: PixelNorm | None = None,
    impl: str = "auto",
) -> Tensor:
    """Score every pixel against its own sample's text kernels: (B, C, H, W) -> logits (B, Q, H, W).

    A convolution of each sample's map with that sample's own kernels, stride 1, zero padding k // 2.

    Args:
        features: the pixel map (B, C, H, W), in any memory layout. It is read without a copy where H and W can be
            flattened into one dimension, as in contiguous and channels_last maps and slices of their channels; the
            gradient has the same memory format.
        kernel: (B, Q, C, k, k), or (B, C, k, k) for Q = 1, with k = 1, 3 or 5: the text, projected to Q convolution
            kernels per sample. It may be expanded: M maps (B, M, C, H, W) scored by one text kernel are
            ``features.flatten(0, 1)`` with ``kernel[:, None].expand(B, M, C, k, k).flatten(0, 1)``.
        bias: (B, Q), or (B,) for Q = 1, or None.
        pointwise_weight: (C, Cin, 1, 1) or (C, Cin), a 1x1 convolution that comes before, from features (B, Cin, H, W).
            It is folded into the kernels and never computed. pointwise_bias: its bias (C,).
        norm: a :class:`fastris.reference.PixelNorm`, a BatchNorm and ReLU that the features go through before all else,
            in any floating-point dtype. On ``triton`` with NVIDIA they cost no pass over features that are
            channels_last, with a multiple of 16 channels and at most 16 columns Q*k*k; elsewhere they are applied
            first. Its statistics are data; where they are the features' own (``of_batch``) they must be right, and the
            features' gradient goes through them.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    All tensors are on one device and of one floating-point dtype, which is also that of the logits; under autocast they
    may differ, and the logits are in autocast's dtype. Folding is done and sums are kept in float32, or in float64
    for float64 features, which ``triton`` does not take. An empty batch gives empty logits. Non-finite values pass
    through as IEEE arithmetic says.

    Gradients reach every tensor. The fast paths keep the features and the folded kernels for the backward pass, and
    nothing under ``no_grad``; ``triton`` can be differentiated once.

    Raises ValueError for a wrong shape or tensors on different devices; TypeError for dtypes that do not fit;
    RuntimeError when ``impl="triton"`` cannot run here.

    Source: CRIS section 3.4, published ``Projector.forward``; :func:`fastris.reference.text_to_pixel_similarity`.
    """
    operator = "text_to_pixel_similarity"
    check_arguments(operator, features, kernel, bias, pointwise_weight, pointwise_bias)
    check_norm(operator, features, norm)
    dtype = compute_dtype(features)
    path = resolve(operator, features.device, dtype, impl, features.shape[0])
    features, norm = normed_first(path, features, kernel, norm, dtype)
    # A convolution whose groups are the samples does not exist for none, and exported for as many as there were alone.
    if path == "reference" and features.shape[0] and not torch.compiler.is_exporting():
        return reference_similarity(features, kernel, bias, pointwise_weight, pointwise_bias)
    height, width = features.shape[-2:]
    with torch.autocast(features.device.type, enabled=False):
        folded = fold(kernel, bias, pointwise_weight, pointwise_bias, wide_dtype(dtype))
        pixels = features.to(dtype).flatten(2)
        if path == "triton":
            from fastris.kernels.similarity import similarity

            return similarity(pixels, *folded[:2], *norm_rows(norm), height, width, folded.size)
        return shifted_tap_sum(pixels, folded, height, width).to(dtype)


def normed_first(
    path: str, features: Tensor, kernel: Tensor, norm: PixelNorm | None, dtype: torch.dtype
) -> tuple[Tensor, PixelNorm | None]:
    """The features and what is left of their norm for kernels to apply: all of it, or nothing."""
    if norm is None:
        return features, None
    if path == "triton" and features.stride(1) == 1:
        from fastris.kernels.similarity_tiles import norm_fits

        columns = kernel.shape[-1] ** 2 * (kernel.shape[1] if kernel.ndim == 5 else 1)
        if norm_fits(features.device, features.shape[1], columns):
            return features, norm
    return reference.normed_pixels(features.to(dtype), norm), None


def applies_norm(operator: str, x: Tensor, channels: int, columns: int) -> bool:
    """Whether ``operator``, this or the loss on it, applies the norm of channels_last features made of ``x``."""
    if resolve(operator, x.device, compute_dtype(x), batch=x.shape[0]) != "triton":
        return False
    from fastris.kernels.similarity_tiles import norm_fits

    return norm_fits(x.device, channels, columns)


def norm_rows(norm: PixelNorm | None) -> tuple[Tensor | None, bool]:
    """What kernels take of a norm: its rows (4, C) in float32, and whether its statistics are the features' own."""
    if norm is None:
        return None, False
    mean, var = norm.mean.detach().float(), norm.var.detach().float()
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.float()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.float()
    return torch.stack([mean, torch.rsqrt(var + norm.eps), weight, bias]), norm.of_batch


def check_norm(operator: str, features: Tensor, norm: PixelNorm | None) -> None:
    """Raise an error that names what of the norm does not fit the features."""
    if norm is None:
        return
    if not isinstance(norm, PixelNorm):
        raise TypeError(f"{operator}: norm must be a fastris.reference.PixelNorm, got {type(norm).__name__}")
    for name in ("mean", "var", "weight", "bias"):
        tensor = getattr(norm, name)
        if tensor is None and name in ("weight", "bias"):
            continue
        check_shape(operator, f"norm.{name}", tensor, (features.shape[1],))
        if not tensor.is_floating_point():
            raise TypeError(f"{operator}: norm.{name} must be floating point, got {tensor.dtype}")
        if tensor.device != features.device:
            raise ValueError(
                f"{operator}: norm.{name} is on {tensor.device} but features is on {features.device}; "
                "move them to one device"
            )
    if norm.of_batch and features.numel() <= features.shape[1]:
        raise ValueError(
            f"{operator}: norm is of the batch, which needs more than one pixel, got {tuple(features.shape)}"
        )


def check_arguments(
    operator: str,
    features: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    pointwise_weight: Tensor | None,
    pointwise_bias: Tensor | None,
) -> None:
    """Raise an error that names the argument unless shapes, dtypes and devices fit each other."""
    check_shape(operator, "features", features, ("B", "C", "H", "W"))
    if 0 in features.shape[1:]:
        raise ValueError(f"{operator}: features must have channels and pixels, got {tuple(features.shape)}")
    batch, channels = features.shape[:2]
    for name, tensor in {"kernel": kernel, "bias": bias, "pointwise_weight": pointwise_weight}.items():
        if name == "kernel" or tensor is not None:
            check_is_tensor(operator, name, tensor)
    if kernel.ndim not in (4, 5):
        raise ValueError(f"{operator}: kernel must be (B, Q, C, k, k) or (B, C, k, k), got {tuple(kernel.shape)}")
    queries, width, size = (kernel.shape[1] if kernel.ndim == 5 else 1), kernel.shape[-3], kernel.shape[-1]
    if size not in KERNEL_SIZES or kernel.shape[-2] != size:
        raise ValueError(f"{operator}: kernel must be k x k with k = 1, 3 or 5, got {tuple(kernel.shape)}")
    if queries == 0:
        raise ValueError(f"{operator}: kernel must hold at least one query, got {tuple(kernel.shape)}")
    if pointwise_weight is None:
        if pointwise_bias is not None:
            raise ValueError(f"{operator}: pointwise_bias needs pointwise_weight, which is None")
        width = channels
    else:
        tail = (1, 1) if pointwise_weight.ndim == 4 else ()
        check_shape(operator, "pointwise_weight", pointwise_weight, (width, channels, *tail))
    check_shape(operator, "kernel", kernel, (batch, *kernel.shape[1:-3], width, size, size))
    if pointwise_bias is not None:
        check_shape(operator, "pointwise_bias", pointwise_bias, (width,))
    if bias is not None:
        check_shape(operator, "bias", bias, (batch,) if bias.ndim == 1 and queries == 1 else (batch, queries))
    check_tensors(
        operator,
        features=features,
        kernel=kernel,
        bias=bias,
        pointwise_weight=pointwise_weight,
        pointwise_bias=pointwise_bias,
    )


def reference_similarity(
    features: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    pointwise_weight: Tensor | None,
    pointwise_bias: Tensor | None,
) -> Tensor:
    """The published formula; a pointwise weight (C, Cin) becomes the convolution weight that it expects."""
    if pointwise_weight is not None:
        pointwise_weight = pointwise_weight.reshape(*pointwise_weight.shape[:2], 1, 1)
    return reference.text_to_pixel_similarity(
        features, kernel, bias, pointwise_weight=pointwise_weight, pointwise_bias=pointwise_bias
    )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of folding and of sums: float32, or float64 for float64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def fold(
    kernel: Tensor,
    bias: Tensor | None,
    pointwise_weight: Tensor | None,
    pointwise_bias: Tensor | None,
    wide: torch.dtype,
) -> FoldedKernel:
    """Fold the 1x1 convolution and the bias into the text kernels, in dtype ``wide``. Call it outside autocast."""
    size = kernel.shape[-1]
    taps = size * size
    if kernel.ndim == 4:
        kernel = kernel[:, None]
    batch, queries, channels = kernel.shape[:3]
    weight = kernel.to(wide).flip(-2, -1).permute(0, 1, 3, 4, 2).reshape(batch, queries * taps, channels)
    constants = weight.new_zeros(batch, queries * taps)
    if pointwise_bias is not None:
        constants = weight @ pointwise_bias.to(wide)
    if pointwise_weight is not None:
        weight = weight @ pointwise_weight.to(wide).flatten(1)
    if bias is not None:
        middle = F.pad(bias.to(wide).reshape(batch, queries, 1), (taps // 2, taps // 2))
        constants = constants + middle.reshape(batch, queries * taps)
    return FoldedKernel(weight, constants, size)


def shifted_tap_sum(pixels: Tensor, folded: FoldedKernel, height: int, width: int) -> Tensor:
    """Logits (B, Q, H, W) in the folded kernels' dtype, from ``pixels`` (B, C, H*W) in the compute dtype.

    The operands' order follows the features' memory layout, so that their gradient has the same one.
    """
    if streams(pixels):
        return streamed_tap_sum(pixels, *folded[:2], height, width, folded.size)
    weight = folded.weight.to(pixels.dtype)
    if pixels.stride(1) == 1:
        taps = torch.bmm(pixels.transpose(1, 2), weight.transpose(1, 2)).transpose(1, 2)
    else:
        taps = torch.bmm(weight, pixels)
    taps = taps.to(folded.constants.dtype) + folded.constants[:, :, None]
    if torch.compiler.is_exporting():
        return _sum_of_shifted(taps, height, width, folded.size)
    return F.fold(taps, (height, width), folded.size, padding=folded.size // 2)


def _sum_of_shifted(taps: Tensor, height: int, width: int, size: int) -> Tensor:
    """``F.fold`` of taps (B, Q*k*k, H*W) as a sum of slices, which every runtime of exported programs has."""
    reach = size // 2
    maps = F.pad(taps.unflatten(2, (height, width)).unflatten(1, (-1, size * size)), (reach,) * 4)
    corners = [(2 * reach - tap // size, 2 * reach - tap % size) for tap in range(size * size)]
    shifted = [maps[:, :, tap, top : top + height, left : left + width] for tap, (top, left) in enumerate(corners)]
    return torch.stack(shifted).sum(0)
