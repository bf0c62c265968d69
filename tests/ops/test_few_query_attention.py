"""Few-query attention: what it keeps, what its softmax drops, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from operator_cases import few_query_problem
from torch import Tensor

PROBLEM = few_query_problem(2, 1, 300, 64, 32, 4, fixed=True)


def run(inputs: dict[str, Tensor], impl: str = "torch") -> Tensor:
    return PROBLEM.call(impl)(**inputs)


def test_nothing_of_pixel_size_is_kept_but_the_pixels():
    inputs = {name: value.requires_grad_(name != "positions") for name, value in PROBLEM.make().items()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(inputs)
    assert kept, "nothing was kept, and a gradient was wanted"
    own = {inputs[name].data_ptr() for name in ("pixels", "positions")}
    large = [tensor for tensor in kept if tensor.numel() >= 300 * 32 and tensor.data_ptr() not in own]
    assert not large, [tuple(tensor.shape) for tensor in large]


@pytest.mark.parametrize("inside", ["channels", "pixels"])
def test_gradient_of_the_pixels_lies_in_memory_as_they_do(inside):
    inputs = PROBLEM.make()
    if inside == "pixels":
        inputs["pixels"] = inputs["pixels"].mT.contiguous().mT
    inputs["pixels"].requires_grad_()
    (gradient,) = torch.autograd.grad(run(inputs).square().sum(), inputs["pixels"])
    assert gradient.stride() == inputs["pixels"].stride()


def test_key_bias_changes_nothing_and_has_no_gradient():
    inputs = PROBLEM.make()
    inputs["in_proj_bias"].requires_grad_()
    output = run(inputs)
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs["in_proj_bias"])
    queries, keys, values = gradient.chunk(3)
    assert not keys.any() and queries.any() and values.any()
    inputs["in_proj_bias"] = inputs["in_proj_bias"].detach() + torch.tensor([0.0, 9.0, 0.0]).repeat_interleave(64)
    torch.testing.assert_close(run(inputs), output, rtol=0, atol=0)


def test_scores_beyond_float16_stay_finite_and_right():
    inputs = PROBLEM.make()
    inputs["query_weight"] *= 3e3  # scores of hundreds of thousands: every head reads one pixel
    torch.testing.assert_close(run(inputs), run(inputs, "reference"), rtol=1e-3, atol=1e-3)
    inputs["positions"] *= 0
    inputs["pixels"][:, 17] *= 20
    low = {name: value.half().requires_grad_() for name, value in inputs.items()}
    output = run(low)
    torch.testing.assert_close(output, run(low, "reference"), rtol=2e-2, atol=2e-2)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), list(low.values())[:-1]))


def test_positions_may_be_a_float32_table_whatever_the_pixels_are():
    for dtype in (torch.float64, torch.bfloat16):
        inputs = {
            name: value.to(torch.float32 if name == "positions" else dtype) for name, value in PROBLEM.make().items()
        }
        assert run(inputs).dtype is dtype
        bound = 1e-12 if dtype is torch.float64 else 3e-2
        torch.testing.assert_close(run(inputs), run(inputs, "reference"), rtol=bound, atol=bound)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    inputs = PROBLEM.make()
    return inputs | {name: change(inputs[name])}


@pytest.mark.parametrize(
    ("message", "inputs"),
    [
        ("query must be (B, Q, D), got (2, 64)", changed("query", lambda x: x[:, 0])),
        ("query holds no query", changed("query", lambda x: x[:, :0])),
        ("pixels holds no pixel", changed("pixels", lambda x: x[:, :0])),
        ("pixels must be (2, N, K)", changed("pixels", lambda x: x[:1])),
        ("query_positions must be (1, 64)", changed("query_positions", lambda x: x[0])),
        ("level must be (32)", changed("level", lambda x: x[:31])),
        ("positions must be (300, 32)", changed("positions", lambda x: x[:299])),
        ("positions must be floating point", changed("positions", lambda x: x.long())),
        ("key_weight must be (64, 32)", changed("key_weight", lambda x: x.T)),
        ("in_proj_bias must be (192)", changed("in_proj_bias", lambda x: x[:64])),
        ("out_weight is torch.float64 but query is torch.float32", changed("out_weight", lambda x: x.double())),
    ],
)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_what_does_not_fit_is_named(message, inputs, impl):
    with pytest.raises((TypeError, ValueError), match=re.escape(f"few_query_attention: {message}")):
        run(inputs, impl)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("forbidden must be (2, 300), got (1, 300)", lambda x: x[:1]),
        ("forbidden must be bool, got torch.float32", lambda x: x.float()),
        ("forbidden must be a tensor, got list", lambda x: x.tolist()),
        ("forbidden is on meta but pixels is on cpu", lambda x: x.to("meta")),
    ],
)
def test_a_mask_that_does_not_fit_is_named(message, change):
    with pytest.raises((TypeError, ValueError), match=re.escape(f"few_query_attention: {message}")):
        PROBLEM.call("torch")(**PROBLEM.make(), forbidden=change(torch.zeros(2, 300, dtype=torch.bool)))


def test_forbidden_pixels_are_neither_read_nor_moved():
    problem = few_query_problem(2, 1, 20, 24, 24, 4, hides=True)
    inputs = problem.make()
    hidden = inputs["forbidden"][..., None]
    answer = problem.call("torch")(**inputs)
    inputs["pixels"] = torch.where(hidden, 1e4, inputs["pixels"]).requires_grad_()
    changed = problem.call("torch")(**inputs)
    torch.testing.assert_close(changed, answer, rtol=0, atol=0)
    changed.sum().backward()
    assert not (inputs["pixels"].grad * hidden).any() and inputs["pixels"].grad.any()


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads must divide the width 64 of query, got 5"):
        few_query_problem(2, 1, 300, 64, 32, 5).call("torch")(**PROBLEM.make())
