"""Instance contrast: what it keeps, how its gradient lies in memory, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastris.ops import region_contrast


def problem(batch: int = 2, channels: int = 8, side: int = 12, width: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"features": (batch, channels, side, side), "centres": (batch, width)}
    shapes |= {"pointwise_weight": (width, channels, 1, 1), "pointwise_bias": (width,)}
    inputs: dict[str, Any] = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs["mask"] = torch.zeros(batch, 1, 4 * side, 4 * side)
    inputs["mask"][..., : 2 * side, side:] = 1
    return inputs


def test_nothing_of_the_map_is_kept_but_two_weights_a_cell():
    inputs = {name: value.requires_grad_(name != "mask") for name, value in problem().items()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        region_contrast(**inputs)
    assert kept, "nothing was kept, and a gradient was wanted"
    assert sum(tensor.numel() for tensor in kept if tensor.numel() >= 2 * 12 * 12) <= 2 * 2 * 12 * 12


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_the_map_has_its_layout_and_two_values_a_channel(layout):
    inputs = problem()
    features = inputs["features"].contiguous(memory_format=layout).requires_grad_()
    (gradient,) = torch.autograd.grad(region_contrast(**inputs | {"features": features}), features)
    assert gradient.is_contiguous(memory_format=layout)
    inside, outside = gradient[:, :, :6, 3:], gradient[:, :, 6:]
    assert torch.equal(inside, inside[:, :, :1, :1].expand_as(inside)) and inside.any()
    assert torch.equal(outside, outside[:, :, :1, :1].expand_as(outside)) and outside.any()


def test_empty_region_is_no_negative_however_large_the_bias():
    inputs = problem()
    inputs["mask"][0] = 1  # no background
    inputs["pointwise_bias"] *= 100
    fast, published = (region_contrast(**inputs, impl=impl) for impl in ("torch", "reference"))
    torch.testing.assert_close(fast, published, rtol=1e-5, atol=1e-6)
    nothing = inputs | {"mask": torch.zeros_like(inputs["mask"])}
    assert region_contrast(**nothing, impl="torch") == 0


def test_half_precision_and_autocast_answer_in_float32():
    inputs = problem()
    exact = region_contrast(**{name: value.double() for name, value in inputs.items()})
    with torch.autocast("cpu", torch.bfloat16):
        loss = region_contrast(**inputs)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    half = {name: value.bfloat16() for name, value in inputs.items()}
    exact = region_contrast(**{name: value.double() for name, value in half.items()})
    torch.testing.assert_close(region_contrast(**half).double(), exact, rtol=1e-5, atol=1e-6)


def test_gradient_taken_under_autocast_is_of_float32():
    inputs = problem()
    features = inputs["features"].requires_grad_()
    (exact,) = torch.autograd.grad(region_contrast(**inputs), features)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = torch.autograd.grad(region_contrast(**inputs), features)[0]
    assert vectors.dtype is torch.float32
    torch.testing.assert_close(vectors, exact, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("features must be (B, C, h, w)", {"features": torch.ones(2, 8, 12)}),
        ("features must have channels and pixels", {"features": torch.ones(2, 8, 0, 12)}),
        ("centres must be (2, D)", {"centres": torch.ones(3, 6)}),
        ("centres must be (2, 8)", {"pointwise_weight": None, "pointwise_bias": None}),
        ("centres is torch.float64 but features is torch.float32", {"centres": torch.ones(2, 6).double()}),
        ("pointwise_weight must be (6, 8, 1, 1)", {"pointwise_weight": torch.ones(6, 8, 3, 3)}),
        ("pointwise_bias needs pointwise_weight", {"pointwise_weight": None, "centres": torch.ones(2, 8)}),
        ("mask must be a tensor, got NoneType", {"mask": None}),
        ("mask must be (2, 1, H, W)", {"mask": torch.ones(2, 48, 48)}),
        ("mask must have pixels", {"mask": torch.ones(2, 1, 0, 48)}),
        ("known must be (2, 1, H, W)", {"known": torch.ones(1, 1, 48, 48)}),
        ("image_ids must be (2)", {"image_ids": torch.arange(3)}),
        ("ref_ids must be integers", {"ref_ids": torch.ones(2)}),
        ("band must be 0 or more cells, got -1", {"band": -1}),
        ("temperature must be above 0, got 0", {"temperature": 0}),
    ],
)
def test_what_does_not_fit_is_named(message, changes):
    for impl in ("reference", "torch"):
        with pytest.raises((TypeError, ValueError), match=re.escape(f"region_contrast: {message}")):
            region_contrast(**problem() | changes, impl=impl)
