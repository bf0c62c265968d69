"""Binary cross-entropy on upsampled logits: where its samples lie, what it makes and keeps, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastris.ops import upsampled_bce, upsampled_bce_with_logits


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 5), (3, 12), (7, 7), (11, 29), (29, 11), (120, 480)])
def test_samples_lie_where_pytorch_puts_them(inputs, outputs):
    x = torch.randn(1, 1, inputs, dtype=torch.float64)
    samples = upsampled_bce._samples(inputs, outputs, x)
    expected = F.interpolate(x, outputs, mode="linear", align_corners=False)
    torch.testing.assert_close(samples.between(x, dim=-1), expected)
    torch.testing.assert_close(x @ samples.matrix(inputs).T, expected)
    assert [upsampled_bce._low(row, inputs, outputs) for row in range(outputs)] == samples.low.tolist()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel())
        return result


def test_no_map_is_made_or_kept_at_full_size(monkeypatch):
    monkeypatch.setattr(upsampled_bce, "TILE", 2**12)
    logits, target = torch.randn(2, 7, 30, 30).requires_grad_(), torch.rand(2, 1, 120, 120)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with Largest() as made, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        upsampled_bce_with_logits(logits, target).backward()
    assert made.largest <= max(7 * 30 * 120, target.numel()) < 7 * 120 * 120, "a map of full size"
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 7, 30, 30)]


@pytest.mark.parametrize("tile", [1, 500, 2**20])
def test_size_of_the_tiles_changes_no_number(monkeypatch, tile):
    logits, target = torch.randn(2, 3, 8, 9, dtype=torch.float64).requires_grad_(), torch.rand(2, 1, 30, 21).double()
    expected = upsampled_bce_with_logits(logits, target, pos_weight=1.7, impl="reference")
    monkeypatch.setattr(upsampled_bce, "TILE", tile)
    loss = upsampled_bce_with_logits(logits, target, pos_weight=1.7)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits)[0] for each in (loss, expected)))


def test_logits_of_thousands_have_a_finite_loss_and_gradient():
    logits = torch.tensor([[-1e4, 1e4], [1e4, -1e4]]).reshape(1, 1, 2, 2).requires_grad_()
    target = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)[None, None]
    loss = upsampled_bce_with_logits(logits, target)
    torch.testing.assert_close(loss, upsampled_bce_with_logits(logits, target, impl="reference"))
    assert loss > 1000 and torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_answer_is_in_float32_under_autocast_and_of_half_precision():
    logits, target = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 32, 32)
    exact = upsampled_bce_with_logits(logits, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(upsampled_bce_with_logits(logits, target), exact)
    assert upsampled_bce_with_logits(logits.half(), target.half()).dtype is torch.float32


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("logits must be (B, Q, h, w)", {"logits": torch.ones(2, 8, 8)}),
        ("logits must be floating point, got torch.int64", {"logits": torch.ones(2, 3, 8, 8).long()}),
        ("logits must have maps and pixels", {"logits": torch.ones(2, 0, 8, 8)}),
        ("target must be a tensor, got NoneType", {"target": None}),
        ("target must be floating point, got torch.bool", {"target": torch.ones(2, 1, 32, 32).bool()}),
        ("target must be (2, 1, H, W), got (2, 3, 32, 32)", {"target": torch.ones(2, 3, 32, 32)}),
        ("target must have pixels", {"target": torch.ones(2, 1, 0, 32)}),
        ("pos_weight must be a finite number, got nan", {"pos_weight": float("nan")}),
    ],
)
def test_what_does_not_fit_is_named(message, changes):
    inputs = {"logits": torch.ones(2, 3, 8, 8), "target": torch.ones(2, 1, 32, 32)} | changes
    for impl in ("reference", "torch"):
        with pytest.raises((TypeError, ValueError), match=re.escape(f"upsampled_bce_with_logits: {message}")):
            upsampled_bce_with_logits(**inputs, impl=impl)
