"""Large maps on a CPU are read a few channels at a time: the same logits, loss and gradients, to the last digits."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_path_same, run_with_gradients
from similarity_cases import Case, layouts, similarity

from fastris.ops import similarity as operator
from fastris.ops.cpu import streamed_taps
from fastris.ops.similarity import text_to_pixel_similarity

CASES = [
    Case(2, 1, 16, 26, 26, pointwise=16),
    Case(3, 2, 40, 13, 9, size=5, pointwise=37),
    Case(1, 5, 20, 11, 17, size=1),
    Case(2, 3, 15, 1, 23, size=5),
    Case(2, 1, 3, 1, 1, size=5, pointwise=3),
]


@pytest.fixture
def streamed(monkeypatch) -> list[tuple[int, ...]]:
    """Every map is streamed; the shapes of those that were."""
    shapes = []

    def spy(pixels, *rest):
        shapes.append(tuple(pixels.shape))
        return streamed_taps.streamed_tap_sum(pixels, *rest)

    monkeypatch.setattr(streamed_taps, "LEAST_BYTES", 0)
    monkeypatch.setattr(operator, "streamed_tap_sum", spy)
    return shapes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_streaming_is_exact(case, streamed):
    inputs = {name: tensor.double() for name, tensor in case.inputs().items()}
    ours, published = (run_with_gradients(similarity(impl), inputs) for impl in ("torch", "reference"))
    assert streamed
    for name, value in published.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-13 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_streaming_has_the_published_values_and_gradients(case, dtype, streamed):
    assert_path_same(similarity("torch"), similarity("reference"), case.inputs(), dtype)
    assert streamed


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 1, 3, 3, 4, pointwise=2),
        pytest.param(Case(1, 2, 18, 2, 3, size=5), marks=(pytest.mark.slow, pytest.mark.long)),
    ],
    ids=str,
)
def test_first_and_second_derivatives_pass_gradcheck(case, streamed):
    inputs = {name: tensor.double().requires_grad_() for name, tensor in case.inputs().items()}
    function = similarity("torch")

    def positional(*tensors):
        return function(**dict(zip(inputs, tensors, strict=True)))

    assert torch.autograd.gradcheck(positional, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(positional, tuple(inputs.values()))
    assert streamed


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
def test_any_memory_layout_gives_the_same_numbers(layout, streamed):
    for dtype in (torch.float64, torch.float32):
        inputs = Case(2, 2, 6, 5, 4, pointwise=7).inputs()
        inputs["features"] = layouts(inputs["features"].to(dtype))[layout]
        assert_path_same(similarity("torch"), similarity("reference"), inputs, dtype)


def test_a_kernel_alone_can_be_learnt(streamed):
    inputs = {name: tensor.double() for name, tensor in Case(2, 1, 20, 6, 5).inputs().items()}
    kernel = inputs["kernel"].requires_grad_()
    text_to_pixel_similarity(inputs["features"], kernel, impl="torch").sum().backward()
    (published,) = torch.autograd.grad(
        text_to_pixel_similarity(inputs["features"], kernel, impl="reference").sum(), kernel
    )
    assert streamed
    torch.testing.assert_close(kernel.grad, published, rtol=0, atol=1e-13 * float(published.abs().max()))


@pytest.mark.parametrize(
    ("shape", "dtype", "want"),
    [
        ((4, 256, 10816), torch.float32, True),
        ((1, 256, 2704), torch.float32, False),
        ((8, 256, 10816), torch.bfloat16, False),
    ],
)
def test_only_large_maps_in_full_precision_are_streamed(shape, dtype, want):
    assert streamed_taps.streams(torch.empty(shape, dtype=dtype)) is want
