"""Instance contrast from two weighted sums of the pixel map, with the 1x1 convolution before it never computed.

The loss sees the map ``W y + b`` only through the mean of each sample's object and of its background. A mean is linear,
so with weights w of the cells and their sum s::

    sum_N w (W y + b) / s  =  W (sum_N w y / s) + b

which is exact: the D-channel map is never formed, and W meets two vectors a sample instead of every pixel. Both sums
are one product of the map (C, N) with the cells' weights (N, 2). The gradient of y is as plain: each cell gets
``w_inside g_inside + w_outside g_outside`` of two constant vectors a sample, so the backward pass does not need y.
Where s is 0 the region is empty and its vector 0, as published: b counts s / max(s, 1e-6) times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops.checks import check_is_tensor, check_shape, check_tensors
from fastris.reference.region_contrast import info_nce, regions

LEAST_WEIGHT = 1e-6
"""What sums of weights and norms of vectors are divided by at least, as in the definition."""


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
    impl: str = "auto",
) -> Tensor:
    """The loss, a scalar: InfoNCE between sentences' centres and the mean pixels of objects and of backgrounds.

    Args:
        features: the pixel map (B, D, h, w), in any memory layout; its gradient has the same one where it is
            contiguous or channels_last.
        centres: (B, D), the kernels that score the map, without their biases; of k x k kernels the sum over the taps.
        mask: (B, 1, H, W) of any size and dtype, in [0, 1]. See :func:`fastris.reference.region_contrast.regions` for
            which cells it puts inside, outside or in neither.
        known: (B, 1, H', W') or None; 0 on a letterbox's border, whose cells belong to neither region.
        image_ids, ref_ids: (B,) integers or None: what shows the same image, and what the same object of it, is
            masked where it would be a false negative.
        band: cells within so many of an ambiguous one are dropped, too.
        temperature: that of the softmax, above 0.
        pointwise_weight: (D, C, 1, 1) or (D, C), a 1x1 convolution that comes before, from features (B, C, h, w). It is
            folded into the means and never computed. pointwise_bias: its bias (D,).
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    Computed and returned in float32, or float64 for float64 features, under autocast, too. Gradients reach features,
    centres and the convolution; the mask, ``known`` and the ids are data. For the backward pass the fast path keeps two
    weights a cell and nothing else of the map's size; it can be differentiated once. ``triton`` reads the map in its
    own dtype, in a pass beside the similarity's. An empty batch, or one without any object, has loss 0.

    Raises ValueError for a wrong shape, band or temperature, or tensors on different devices; TypeError for dtypes that
    do not fit; RuntimeError when ``impl="triton"`` cannot run here.

    Source: :func:`fastris.reference.region_contrast`, which defines the loss.
    """
    _check(features, centres, mask, known, image_ids, ref_ids, band, temperature, pointwise_weight, pointwise_bias)
    mask = mask.detach()
    known = None if known is None else known.detach()
    ids = {"image_ids": image_ids, "ref_ids": ref_ids}
    path = resolve("region_contrast", features.device, features.dtype, impl, len(features))
    if path == "reference":
        if pointwise_weight is not None:
            pointwise_weight = pointwise_weight.reshape(*pointwise_weight.shape[:2], 1, 1)
        convolution = {"pointwise_weight": pointwise_weight, "pointwise_bias": pointwise_bias}
        return reference.region_contrast(
            features, centres, mask, known=known, band=band, temperature=temperature, **ids, **convolution
        )
    wide = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        height, width = features.shape[-2:]
        cells = regions(mask, (height, width), known=known, band=band)
        weights = torch.stack(cells, dim=1).flatten(2).to(wide)  # [B, 2, N]
        vectors = _unit_means(features, weights, pointwise_weight, pointwise_bias, path == "triton")
        centre = F.normalize(centres.to(wide), dim=-1, eps=LEAST_WEIGHT)
        logits = centre @ vectors.transpose(0, 1).flatten(0, 1).t() / temperature
        has_inside, has_outside = weights.any(-1).unbind(1)
        return info_nce(logits, has_inside, has_outside, image_ids, ref_ids)


def _unit_means(
    features: Tensor,
    weights: Tensor,
    pointwise_weight: Tensor | None,
    pointwise_bias: Tensor | None,
    by_kernels: bool,
) -> Tensor:
    """Unit vectors (B, 2, D) of the two regions' means, in the dtype of their cells' ``weights`` (B, 2, N)."""
    wide = weights.dtype
    total = weights.sum(-1, keepdim=True)
    least = total.clamp_min(LEAST_WEIGHT)
    weight = None if pointwise_weight is None else pointwise_weight.to(wide).flatten(1)
    if by_kernels:
        from fastris.kernels.region_contrast import region_means

        means = region_means(features.flatten(2), weights, 1 / least, weight)
    else:
        means = _RegionMeans.apply(features.to(wide), weights, 1 / least, weight)
    if pointwise_bias is not None:
        means = means + total / least * pointwise_bias.to(wide)
    return F.normalize(means, dim=-1, eps=LEAST_WEIGHT)


class _RegionMeans(torch.autograd.Function):
    """``(sum_N w y) scale W^T``: (B, 2, D) of features (B, C, h, w), weights (B, 2, N), scale (B, 2, 1), W (D, C).

    Keeps the weights and two vectors a sample. A function of its own because its products stay in float32 where the
    backward pass runs under autocast, too.
    """

    @staticmethod
    def forward(ctx, features: Tensor, weights: Tensor, scale: Tensor, pointwise: Tensor | None) -> Tensor:
        means = torch.bmm(weights, features.flatten(2).mT) * scale
        ctx.save_for_backward(weights, scale, pointwise, means)
        ctx.size, ctx.channels_inside = features.shape[2:], features.stride(1) == 1
        return means if pointwise is None else _rows_times(means, pointwise.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        weights, scale, pointwise, means = ctx.saved_tensors
        need_features, _, _, need_pointwise = ctx.needs_input_grad
        d_features = d_pointwise = None
        with torch.autocast(weights.device.type, enabled=False):
            if need_pointwise:
                d_pointwise = upstream.flatten(0, 1).t() @ means.flatten(0, 1)
            if need_features:
                vectors = (upstream if pointwise is None else _rows_times(upstream, pointwise)) * scale
                d_features = _two_vectors(weights, vectors, ctx.channels_inside).unflatten(2, ctx.size)
        return d_features, None, None, d_pointwise


def _rows_times(rows: Tensor, matrix: Tensor) -> Tensor:
    """(B, 2, X) times (X, Y): (B, 2, Y)."""
    return (rows.flatten(0, 1) @ matrix).unflatten(0, (-1, 2))


def _two_vectors(weights: Tensor, vectors: Tensor, channels_inside: bool) -> Tensor:
    """The gradient of every cell, (B, C, N): its weights (B, 2, N) times two vectors (B, 2, C), laid out as asked."""
    if channels_inside:
        return torch.bmm(weights.mT, vectors).mT
    return torch.bmm(vectors.mT, weights)


def _check(
    features: Tensor,
    centres: Tensor,
    mask: Tensor,
    known: Tensor | None,
    image_ids: Tensor | None,
    ref_ids: Tensor | None,
    band: int,
    temperature: float,
    pointwise_weight: Tensor | None,
    pointwise_bias: Tensor | None,
) -> None:
    name = "region_contrast"
    convolution = {"pointwise_weight": pointwise_weight, "pointwise_bias": pointwise_bias}
    check_tensors(name, features=features, centres=centres, **convolution)
    check_shape(name, "features", features, ("B", "C", "h", "w"))
    batch, channels = features.shape[:2]
    if 0 in features.shape[1:]:
        raise ValueError(f"{name}: features must have channels and pixels, got {tuple(features.shape)}")
    check_shape(name, "centres", centres, (batch, "D" if pointwise_weight is not None else channels))
    if pointwise_weight is not None:
        tail = (1, 1) if pointwise_weight.ndim == 4 else ()
        check_shape(name, "pointwise_weight", pointwise_weight, (centres.shape[1], channels, *tail))
    if pointwise_bias is not None:
        if pointwise_weight is None:
            raise ValueError(f"{name}: pointwise_bias needs pointwise_weight, which is None")
        check_shape(name, "pointwise_bias", pointwise_bias, (centres.shape[1],))
    data = {"mask": mask, "known": known, "image_ids": image_ids, "ref_ids": ref_ids}
    for field, tensor in data.items():
        if tensor is not None or field == "mask":
            _check_data(name, field, tensor, features)
    if band < 0:
        raise ValueError(f"{name}: band must be 0 or more cells, got {band}")
    if not temperature > 0:
        raise ValueError(f"{name}: temperature must be above 0, got {temperature}")


def _check_data(name: str, field: str, tensor: Tensor | None, features: Tensor) -> None:
    """Masks are (B, 1, H, W) with pixels, ids (B,) integers; all on the features' device."""
    check_is_tensor(name, field, tensor)
    assert tensor is not None
    ids = field.endswith("ids")
    check_shape(name, field, tensor, (len(features),) if ids else (len(features), 1, "H", "W"))
    if not ids and 0 in tensor.shape[2:]:
        raise ValueError(f"{name}: {field} must have pixels, got {tuple(tensor.shape)}")
    if ids and (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"{name}: {field} must be integers, got {tensor.dtype}")
    if tensor.device != features.device:
        raise ValueError(
            f"{name}: {field} is on {tensor.device} but features is on {features.device}; move them to one device"
        )
