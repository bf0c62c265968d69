"""The feed-forward sub-layer: the published values and gradients from a third of the memory."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_path_same

from fastris import reference
from fastris.ops.cpu.dropout_bits import dropout as drop
from fastris.ops.feed_forward import feed_forward
from fastris.reference import FeedForwardWeights


def make_inputs(*leading: int, dim: int = 24, hidden: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"norm_weight": (dim,), "norm_bias": (dim,), "up_weight": (hidden, dim), "up_bias": (hidden,)}
    shapes |= {"inner_norm_weight": (hidden,), "inner_norm_bias": (hidden,), "down_weight": (dim, hidden)}
    shapes |= {"down_bias": (dim,)}
    inputs = {name: torch.randn(shape, generator=generator) * dim**-0.5 for name, shape in shapes.items()}
    inputs["norm_weight"] += 1
    inputs["inner_norm_weight"] += 1
    return inputs | {"x": torch.randn(*leading, dim, generator=generator)}


def ours(x, **weights):
    return feed_forward(x, FeedForwardWeights(**weights), impl="torch")


def published(x, **weights):
    return reference.feed_forward(x, FeedForwardWeights(**weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("leading", [(1, 1), (7, 3), (5,), (0, 2)])
def test_feed_forward_has_the_published_values_and_gradients(leading, dtype):
    assert_path_same(ours, published, make_inputs(*leading), dtype)


def test_feed_forward_gradients_are_exact_in_float64():
    inputs = {name: value.double().requires_grad_() for name, value in make_inputs(3, 2, dim=6, hidden=10).items()}
    names = list(inputs)
    assert torch.autograd.gradcheck(
        lambda *values: ours(**dict(zip(names, values, strict=True))), tuple(inputs.values())
    )


@pytest.mark.parametrize("learnt", ["x", "up_weight", "down_weight", "inner_norm_bias"])
def test_one_tensor_alone_can_be_learnt(learnt):
    inputs = {name: value.double() for name, value in make_inputs(5).items()}
    inputs[learnt].requires_grad_()
    got, want = (torch.autograd.grad(path(**inputs).square().sum(), inputs[learnt])[0] for path in (ours, published))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * float(want.abs().max()))


def test_what_inner_dropout_drops_gets_no_gradient_and_the_rest_is_scaled():
    inputs = {name: value.double() for name, value in make_inputs(50, dim=8, hidden=16).items()}
    hidden_bias = inputs["up_bias"].requires_grad_()
    weights = FeedForwardWeights(**{k: v for k, v in inputs.items() if k != "x"})
    torch.manual_seed(4)
    output = feed_forward(inputs["x"], weights, inner_dropout=0.5, training=True, impl="torch")
    (gradient,) = torch.autograd.grad(output.sum(), hidden_bias)

    torch.manual_seed(4)
    normed = torch.nn.functional.layer_norm(inputs["x"], (8,), weights.norm_weight, weights.norm_bias)
    hidden = drop(torch.relu(normed @ weights.up_weight.T + hidden_bias), 0.5, True)
    hidden = torch.nn.functional.layer_norm(hidden, (16,), weights.inner_norm_weight, weights.inner_norm_bias)
    expected = inputs["x"] + hidden @ weights.down_weight.T + weights.down_bias
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), hidden_bias)[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_dropout_keeps_the_mean_and_drops_its_share(probability):
    x = torch.ones(301, 307, requires_grad=True)
    y = drop(x, probability, True)
    share, count = (y == 0).double().mean(), y.numel()
    assert abs(share - probability) <= 5 * (probability * (1 - probability) / count) ** 0.5
    if probability < 1:
        torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - probability)))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())
    assert drop(x, probability, False) is x
