"""1x1 convolution of concatenated maps, in plain PyTorch: small maps are convolved before they are upsampled.

A 1x1 convolution mixes channels and upsampling mixes pixels, so they commute, and a convolution of concatenated maps is
the sum of the convolutions of its parts:  W cat[a, up2(b)] = W_a a + up2(W_b b).  The upsampled map and the
concatenation never exist, and b is convolved at a quarter of the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastris import reference
from fastris.dispatch import requested_impl
from fastris.ops.checks import check_shape, check_tensors, compute_dtype


def pointwise_conv_cat(
    full: Sequence[Tensor],
    half: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """1x1 convolution of ``cat[*full, *(up2(h) for h in half)]``, bilinear (align_corners=False): (B, C', 2H, 2W).

    Args:
        full: maps (B, C_i, 2H, 2W); may be empty where ``half`` is not.
        half: maps (B, C_j, H, W), to be upsampled; may be empty where ``full`` is not.
        weight: (C', C, 1, 1), C the sum of all widths in the order of the concatenation; bias (C',) or None.
        impl: ``"reference"`` concatenates and convolves as published; every other choice adds up the convolutions of
            the parts, in plain PyTorch on any device and dtype.

    The result is in autocast's dtype where autocast is on, else in the maps'. Raises ValueError for maps or weights
    that do not fit each other or lie on different devices, TypeError for dtypes that do not fit.

    Source: CRIS section 3.2; ``f2_cat`` and ``aggr`` of the published ``FPN``;
    :func:`fastris.reference.pointwise_conv_cat`.
    """
    _check_maps(full, half, weight, bias)
    if requested_impl(impl) == "reference":
        return reference.pointwise_conv_cat(full, half, weight, bias)
    parts = weight.split([part.shape[1] for part in (*full, *half)], dim=1)
    biases = [bias] + [None] * (len(parts) - 1)  # added once, to any part: upsampling does not change a constant
    terms = [F.conv2d(*term) for term in zip(full, parts[: len(full)], biases, strict=False)]
    if half:
        own = zip(half, parts[len(full) :], biases[len(full) :], strict=True)
        terms.append(_up2(_sum([F.conv2d(*term) for term in own])))
    return _sum(terms).to(compute_dtype((*full, *half)[0]))


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _up2(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")


def _check_maps(full: Sequence[Tensor], half: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> None:
    name = "pointwise_conv_cat"
    if not full and not half:
        raise ValueError(f"{name}: full and half are both empty; give at least one map")
    maps = {f"full[{i}]": part for i, part in enumerate(full)} | {f"half[{i}]": part for i, part in enumerate(half)}
    check_tensors(name, **maps, weight=weight, bias=bias)
    first_name, first = next(reversed(maps.items()))  # of half where there is one: its size doubles exactly
    check_shape(name, first_name, first, ("B", "C", "H", "W"))
    batch, _, height, width = first.shape
    for part_name, part in maps.items():
        scale = 2 if half and part_name.startswith("full") else 1
        check_shape(name, part_name, part, (batch, "C", scale * height, scale * width))
    check_shape(name, "weight", weight, ("C'", sum(part.shape[1] for part in maps.values()), 1, 1))
    if bias is not None:
        check_shape(name, "bias", bias, (weight.shape[0],))
