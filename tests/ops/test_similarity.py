"""Text-to-pixel similarity: the published values and gradients, without the 1x1 convolution ever being computed."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_path_same, run_with_gradients
from similarity_cases import Case, layouts, similarity

from fastris.ops.similarity import text_to_pixel_similarity

CASES = [
    Case(2, 1, 8, 7, 5),
    Case(2, 1, 16, 26, 26, pointwise=16),
    Case(3, 2, 31, 13, 9, size=5, pointwise=24),
    Case(1, 5, 20, 11, 17, size=1),
    Case(2, 25, 12, 8, 8),
    Case(1, 1, 64, 1, 23, size=5, pointwise=8),
    Case(1, 1, 256, 13, 13, pointwise=256),
]
TINY = [Case(1, 1, 1, 1, 1), Case(2, 1, 3, 1, 1, size=5, pointwise=3), Case(1, 2, 5, 2, 1, size=1, pointwise=2)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
POINTWISE = Case(2, 2, 6, 5, 4, pointwise=7)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("case", [Case(2, 1, 3, 3, 4, pointwise=2), Case(1, 2, 2, 2, 3, size=5)], ids=str)
def test_gradients_pass_gradcheck_in_float64(impl, case):
    inputs = {name: tensor.double().requires_grad_() for name, tensor in case.inputs().items()}
    function = similarity(impl)
    assert torch.autograd.gradcheck(lambda *t: function(**dict(zip(inputs, t, strict=True))), tuple(inputs.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_path_has_the_published_values_and_gradients(case, dtype):
    assert_path_same(similarity("torch"), similarity("reference"), case.inputs(), dtype)


@pytest.mark.parametrize("case", [*CASES, *TINY], ids=str)
def test_folding_is_exact_algebra(case):
    inputs = {name: tensor.double() for name, tensor in case.inputs().items()}
    folded, published = (run_with_gradients(similarity(impl), inputs) for impl in ("torch", "reference"))
    for name, value in published.items():
        torch.testing.assert_close(folded[name], value, rtol=0, atol=1e-13 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("case", TINY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_maps_smaller_than_the_kernel_are_right(case, dtype):
    assert_path_same(similarity("torch"), similarity("reference"), case.inputs(), dtype)


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
def test_any_memory_layout_gives_the_same_numbers(layout):
    for dtype in (torch.float64, torch.float32):
        inputs = POINTWISE.inputs()
        inputs["features"] = layouts(inputs["features"].to(dtype))[layout]
        assert_path_same(similarity("torch"), similarity("reference"), inputs, dtype)


def test_gradient_of_a_channels_last_map_is_channels_last():
    inputs = Case(2, 1, 8, 6, 5).inputs()
    for memory_format in (torch.channels_last, torch.contiguous_format):
        features = inputs["features"].contiguous(memory_format=memory_format).requires_grad_()
        logits = text_to_pixel_similarity(features, inputs["kernel"], impl="torch")
        (gradient,) = torch.autograd.grad(logits.sum(), features)
        assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_one_kernel_per_sample_needs_no_query_dimension(impl):
    inputs = Case(3, 1, 4, 5, 6).inputs()
    with_query = text_to_pixel_similarity(**inputs, impl=impl)
    without = text_to_pixel_similarity(inputs["features"], inputs["kernel"][:, 0], bias=inputs["bias"][:, 0], impl=impl)
    assert torch.equal(with_query, without)


def test_pointwise_weight_may_be_a_matrix():
    inputs = POINTWISE.inputs()
    matrix = inputs | {"pointwise_weight": inputs["pointwise_weight"].flatten(1)}
    for impl in ("reference", "torch"):
        assert torch.equal(similarity(impl)(**matrix), similarity(impl)(**inputs))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_several_maps_scored_by_one_text_kernel_are_one_call_on_a_view(impl):
    samples, maps = 2, 5
    features = torch.randn(samples, maps, 8, 6, 7)
    kernel, bias = torch.randn(samples, 8, 3, 3), torch.randn(samples)
    shared = kernel[:, None].expand(samples, maps, 8, 3, 3)
    logits = text_to_pixel_similarity(
        features.flatten(0, 1), shared.flatten(0, 1), bias[:, None].expand(samples, maps).flatten(), impl=impl
    ).reshape(samples, maps, 6, 7)
    for index in range(maps):
        alone = text_to_pixel_similarity(features[:, index], kernel, bias, impl="reference")
        torch.testing.assert_close(logits[:, index], alone[:, 0])


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_one_kernel_expanded_over_the_batch_collects_every_samples_gradient(impl):
    features = torch.randn(5, 4, 6, 7)
    kernel = torch.randn(1, 4, 3, 3, requires_grad=True)
    logits = text_to_pixel_similarity(features, kernel.expand(5, 4, 3, 3), impl=impl)
    upstream = torch.randn_like(logits)
    (gradient,) = torch.autograd.grad(logits, kernel, upstream)
    plain = torch.nn.functional.conv2d(features, kernel, padding=1)
    torch.testing.assert_close(logits, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, kernel, upstream)[0])


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("pointwise", [0, 3])
def test_empty_batch_gives_empty_logits_and_zero_gradients(impl, pointwise):
    results = run_with_gradients(similarity(impl), Case(0, 2, 4, 5, 6, pointwise=pointwise).inputs())
    assert results["output 0"].shape == (0, 2, 5, 6)
    assert results["gradient of features"].shape == (0, 4, 5, 6)
    if pointwise:
        assert not results["gradient of pointwise_weight"].any()


def test_a_nan_pixel_reaches_its_own_neighbourhood_only():
    inputs = Case(1, 1, 4, 7, 8).inputs()
    inputs["features"][0, 2, 3, 4] = torch.nan
    finite = torch.isfinite(similarity("torch")(**inputs))[0, 0]
    expected = torch.ones(7, 8, dtype=torch.bool)
    expected[2:5, 3:6] = False
    assert torch.equal(finite, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_decides_the_dtype_of_the_logits(dtype):
    case = Case(2, 1, 32, 9, 7, pointwise=32)

    def under_autocast(impl):
        def function(**tensors):
            with torch.autocast("cpu", dtype):
                return similarity(impl)(**tensors)

        return function

    inputs = case.inputs()
    logits = under_autocast("torch")(**inputs)
    assert logits.dtype is dtype
    truth = run_with_gradients(similarity("reference"), {k: v.double() for k, v in inputs.items()})
    fast, published = (run_with_gradients(under_autocast(impl), inputs) for impl in ("torch", "reference"))
    for name, value in truth.items():
        error, allowed = (fast[name] - value).abs().max(), (published[name] - value).abs().max()
        assert error <= 1.25 * allowed + torch.finfo(dtype).eps / 2 * value.abs().max(), name


def bytes_kept(function, inputs) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward of ``function``."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        function(**{name: tensor.requires_grad_() for name, tensor in inputs.items()})
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def test_only_the_features_and_the_kernels_are_kept_for_backward():
    inputs = Case(2, 1, 64, 32, 32, pointwise=64).inputs()
    features = inputs["features"].nbytes
    assert bytes_kept(similarity("torch"), inputs) < 1.1 * features
    assert bytes_kept(similarity("reference"), inputs) > 1.9 * features


def test_nothing_is_kept_without_gradients():
    with torch.no_grad():
        assert bytes_kept(similarity("torch"), POINTWISE.inputs()) == 0


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_compiled_fullgraph_equals_eager(impl):
    compiled = torch.compile(similarity(impl), fullgraph=True, backend="aot_eager", dynamic=False)
    inputs = POINTWISE.inputs()
    eager, fast = (run_with_gradients(function, inputs) for function in (similarity(impl), compiled))
    for name, value in eager.items():
        torch.testing.assert_close(fast[name], value, msg=name)


BAD_INPUT = {
    "features must be": {"features": torch.zeros(2, 6, 20)},
    "features must have channels and pixels": {"features": torch.zeros(2, 6, 0, 4)},
    "kernel must be \\(B, Q, C, k, k\\) or": {"kernel": torch.zeros(2, 7, 3)},
    "kernel must be k x k with k = 1, 3 or 5": {"kernel": torch.zeros(2, 2, 7, 2, 2)},
    "kernel must be k x k .* got \\(2, 2, 7, 3, 5\\)": {"kernel": torch.zeros(2, 2, 7, 3, 5)},
    "kernel must hold at least one query": {"kernel": torch.zeros(2, 0, 7, 3, 3)},
    "kernel must be \\(2, 2, 7, 3, 3\\)": {"kernel": torch.zeros(3, 2, 7, 3, 3)},
    "bias must be \\(2, 2\\)": {"bias": torch.zeros(2)},
    "pointwise_weight must be \\(7, 6, 1, 1\\)": {"pointwise_weight": torch.zeros(7, 7, 1, 1)},
    "pointwise_bias must be \\(7": {"pointwise_bias": torch.zeros(6)},
    "pointwise_bias needs pointwise_weight": {"pointwise_weight": None, "kernel": torch.zeros(2, 2, 6, 3, 3)},
    "bias is on meta": {"bias": torch.zeros(2, 2, device="meta")},
}


@pytest.mark.parametrize("message", list(BAD_INPUT))
def test_bad_input_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        text_to_pixel_similarity(**(POINTWISE.inputs() | BAD_INPUT[message]))


@pytest.mark.parametrize("wrong", [torch.float64, torch.int64], ids=str)
def test_mixed_dtypes_are_refused_by_name(wrong):
    inputs = POINTWISE.inputs()
    inputs["kernel"] = inputs["kernel"].to(wrong)
    with pytest.raises(TypeError, match="kernel"):
        text_to_pixel_similarity(**inputs)


def test_triton_in_float64_says_why_not():
    inputs = {name: tensor.double() for name, tensor in POINTWISE.inputs().items()}
    with pytest.raises(RuntimeError, match=r"impl=\"triton\" cannot run.*float64"):
        text_to_pixel_similarity(**inputs, impl="triton")
