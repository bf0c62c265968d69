"""Products by oneDNN are PyTorch's, however their operands lie in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastris.nn import lean_linear
from fastris.runtime import cpu_products

WIDE, NARROW = 24, 16


def layouts() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    x, weight, bias = torch.randn(2, 5, WIDE), torch.randn(NARROW, WIDE), torch.randn(NARROW)
    return {
        "plain": (x, weight, bias),
        "no bias": (x, weight, None),
        "one row": (x[0, 0], weight, bias),
        "no rows": (x[:0], weight, bias),
        "a column as the bias": (x, weight, torch.randn(NARROW, 3)[:, 1]),
        "one number as the bias": (x, weight, torch.randn(1).expand(NARROW)),
        "a part of a wider weight": (x, torch.randn(NARROW, 2 * WIDE)[:, WIDE:], bias),
        "a transposed weight": (x, torch.randn(WIDE, NARROW).T, bias),
        "a map with its channels first": (torch.randn(2, WIDE, 5).mT, weight, bias),
        "a part of wider rows": (torch.randn(2, 5, 2 * WIDE)[..., :WIDE], weight, bias),
        "a repeated row": (torch.randn(2, 1, WIDE).expand(2, 5, WIDE), weight, bias),
    }


@pytest.fixture(autouse=True)
def _every_product_by_onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch has no oneDNN here")
    monkeypatch.setattr(cpu_products, "SMALLEST", 0)
    monkeypatch.setattr(cpu_products, "_onednn_wins", lambda: True)


@pytest.mark.parametrize("layout", layouts())
def test_products_are_those_of_float64_in_every_layout(layout):
    x, weight, bias = layouts()[layout]
    wide = None if bias is None else bias.double()
    expected = F.linear(x.double(), weight.double(), wide)
    torch.testing.assert_close(cpu_products.linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
    if x.ndim > 1:
        rows = torch.randn(*x.shape[:-1], NARROW)
        expected = rows.double() @ weight.double()
        torch.testing.assert_close(cpu_products.product(rows, weight).double(), expected, rtol=1e-5, atol=1e-5)


def test_layer_has_the_gradients_of_pytorchs(monkeypatch):
    own, plain = lean_linear.Linear(WIDE, NARROW), nn.Linear(WIDE, NARROW)
    plain.load_state_dict(own.state_dict())
    found = {}
    for layer in (own, plain.double()):
        x = torch.linspace(-1, 1, 10 * WIDE).view(2, 5, WIDE).to(layer.weight.dtype).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        found[layer] = [out.double(), *(each.grad.double() for each in (x, layer.weight, layer.bias))]
    for actual, expected in zip(found[own], found[plain], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_a_library_that_answers_wrongly_is_not_taken(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(cpu_products, "_intel", lambda: False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    try:
        cpu_products._onednn_wins.cache_clear()
        with FakeTensorMode():
            assert cpu_products._onednn_wins()
        cpu_products._onednn_wins.cache_clear()
        monkeypatch.setattr(cpu_products, "_onednn", lambda x, weight, bias=None: 1.01 * F.linear(x, weight, bias))
        assert not cpu_products._onednn_wins()
    finally:
        cpu_products._onednn_wins.cache_clear()
