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
CASES = [
    Case(2, 1, 5, 7, 5),
    Case(1, 1, 70, 9, 15, pointwise=3),  # more than one tile of channels, and of pixels
    Case(1, 4, 3, 5, 6),  # more than one tile of columns
    Case(2, 1, 3, 17, 16, size=5, pointwise=2),  # more than one partial sum of the kernels' gradient
]
TINY = [Case(1, 1, 1, 1, 1), Case(2, 2, 3, 1, 2, size=5, pointwise=3), Case(1, 2, 5, 2, 1, size=1)]
SMALL = Case(2, 2, 4, 5, 4, pointwise=3)


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in case.inputs().items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_have_the_published_values_and_gradients(case, dtype):
    assert_path_same(similarity("triton"), similarity("reference"), inputs_of(case), dtype)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_maps_smaller_than_the_kernel_are_right(case):
    assert_path_same(similarity("triton"), similarity("reference"), inputs_of(case), torch.float32)


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


def test_one_kernel_expanded_over_the_batch_is_read_in_place():
    inputs = inputs_of(Case(3, 1, 4, 6, 7))
    inputs["kernel"] = inputs["kernel"][:1].expand_as(inputs["kernel"])
    assert_path_same(similarity("triton"), similarity("reference"), inputs, torch.float32)


def test_empty_batch_gives_empty_logits_and_zero_gradients():
    case = Case(0, 2, 4, 5, 6, pointwise=3)
    results = run_with_gradients(similarity("triton"), inputs_of(case))
    assert results["output 0"].shape == case.logits_shape
    assert results["gradient of features"].shape == (0, 4, 5, 6)
    assert not results["gradient of pointwise_weight"].any()


def test_a_nan_pixel_reaches_its_own_neighbourhood_only():
    inputs = inputs_of(Case(1, 1, 4, 7, 8))
    inputs["features"][0, 2, 3, 4] = torch.nan
    finite = torch.isfinite(similarity("triton")(**inputs))[0, 0]
    expected = torch.ones(7, 8, dtype=torch.bool, device=DEVICE)
    expected[2:5, 3:6] = False
    assert torch.equal(finite, expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_decides_the_dtype_of_the_logits(dtype):
    with torch.autocast(DEVICE, dtype):
        logits = similarity("triton")(**inputs_of(SMALL))
    exact = similarity("triton")(**inputs_of(SMALL))
    assert logits.dtype is dtype
    assert (logits - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.fixture
def poisoned(monkeypatch):
    """Every fresh tensor starts as NaN, so that an element that no kernel writes is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: filled(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: filled(empty_like(*args, **kwargs)))


@pytest.mark.parametrize("case", [*CASES, *TINY], ids=str)
def test_every_element_is_written_and_every_run_gives_the_same_bits(case, poisoned):
    first, second = (run_with_gradients(similarity("triton"), inputs_of(case)) for _ in range(2))
    for name, value in first.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("needed", ["features", "kernel", "bias", "pointwise_weight", "pointwise_bias"])
def test_gradients_come_alone_as_they_come_together(needed):
    together = run_with_gradients(similarity("triton"), inputs_of(SMALL))
    leaf = inputs_of(SMALL)[needed].requires_grad_()
    logits = similarity("triton")(**(inputs_of(SMALL) | {needed: leaf}))
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(logits)
    assert torch.equal(torch.autograd.grad(logits, leaf, upstream)[0], together[f"gradient of {needed}"])


@pytest.mark.parametrize(("frozen", "skipped"), [("features", "_features_gradient"), ("kernel", "_kernel_gradient")])
def test_a_gradient_that_nobody_wants_is_not_computed(frozen, skipped, monkeypatch):
    monkeypatch.setattr(backward_kernels, skipped, None)
    inputs = {name: tensor.requires_grad_(name != frozen) for name, tensor in inputs_of(Case(1, 1, 3, 4, 4)).items()}
    inputs["bias"] = None
    similarity("triton")(**inputs).sum().backward()


def test_inference_keeps_nothing():
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(SMALL).items()}
    with torch.no_grad():
        assert similarity("triton")(**inputs).grad_fn is None


def folded(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (B, C, P), folded kernels and tap constants, as leaves."""
    columns, pixels = case.queries * case.size**2, case.height * case.width
    shapes = ((case.batch, case.channels, pixels), (case.batch, columns, case.channels), (case.batch, columns))
    return tuple(torch.randn(shape).to(DEVICE).requires_grad_() for shape in shapes)


def test_operators_pass_opcheck():
    case = Case(2, 1, 3, 4, 3)
    x, weight, constants = folded(case)
    dlogits = torch.randn(case.logits_shape, device=DEVICE)
    torch.library.opcheck(kernels._similarity, (x, weight, constants, case.height, case.width, case.size))
    torch.library.opcheck(backward_kernels._features_gradient, (dlogits, weight.detach(), x.detach(), case.size))
    torch.library.opcheck(backward_kernels._kernel_gradient, (dlogits, x.detach(), case.size))


def test_compiled_fullgraph_equals_eager():
    compiled = torch.compile(similarity("triton"), fullgraph=True, backend="aot_eager", dynamic=False)
    eager, fast = (run_with_gradients(function, inputs_of(SMALL)) for function in (similarity("triton"), compiled))
    for name, value in eager.items():
        assert torch.equal(fast[name], value), name


def test_forward_and_both_gradients_count_their_operations():
    case = Case(2, 1, 3, 4, 5)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(case).items()}
    with FlopCounterMode(display=False) as counter:
        similarity("triton")(**inputs).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * case.batch * case.channels * case.height * case.width * 9
