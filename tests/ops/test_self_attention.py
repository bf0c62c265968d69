"""Self-attention without maps, and dropout on a CPU that draws the same distribution for less."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_path_same

from fastris import reference
from fastris.ops.cpu.dropout_attention import attention_with_dropout, dropout_mask
from fastris.ops.self_attention import self_attention
from fastris.reference import AttentionWeights


def make_inputs(batch: int, rows: int, dim: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"norm_weight": (dim,), "norm_bias": (dim,), "in_proj_weight": (3 * dim, dim), "in_proj_bias": (3 * dim,)}
    shapes |= {"out_proj_weight": (dim, dim), "out_proj_bias": (dim,), "post_norm_weight": (dim,)}
    shapes |= {"post_norm_bias": (dim,)}
    inputs = {name: torch.randn(shape, generator=generator) * dim**-0.5 for name, shape in shapes.items()}
    inputs["norm_weight"] += 1
    inputs["post_norm_weight"] += 1
    inputs["x"] = torch.randn(batch, rows, dim, generator=generator)
    return inputs


def published(x, *, heads=4, **weights):
    positions = reference.sine_positions_1d(x.shape[1], x.shape[2]).to(x.dtype)
    y = reference.self_attention(x.transpose(0, 1), positions[:, None], AttentionWeights(**weights), heads)
    return y.transpose(0, 1)


def ours(x, *, heads=4, **weights):
    positions = reference.sine_positions_1d(x.shape[1], x.shape[2]).to(x.dtype)
    return self_attention(x, positions, AttentionWeights(**weights), heads, impl="torch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 13), (3, 36)])
def test_self_attention_has_the_published_values_and_gradients(batch, rows, dtype):
    assert_path_same(ours, published, make_inputs(batch, rows, 32), dtype)


def test_self_attention_of_an_empty_batch_is_empty():
    inputs = make_inputs(2, 5, 32)
    inputs["x"] = inputs["x"][:0]
    assert ours(**inputs).shape == (0, 5, 32)


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
