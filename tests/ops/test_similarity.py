"""Text-to-pixel similarity: the published values and gradients, without the 1x1 convolution ever being computed."""

from __future__ import annotations

import pytest
import torch
from similarity_cases import Case, similarity

from fastris.ops.similarity import text_to_pixel_similarity

POINTWISE = Case(2, 2, 6, 5, 4, pointwise=7)


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


def test_a_nan_pixel_reaches_its_own_neighbourhood_only():
    inputs = Case(1, 1, 4, 7, 8).inputs()
    inputs["features"][0, 2, 3, 4] = torch.nan
    finite = torch.isfinite(similarity("torch")(**inputs))[0, 0]
    expected = torch.ones(7, 8, dtype=torch.bool)
    expected[2:5, 3:6] = False
    assert torch.equal(finite, expected)


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


def test_exported_it_takes_batches_of_any_size():
    class Scores(torch.nn.Module):
        def forward(self, features, kernel):
            return text_to_pixel_similarity(features, kernel)

    traced, other = (Case(batch, 2, 4, 6, 5).inputs() for batch in (3, 1))
    names, batch = ("features", "kernel"), torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in names}
    program = torch.export.export(Scores(), tuple(traced[name] for name in names), dynamic_shapes=shapes)
    given = [other[name] for name in names]
    torch.testing.assert_close(program.module()(*given), text_to_pixel_similarity(*given))
