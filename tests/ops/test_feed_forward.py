"""The feed-forward sub-layer's dropout, behind the ReLU and on a CPU's random bits."""

from __future__ import annotations

import pytest
import torch
from operator_cases import feed_forward_problem

from fastris.ops.cpu.dropout_bits import dropout as drop
from fastris.ops.feed_forward import feed_forward
from fastris.reference import FeedForwardWeights


def test_what_inner_dropout_drops_gets_no_gradient_and_the_rest_is_scaled():
    inputs = {name: value.double() for name, value in feed_forward_problem(50, dim=8, hidden=16).make().items()}
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
