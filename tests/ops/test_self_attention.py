"""Self-attention without maps, and dropout on a CPU that draws the same distribution for less."""

from __future__ import annotations

import pytest
import torch

from fastris.ops.cpu.dropout_attention import attention_with_dropout, dropout_mask


def test_dropout_attention_equals_the_formula_under_its_own_mask():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(2, 3, 11, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)
    )
    torch.manual_seed(7)
    output = attention_with_dropout(query, key, value, 0.3)
    torch.manual_seed(7)
    mask = dropout_mask(2, 3, 11, 11, 0.3, int(torch.randint(2**62, (1,)).item()))
    expected = (torch.softmax(query @ key.mT / 8**0.5, -1) * mask / 0.7) @ value
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)
    upstream = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    actual = torch.autograd.grad(output, (query, key, value), upstream)
    for got, want in zip(actual, torch.autograd.grad(expected, (query, key, value), upstream), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_mask_is_bernoulli_and_independent_between_neighbours_and_heads(dropout):
    mask = dropout_mask(2, 4, 101, 101, dropout, seed=3).double()
    keep, count = 1 - dropout, mask.numel()
    deviation = (keep * dropout / count) ** 0.5
    assert abs(mask.mean() - keep) < 5 * deviation
    centred = mask - keep
    for name, product in {
        "along a row": centred[..., 1:] * centred[..., :-1],
        "along a column": centred[..., 1:, :] * centred[..., :-1, :],
        "between heads": centred[:, 1:] * centred[:, :-1],
    }.items():
        assert abs(product.mean()) < 5 * keep * dropout / product.numel() ** 0.5, name


def test_dropout_attention_repeats_under_a_seed_and_differs_without():
    query, key, value = torch.randn(3, 1, 2, 9, 8)
    torch.manual_seed(1)
    first = attention_with_dropout(query, key, value, 0.5)
    second = attention_with_dropout(query, key, value, 0.5)
    torch.manual_seed(1)
    assert torch.equal(first, attention_with_dropout(query, key, value, 0.5))
    assert not torch.equal(first, second)
