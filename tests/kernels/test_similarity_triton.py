"""The similarity kernels, on a GPU or under Triton's interpreter: published values and gradients, the same bits."""

from __future__ import annotations

import os

import pytest
import torch
from bounds import assert_path_same, run_with_gradients
from similarity_cases import Case, layouts, similarity
from torch.utils.flop_counter import FlopCounterMode

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import similarity as kernels  # noqa: E402
from fastris.kernels import similarity_backward as backward_kernels  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
SMALL = Case(2, 2, 4, 5, 4, pointwise=3)


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in case.inputs().items()}


@pytest.mark.skipif(not HAS_GPU, reason="CRIS's own size takes minutes under the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_size_of_the_published_model_is_right(dtype):
    case = Case(4, 1, 256, 104, 104, pointwise=256)
    assert_path_same(similarity("triton"), similarity("reference"), inputs_of(case), dtype)


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
def test_any_memory_layout_gives_the_same_bits(layout):
    inputs = inputs_of(SMALL)
    features = layouts(inputs["features"])[layout]
    results = run_with_gradients(similarity("triton"), inputs | {"features": features})
    expected = run_with_gradients(similarity("triton"), inputs | {"features": features.contiguous()})
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name
    if layout == "channels_last":
        assert results["gradient of features"].is_contiguous(memory_format=torch.channels_last)


def test_a_nan_pixel_reaches_its_own_neighbourhood_only():
    inputs = inputs_of(Case(1, 1, 4, 7, 8))
    inputs["features"][0, 2, 3, 4] = torch.nan
    finite = torch.isfinite(similarity("triton")(**inputs))[0, 0]
    expected = torch.ones(7, 8, dtype=torch.bool, device=DEVICE)
    expected[2:5, 3:6] = False
    assert torch.equal(finite, expected)


@pytest.mark.parametrize(("frozen", "skipped"), [("features", "_features_gradient"), ("kernel", "_kernel_gradient")])
def test_a_gradient_that_nobody_wants_is_not_computed(frozen, skipped, monkeypatch):
    monkeypatch.setattr(backward_kernels, skipped, None)
    inputs = {name: tensor.requires_grad_(name != frozen) for name, tensor in inputs_of(Case(1, 1, 3, 4, 4)).items()}
    inputs["bias"] = None
    similarity("triton")(**inputs).sum().backward()


def folded(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (B, C, P), folded kernels and tap constants, as leaves."""
    columns, pixels = case.queries * case.size**2, case.height * case.width
    shapes = ((case.batch, case.channels, pixels), (case.batch, columns, case.channels), (case.batch, columns))
    return tuple(torch.randn(shape).to(DEVICE).requires_grad_() for shape in shapes)


def test_operators_pass_opcheck():
    case = Case(2, 1, 3, 4, 3)
    x, weight, constants = folded(case)
    dlogits = torch.randn(case.logits_shape, device=DEVICE)
    sizes = case.height, case.width, case.size
    norm = torch.rand(4, case.channels, device=DEVICE, requires_grad=True)
    for given, of_batch in ((None, False), (norm, False), (norm, True)):
        torch.library.opcheck(kernels._similarity, (x, weight, constants, given, of_batch, *sizes))
    x, weight, terms = x.detach(), weight.detach(), torch.rand(6, case.channels, device=DEVICE)
    for given in (None, norm.detach(), terms):
        torch.library.opcheck(backward_kernels._features_gradient, (dlogits, weight, x, given, case.size))
    for given in (None, norm.detach()):
        torch.library.opcheck(backward_kernels._kernel_gradient, (dlogits, x, given, case.size))


def test_forward_and_both_gradients_count_their_operations():
    case = Case(2, 1, 3, 4, 5)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(case).items()}
    with FlopCounterMode(display=False) as counter:
        similarity("triton")(**inputs).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * case.batch * case.channels * case.height * case.width * 9
