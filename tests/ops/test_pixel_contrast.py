"""The alignment loss: its formula pair by pair, what it keeps, how its gradient lies in memory, what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastris.ops import pixel_contrast
from fastris.reference.pixel_contrast import pixel_sets


def problem(batch: int = 2, channels: int = 8, side: int = 12) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "features": torch.randn(batch, channels, side, side, generator=generator),
        "sentence": torch.randn(batch, channels, generator=generator),
        "mask": torch.zeros(batch, 1, 4 * side, 4 * side),
    }
    inputs["mask"][..., : 2 * side, side:] = 1
    return inputs


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def by_pairs(positives: Tensor, negatives: Tensor, anchor: Tensor, temperature: float) -> Tensor:
    """-log(e^s / (e^s + sum of the negatives' e^s)), written out for each positive."""
    up, down = (torch.exp(pixels @ anchor / temperature) for pixels in (positives, negatives))
    return torch.stack([-(each / (each + down.sum())).log() for each in up]).mean()


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_loss_is_that_of_every_pixel_against_the_others_written_out(impl):
    inputs = {name: value.double() for name, value in problem(3, 4, 5).items()}
    inputs["mask"][1, :, :, 3:] *= 0.3  # no cell of it counts as inside or outside but the first column
    inputs["mask"][2] = 0
    losses = []
    for row in range(3):
        covered = inputs["mask"][row, 0].unflatten(0, (5, 4)).unflatten(2, (5, 4)).mean((1, 3)).flatten()
        pixels = unit(inputs["features"][row].flatten(1).T)
        most = covered.max()
        inside, outside = covered > 0.5 if most > 0.5 else (covered == most) & (most > 0), covered == 0
        if not inside.any() or not outside.any():
            continue
        plus, minus = pixels[inside], pixels[outside]
        losses.append(
            by_pairs(plus, minus, unit(inputs["sentence"][row]), 0.07)
            + by_pairs(plus, minus, unit(plus.mean(0)), 0.1)
            + by_pairs(minus, plus, unit(minus.mean(0)), 0.1)
        )
    assert len(losses) == 2
    torch.testing.assert_close(pixel_contrast(**inputs, impl=impl), sum(losses) / 2, rtol=1e-10, atol=0)


def test_small_object_is_where_it_covers_most_and_ambiguous_cells_are_nowhere():
    mask = torch.zeros(3, 1, 8, 8)
    mask[0, :, :3, :4], mask[1, :, 3:5, 3:5] = 1, 1
    inside, outside = pixel_sets(mask, (2, 2))
    assert inside.flatten(1).tolist() == [[True, False, False, False], [True] * 4, [False] * 4]
    assert outside.flatten(1).tolist() == [[False, True, True, True], [False] * 4, [True] * 4]
    mask[0, :, 3:5] = 1
    assert pixel_sets(mask, (2, 2)).outside[0].tolist() == [[False, False], [False, False]]


def test_cells_with_any_part_on_the_border_are_nowhere():
    mask, known = torch.zeros(3, 1, 8, 8), torch.ones(3, 1, 8, 8)
    mask[0, :, :4, :4], mask[1, :, 3:5, 3:5], mask[2, :, 7:] = 1, 1, 1
    known[:, :, 7:] = 0  # a quarter of the lower cells
    inside, outside = pixel_sets(mask, (2, 2), known=known.bool())
    assert inside.flatten(1).tolist() == [[True, False, False, False], [True, True, False, False], [False] * 4]
    assert outside.flatten(1).tolist() == [[False, True, False, False], [False] * 4, [True, True, False, False]]


def test_four_numbers_and_two_bytes_a_pixel_are_kept_beside_the_map():
    inputs = {name: value.requires_grad_(name != "mask") for name, value in problem().items()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pixel_contrast(**inputs)
    own = [t for t in kept if t.data_ptr() != inputs["features"].data_ptr()]
    assert len(own) < len(kept), "the map is needed, and was not kept"
    assert sum(tensor.nbytes for tensor in own if tensor.numel() >= 2 * 12 * 12) <= 2 * 12 * 12 * (4 * 4 + 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_the_map_has_its_layout(layout):
    inputs = problem()
    features = inputs["features"].contiguous(memory_format=layout).requires_grad_()
    (gradient,) = torch.autograd.grad(pixel_contrast(**inputs | {"features": features}), features)
    assert gradient.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_samples_without_object_or_background_are_left_out(impl):
    inputs = {name: value.double() for name, value in problem(3).items()}
    inputs["mask"][1], inputs["mask"][2] = 0, 1
    features = inputs["features"].requires_grad_()
    loss = pixel_contrast(**inputs, impl=impl)
    (gradient,) = torch.autograd.grad(loss, features)
    alone = pixel_contrast(**{name: value[:1] for name, value in inputs.items()}, impl=impl)
    assert loss == alone and gradient[0].any() and not gradient[1:].any()
    assert pixel_contrast(**inputs | {"mask": torch.ones_like(inputs["mask"])}, impl=impl) == 0


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_pixels_of_zeros_give_finite_numbers(impl):
    inputs = problem()
    inputs["features"][:, :, :, 4:8] = 0
    features = inputs["features"].requires_grad_()
    loss = pixel_contrast(**inputs, impl=impl)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.isfinite() and gradient.isfinite().all()


def test_half_precision_and_autocast_answer_in_float32():
    inputs = problem()
    exact = pixel_contrast(**{name: value.double() for name, value in inputs.items()})
    features = inputs["features"].requires_grad_()
    (expected,) = torch.autograd.grad(pixel_contrast(**inputs), features)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pixel_contrast(**inputs)
        (gradient,) = torch.autograd.grad(loss, features)
    assert loss.dtype is torch.float32 and gradient.dtype is torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("features must be (B, D, h, w)", {"features": torch.ones(2, 8, 12)}),
        ("features must have channels and pixels", {"features": torch.ones(2, 8, 0, 12)}),
        ("sentence must be (2, 8)", {"sentence": torch.ones(2, 6)}),
        ("sentence is torch.float64 but features is torch.float32", {"sentence": torch.ones(2, 8).double()}),
        ("mask must be a tensor, got NoneType", {"mask": None}),
        ("mask must be (2, 1, H, W)", {"mask": torch.ones(2, 48, 48)}),
        ("mask must have pixels", {"mask": torch.ones(2, 1, 0, 48)}),
        ("mask is on meta but features is on cpu", {"mask": torch.ones(2, 1, 48, 48, device="meta")}),
        ("known must be (2, 1, H, W)", {"known": torch.ones(1, 1, 48, 48)}),
        ("known is on meta but features is on cpu", {"known": torch.ones(2, 1, 48, 48, device="meta")}),
        ("pixel_temperature must be above 0, got 0", {"pixel_temperature": 0}),
        ("text_temperature must be above 0, got nan", {"text_temperature": float("nan")}),
    ],
)
def test_what_does_not_fit_is_named(message, changes):
    for impl in ("reference", "torch"):
        with pytest.raises((TypeError, ValueError), match=re.escape(f"pixel_contrast: {message}")):
            pixel_contrast(**problem() | changes, impl=impl)
