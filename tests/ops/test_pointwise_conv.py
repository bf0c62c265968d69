"""pointwise_conv_cat: the published formula by name, its cost, and maps that do not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operator_cases import pointwise_problem, split_maps
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastris import use_impl
from fastris.ops.pointwise_conv import pointwise_conv_cat


def published(weight: Tensor, bias: Tensor, **maps: Tensor) -> Tensor:
    full, half = split_maps(maps)
    up = [F.interpolate(part, scale_factor=2, mode="bilinear") for part in half]
    return F.conv2d(torch.cat([*full, *up], 1), weight, bias)


@pytest.mark.parametrize("widths", [((4, 4), (4,)), ((5, 4), ()), ((), (3, 5))])
def test_reference_is_the_published_formula(widths):
    problem = pointwise_problem(*widths)
    inputs = problem.make()
    with use_impl("reference"):
        assert torch.equal(problem.call("auto")(**inputs), published(**inputs))


def test_pointwise_conv_costs_less_than_that_of_the_concatenation():
    problem = pointwise_problem((8,), (8,))

    def flops(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function(**problem.make())
        return counter.get_total_flops()

    assert flops(problem.call("torch")) == flops(published) * 5 / 8


@pytest.mark.parametrize(
    ("full", "half", "weight", "message"),
    [
        ([], [], (4, 4, 1, 1), "full and half are both empty"),
        ([(2, 4, 6, 8)], [(2, 4, 3, 5)], (4, 8, 1, 1), r"full\[0\] must be \(2, C, 6, 10\), got \(2, 4, 6, 8\)"),
        ([(2, 4, 7, 8)], [(2, 4, 3, 4)], (4, 8, 1, 1), r"full\[0\] must be \(2, C, 6, 8\)"),
        ([(2, 4, 6, 8), (1, 4, 6, 8)], [], (4, 8, 1, 1), r"full\[0\] must be \(1, C, 6, 8\)"),
        ([(2, 4, 6, 8)], [(2, 4, 3, 4)], (4, 9, 1, 1), r"weight must be \(C', 8, 1, 1\)"),
        ([(4, 6, 8)], [], (4, 4, 1, 1), r"full\[0\] must be \(B, C, H, W\)"),
    ],
)
def test_maps_that_do_not_fit_are_named(full, half, weight, message):
    with pytest.raises(ValueError, match=message):
        pointwise_conv_cat(list(map(torch.zeros, full)), list(map(torch.zeros, half)), torch.zeros(weight))
