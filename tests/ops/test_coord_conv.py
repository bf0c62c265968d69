"""coord_conv: the published formula by name, and weights that do not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operator_cases import coord_problem

from fastris import reference, use_impl
from fastris.ops.coord_conv import coord_conv


def test_reference_is_the_published_formula():
    problem = coord_problem(5, 3, padding=1)
    inputs = problem.make()
    published = F.conv2d(reference.append_coordinates(inputs["x"]), inputs["weight"], inputs["bias"], padding=1)
    assert torch.equal(problem.call("reference")(**inputs), published)
    with use_impl("reference"):
        assert torch.equal(problem.call("auto")(**inputs), published)


def test_coordinate_weights_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"coord_conv: weight must be \(C', 6, k, k\), got \(3, 4, 3, 3\)"):
        coord_conv(torch.zeros(1, 4, 5, 5), torch.zeros(3, 4, 3, 3))
    with pytest.raises(TypeError, match=r"weight is torch\.float64"):
        coord_conv(torch.zeros(1, 4, 5, 5), torch.zeros(3, 6, 3, 3).double())
