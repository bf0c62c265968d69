"""Deformable attention's kernels, on a GPU or under Triton's interpreter: many tiles, far places, opcheck."""

from __future__ import annotations

import os

import pytest
import torch
from operator_cases import deformable_problem

from fastris import reference, use_impl
from fastris.nn.deformable import DeformableLayer
from fastris.nn.lean_deformable import lean_stack
from fastris.nn.separate_attention import stacked
from fastris.testing import run_with_gradients

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import deformable_attention as forward  # noqa: E402
from fastris.kernels import deformable_attention_backward as backward  # noqa: E402
from fastris.kernels.configs import replaced, watched  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
PROBLEM = deformable_problem(2, 5, 2, 6, ((3, 5), (2, 4)), 2)


def inputs() -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in PROBLEM.make().items()}


def test_any_tiles_give_the_same_numbers():
    with watched() as seen:
        expected = run_with_gradients(PROBLEM.call("triton"), inputs())
    assert len(seen) == 3
    for number in range(2):
        with replaced({choice: config.alternatives[number] for choice, config in seen.items()}):
            found = run_with_gradients(PROBLEM.call("triton"), inputs())
        for name, each in found.items():
            torch.testing.assert_close(each, expected[name], rtol=0, atol=1e-6 * expected[name].abs().max().item())


@pytest.mark.parametrize("far", [1e3, 1e9, 3e9, 1e30])
def test_places_far_outside_read_zeros_and_get_no_gradient(far):
    given = inputs()
    given["offsets"][:, ::2] = far
    given["offsets"][:, 1::2] = -far
    found = run_with_gradients(PROBLEM.call("triton"), given)
    assert not any(each.any() for each in found.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_place_that_is_not_finite_spoils_its_own_query_and_head_alone(bad):
    given = inputs()
    clean = PROBLEM.call("triton")(**given).unflatten(2, (2, 6))
    given["offsets"][1, 3, 1, 0, 1, 1] = bad
    found = run_with_gradients(PROBLEM.call("triton"), given)
    output = found["output 0"].unflatten(2, (2, 6))
    assert not output[1, 3, 1].isfinite().any()
    output[1, 3, 1] = clean[1, 3, 1]
    assert torch.equal(output, clean)
    assert found["gradient of value"].isfinite().all()


def test_value_offsets_and_logits_alone_are_kept():
    given = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        PROBLEM.call("triton")(**given)
    assert {each.data_ptr() for each in kept} == {each.data_ptr() for each in given.values()}


def test_the_operators_pass_opcheck():
    given, sizes = inputs(), [3, 5, 2, 4]
    tensors = [given[name] for name in ("value", "reference_points", "offsets", "logits")]
    torch.library.opcheck(forward._deformable, (*(each.clone().requires_grad_() for each in tensors), sizes))
    upstream = torch.randn(2, 5, 2, 6, device=DEVICE)
    for need_value in (True, False):
        torch.library.opcheck(backward._gradients, (upstream, *tensors, sizes, need_value))


def test_a_stack_that_makes_its_inputs_again_has_the_bits_of_its_layers():
    torch.manual_seed(0)
    sizes = ((1, 2), (2, 3))
    layers = stacked(DeformableLayer(16, 32, 2, 2, 2), 2).to(DEVICE)
    y, positions = torch.randn(2, 8, 16, device=DEVICE), torch.randn(8, 16, device=DEVICE)
    upstream, places = torch.randn_like(y), reference.pixel_centres(sizes, DEVICE)
    results = []
    for lean in (True, False):
        output = given = y.clone().requires_grad_()
        with use_impl("triton"):
            if lean:
                output = lean_stack(layers, output, positions, sizes, places)
            for layer in () if lean else layers:
                output = layer(output, positions, sizes, places)
        results.append([output, *torch.autograd.grad(output, [given, *layers.parameters()], upstream)])
    assert len(results[0]) == 2 + 2 * 16
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0 if DEVICE == "cpu" else 1e-5)
