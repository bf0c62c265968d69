"""What is no tensor, of a wrong dtype or empty is one error that names the argument, on every operator and path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastris.ops import text_to_pixel_contrastive_loss, text_to_pixel_similarity, upsample2x_conv3x3
from fastris.reference import PixelNorm

MAP, KERNEL, WEIGHT = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 3, 3), torch.ones(6, 3, 3, 3)
TARGET = torch.ones(2, 1, 4, 5)


def bad_calls():
    yield "x must be a tensor, got ndarray", lambda **k: upsample2x_conv3x3(np.ones((1, 3, 4, 4)), WEIGHT, **k)
    yield "weight must be a tensor, got NoneType", lambda **k: upsample2x_conv3x3(MAP, None, **k)
    yield "weight is torch.float16 but x is torch.float32", lambda **k: upsample2x_conv3x3(MAP, WEIGHT.half(), **k)
    yield "x must have channels", lambda **k: upsample2x_conv3x3(MAP[:, :0], WEIGHT[:, :0], **k)
    yield "kernel must be a tensor, got NoneType", lambda **k: text_to_pixel_similarity(MAP, None, **k)
    yield "bias must be a tensor, got list", lambda **k: text_to_pixel_similarity(MAP, KERNEL, [1.0], **k)
    yield "kernel is torch.float16 but", lambda **k: text_to_pixel_similarity(MAP, KERNEL.half(), **k)
    yield "target must be a tensor", lambda **k: text_to_pixel_contrastive_loss(MAP, KERNEL, None, **k)
    yield "target must be floating point", lambda **k: text_to_pixel_contrastive_loss(MAP, KERNEL, TARGET > 0, **k)
    for wrong in ("3", float("nan"), float("inf")):
        yield (
            "pos_weight must be a finite number",
            lambda wrong=wrong, **k: text_to_pixel_contrastive_loss(MAP, KERNEL, TARGET, pos_weight=wrong, **k),
        )
    row = torch.ones(3)
    norms = {
        "norm must be a fastris.reference.PixelNorm, got tuple": (row, row),
        "norm.mean must be a tensor, got NoneType": PixelNorm(None, row, row, row, 1e-5, False),
        r"norm.var must be \(3\), got \(4,\)": PixelNorm(row, torch.ones(4), row, row, 1e-5, False),
        "norm.weight must be floating point": PixelNorm(row, row, row.long(), row, 1e-5, False),
        "norm.bias is on meta but features is on cpu": PixelNorm(row, row, row, row.to("meta"), 1e-5, False),
    }
    for message, norm in norms.items():
        yield message, lambda norm=norm, **k: text_to_pixel_similarity(MAP, KERNEL, norm=norm, **k)
        yield message, lambda norm=norm, **k: text_to_pixel_contrastive_loss(MAP, KERNEL, TARGET, norm=norm, **k)
    alone = MAP[:1, :, :1, :1], KERNEL[:1]
    norm = PixelNorm(row, row, None, None, 1e-5, True)
    yield "needs more than one pixel", lambda **k: text_to_pixel_similarity(*alone, norm=norm, **k)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("message", "call"), list(bad_calls()))
def test_what_does_not_fit_is_named(message, call, impl):
    with pytest.raises((TypeError, ValueError), match=message):
        call(impl=impl)
