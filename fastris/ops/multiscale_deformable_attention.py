"""Multi-scale deformable attention: each query reads a few bilinear samples of several maps (arXiv 2010.04159).

The published form calls ``grid_sample`` for every level and keeps every sample for the backward pass, D numbers for
each of S P places per query and head, beside a grid and a copy of the maps. Three things are done otherwise here:

1. A place in pixels is ``reference * size + offset - 1/2``: offsets are in pixels already, so nothing is divided by the
   size only to be multiplied by it again, and float32 loses less.
2. A sample is a sum of four pixels, and a query's output is a weighted sum of samples: one sum of 4 S P rows of the
   maps, whose coefficients are products of softmax weight and bilinear weights. No sample is stored.
3. Places and softmax are cheap, so the backward pass finds them again from offsets and logits. With g the gradient of
   the sum, one product g . row for each of the four pixels gives the gradients of weight and place; a pixel's own
   gradient is the sum of coefficient times g over the samples that read it, which are found by sorting.

Only value, offsets and logits are kept. No sum depends on which thread comes first, so every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops.checks import check_shape, check_tensors
from fastris.ops.deformable_samples import sampled_gradients, sampled_sum

OPERATOR = "multiscale_deformable_attention"


def multiscale_deformable_attention(
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Weighted sums of samples at learned offsets from each query's own place: (B, Q, H * D).

    Args:
        value: (B, M, H, D), the levels one behind the other, each row by row.
        sizes: height and width in pixels of each of the S levels; they have M pixels together.
        reference_points: (Q, 2), each query's x and y in [0, 1], the same in every level; in any floating dtype.
        offsets: (B, Q, H, S, P, 2), x and y in pixels of the level that is sampled.
        logits: (B, Q, H, S * P); softmax over the last axis gives the samples' weights.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    A sample is bilinear with pixel centres at half-integers (align_corners=False); outside a map there are zeros. Where
    a place is exactly on the line between two cells, its gradient is that of one of the two.

    Value, offsets and logits are of one floating dtype, which is also that of the result; under autocast they may
    differ, and the result is float32 or wider, as published. The fast paths compute places, weights and sums in
    float32, or in float64 for a float64 value, which ``triton`` does not take. An empty batch gives an empty result. A
    place or weight that is not finite spoils its own query and head and the gradients of that sample.

    Gradients reach every tensor. The fast paths keep value, offsets and logits for the backward pass, and nothing under
    ``no_grad``; they can be differentiated once, and give the same bits on every run.

    Raises ValueError for a wrong shape, sizes that do not fit or tensors on different devices; TypeError for dtypes
    that do not fit; RuntimeError when ``impl="triton"`` cannot run here.

    Source: arXiv 2010.04159, section 4.1; :func:`fastris.reference.multiscale_deformable_attention`.
    """
    levels = _check(value, sizes, reference_points, offsets, logits)
    path = resolve(OPERATOR, value.device, value.dtype, impl, value.shape[0])
    if path == "reference" and value.shape[0]:  # grid_sample cannot tell the shape of nothing
        return reference.multiscale_deformable_attention(value, levels, reference_points, offsets, logits)
    widened = torch.is_autocast_enabled(value.device.type)
    with torch.autocast(value.device.type, enabled=False):
        if path == "triton":
            from fastris.kernels.deformable_attention import deformable_attention

            output = deformable_attention(value, reference_points.float(), offsets, logits, levels).flatten(2)
        else:
            output = sampled_sum(value, reference_points, offsets, logits, levels).flatten(2)
    return output.to(torch.promote_types(value.dtype, torch.float32)) if widened else output


def gradients_of_sums(
    upstream: Tensor,
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    path: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of value, offsets and logits where they are needed, from that of the weighted sums (B, Q, H * D).

    For autograd Functions that make these three again in the backward pass. Everything is as it was for
    :func:`multiscale_deformable_attention`, whose sums are not made again; ``path``, ``"torch"`` or ``"triton"``, is
    the one that made them.
    """
    upstream = upstream.view(*logits.shape[:3], -1)
    if path == "triton":
        from fastris.kernels.deformable_attention_backward import deformable_gradients

        shape = [number for size in sizes for number in size]
        found: Sequence[Tensor | None] = deformable_gradients(
            upstream, value, reference_points.float(), offsets, logits, shape, needs[0]
        )
    else:
        levels, wanted = tuple(sizes), (needs[0], False, *needs[1:])
        found = sampled_gradients(upstream, value, reference_points, offsets, logits, levels, wanted)
    d_value, _, *others = found
    return tuple(gradient if need else None for gradient, need in zip((d_value, *others), needs, strict=True))


def _check(
    value: Tensor, sizes: Sequence[tuple[int, int]], reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[tuple[int, int], ...]:
    """The sizes as numbers, after an error that names the argument unless all fits."""
    check_tensors(OPERATOR, value=value, offsets=offsets, logits=logits)
    check_shape(OPERATOR, "value", value, ("B", "M", "H", "D"))
    batch, pixels, heads, _ = value.shape
    levels = _check_sizes(sizes, pixels)
    check_shape(OPERATOR, "reference_points", reference_points, ("Q", 2))
    if not reference_points.is_floating_point():
        raise TypeError(f"{OPERATOR}: reference_points must be floating point, got {reference_points.dtype}")
    if reference_points.device != value.device:
        raise ValueError(
            f"{OPERATOR}: reference_points is on {reference_points.device} but value is on {value.device}; "
            "move them to one device"
        )
    queries = len(reference_points)
    check_shape(OPERATOR, "offsets", offsets, (batch, queries, heads, len(levels), "P", 2))
    points = offsets.shape[4]
    check_shape(OPERATOR, "logits", logits, (batch, queries, heads, len(levels) * points))
    for name, tensor in {"value": value, "offsets": offsets}.items():
        if 0 in tensor.shape[1:]:
            raise ValueError(
                f"{OPERATOR}: {name} must have no empty dimension but the batch, got {tuple(tensor.shape)}"
            )
    return levels


def _check_sizes(sizes: Sequence[tuple[int, int]], pixels: int) -> tuple[tuple[int, int], ...]:
    try:
        levels = tuple((int(height), int(width)) for height, width in sizes)
    except (TypeError, ValueError):
        raise ValueError(f"{OPERATOR}: sizes must be pairs (height, width), one for each level, got {sizes}") from None
    if not levels or min(map(min, levels)) < 1:
        raise ValueError(f"{OPERATOR}: sizes must hold a height and width of at least 1 for each level, got {sizes}")
    total = sum(height * width for height, width in levels)
    if total != pixels:
        raise ValueError(f"{OPERATOR}: sizes {list(levels)} have {total} pixels, but value has {pixels}")
    return levels
