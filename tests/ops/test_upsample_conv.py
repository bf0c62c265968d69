"""upsample2x_conv3x3 on the plain-PyTorch path, held to the published formula in float64, and its contract."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_path_same, run_with_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastris import dispatch, reference, use_impl
from fastris.ops import upsample_conv
from fastris.ops.upsample_conv import upsample2x_conv3x3, upsample2x_conv3x3_stats

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
by_matrices = partial(upsample2x_conv3x3, impl="torch")


def make_inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    batch, channels, out_channels, height, width = case
    x = torch.randn(batch, channels, height, width, dtype=dtype)
    weight = torch.randn(out_channels, channels, 3, 3, dtype=dtype) / (9 * channels) ** 0.5
    return {"x": x, "weight": weight, "bias": torch.randn(out_channels, dtype=dtype)}


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_magnitudes_keep_relative_precision(scale):
    inputs = make_inputs((1, 6, 5, 4, 3))
    inputs["x"] *= scale
    for dtype in (torch.float64, torch.float32):
        assert_path_same(by_matrices, reference.upsample2x_conv3x3, inputs, dtype)


def test_memory_format_follows_the_input():
    inputs = make_inputs((2, 4, 5, 3, 6), torch.float32)
    for layout, expected in ((Tensor.contiguous, False), (channels_last, True)):
        x = layout(inputs["x"]).requires_grad_()
        output = by_matrices(x, inputs["weight"])
        gradient = torch.autograd.grad(output.square().sum(), x)[0]
        assert is_channels_last(output) is expected and output.is_contiguous() is not expected
        assert is_channels_last(gradient) is expected


@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_parts_of_the_batch_change_nothing(monkeypatch, layout, samples):
    inputs = make_inputs((5, 4, 6, 3, 5))
    inputs["x"] = layout(inputs["x"])
    expected = run_with_gradients(reference.upsample2x_conv3x3, inputs)
    monkeypatch.setattr(upsample_conv, "CPU_PART_BYTES", samples * 9 * 6 * 15 * 8)
    assert len(list(upsample_conv._parts(inputs["x"], 6))) == -(-5 // samples)
    for name, value in run_with_gradients(by_matrices, inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


def kept_for_backward(function, *arguments) -> list[tuple[int, ...]]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        function(*arguments)
    return kept


def test_only_x_and_weight_are_kept_for_backward():
    inputs = {name: value.requires_grad_() for name, value in make_inputs((2, 4, 5, 3, 6)).items()}
    assert sorted(kept_for_backward(by_matrices, *inputs.values())) == [(2, 4, 3, 6), (5, 4, 3, 3)]
    with torch.no_grad():
        assert kept_for_backward(by_matrices, *inputs.values()) == []


def test_second_derivative_is_refused():
    x, weight, _ = (value.requires_grad_() for value in make_inputs((1, 2, 2, 2, 2)).values())
    gradient = torch.autograd.grad(by_matrices(x, weight).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_and_answers_in_its_dtype(dtype):
    inputs = make_inputs((2, 8, 6, 5, 4), torch.float32)
    low = {name: value.to(dtype) for name, value in inputs.items()}
    with torch.autocast("cpu", dtype=dtype):
        output = by_matrices(**inputs)
        assert upsample2x_conv3x3(*(value.double() for value in inputs.values()), impl="torch").dtype is torch.float64
        result = run_with_gradients(by_matrices, inputs)
    assert output.dtype is dtype
    torch.testing.assert_close(output, by_matrices(**low), rtol=0, atol=0)
    assert all(value.dtype is torch.float32 for name, value in result.items() if name.startswith("gradient"))


def test_backward_under_autocast_stays_in_the_forward_dtype():
    inputs = make_inputs((2, 8, 6, 5, 4), torch.float32)
    expected = run_with_gradients(by_matrices, inputs)
    x, weight = inputs["x"].detach().requires_grad_(), inputs["weight"].detach().requires_grad_()
    output = by_matrices(x, weight)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(output, (x, weight), upstream)
    assert torch.equal(gradients[0], expected["gradient of x"])
    assert torch.equal(gradients[1], expected["gradient of weight"])


@pytest.mark.slow
def test_compiled_answers_channels_last_as_eager_does():
    inputs = make_inputs((2, 4, 5, 3, 6), torch.float32)
    inputs["x"] = channels_last(inputs["x"])
    compiled = torch.compile(by_matrices, fullgraph=True, backend="aot_eager")
    expected = run_with_gradients(by_matrices, inputs)
    for name, value in run_with_gradients(compiled, inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
        assert name != "output 0" or value.stride() == expected[name].stride()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(
    not dispatch._compiles_functions, reason="before PyTorch 2.15 compiled code takes the published formula"
)
def test_compiled_under_autocast_equals_eager():
    inputs = make_inputs((2, 8, 6, 5, 4), torch.float32)
    compiled = torch.compile(by_matrices, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected = run_with_gradients(compiled, inputs), run_with_gradients(by_matrices, inputs)
    for name, value in result.items():
        assert value.dtype is expected[name].dtype
        torch.testing.assert_close(value, expected[name], rtol=2**-7, atol=2**-7)


def test_convolution_costs_a_quarter_of_the_published_multiplications():
    def flops(function) -> int:
        x, weight, _ = make_inputs((1, 64, 64, 8, 8), torch.float32).values()
        with FlopCounterMode(display=False) as counter:
            function(x, weight)
        return counter.get_total_flops()

    published, ours = flops(reference.upsample2x_conv3x3), flops(by_matrices)
    interpolation = 2 * 64 * 8 * 3 * 16 * (3 * 8 + 16)  # both axis matrices, dense
    assert ours == published / 4 + interpolation


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_statistics_are_those_of_the_returned_output(impl):
    inputs = make_inputs((3, 6, 5, 4, 7))
    for dtype in DTYPES:
        low = {name: value.to(dtype) for name, value in inputs.items()}
        output, mean, var = upsample2x_conv3x3_stats(**low, impl=impl)
        assert torch.equal(output, upsample2x_conv3x3(**low, impl=impl))
        assert mean.dtype is var.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        expected_var, expected_mean = torch.var_mean(output.double(), dim=(0, 2, 3), correction=0)
        bound = {"rtol": 1e-10, "atol": 1e-10} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(mean.double(), expected_mean, **bound)
        torch.testing.assert_close(var.double(), expected_var, **bound)


def test_variance_survives_a_large_mean():
    x, weight, bias = make_inputs((2, 6, 5, 9, 7), torch.float32).values()
    output, _, var = upsample2x_conv3x3_stats(x, weight, bias + 1e4, impl="torch")
    torch.testing.assert_close(var.double(), output.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_batch_norm_from_statistics_has_the_published_gradients():
    def published(x, weight, bias):
        return F.batch_norm(reference.upsample2x_conv3x3(x, weight, bias), None, None, training=True)

    def ours(x, weight, bias):
        output, mean, var = upsample2x_conv3x3_stats(x, weight, bias, impl="torch")
        return (output - mean[:, None, None]) * (var + 1e-5).rsqrt()[:, None, None]

    inputs = make_inputs((2, 5, 4, 3, 6))
    expected = run_with_gradients(published, inputs)
    for name, value in run_with_gradients(ours, inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


def test_reference_is_the_published_formula():
    inputs = make_inputs((2, 3, 4, 3, 5))
    with use_impl("reference"):
        assert torch.equal(upsample2x_conv3x3(**inputs), reference.upsample2x_conv3x3(**inputs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4, 5)}, ValueError, r"x must be \(B, C, H, W\), got \(3, 4, 5\)"),
        ({"x": torch.zeros(2, 4, 0, 5)}, ValueError, "x must be at least one pixel high and wide"),
        ({"weight": torch.zeros(6, 5, 3, 3)}, ValueError, r"weight must be \(C', 4, 3, 3\), got \(6, 5, 3, 3\)"),
        ({"weight": torch.zeros(6, 4, 1, 1)}, ValueError, r"weight must be \(C', 4, 3, 3\)"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \(6\), got \(5,\)"),
        ({"weight": torch.zeros(6, 4, 3, 3).double()}, TypeError, "weight is torch.float64 but x is torch.float32"),
        ({"x": torch.zeros(2, 4, 3, 5, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"weight": torch.zeros(6, 4, 3, 3, device="meta")}, ValueError, "weight is on meta but x is on cpu"),
    ],
)
@pytest.mark.parametrize("operator", [upsample2x_conv3x3, upsample2x_conv3x3_stats])
def test_bad_input_names_the_argument(operator, change, error, message):
    inputs = {"x": torch.zeros(2, 4, 3, 5), "weight": torch.zeros(6, 4, 3, 3), "bias": torch.zeros(6)} | change
    with pytest.raises(error, match=message):
        operator(**inputs)


def test_statistics_of_an_empty_batch_are_refused():
    with pytest.raises(ValueError, match="x holds no samples"):
        upsample2x_conv3x3_stats(torch.zeros(0, 4, 3, 5), torch.zeros(6, 4, 3, 3))


def test_triton_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(dispatch, "_interpreting", False)
    with pytest.raises(RuntimeError, match="cannot run"):
        upsample2x_conv3x3(torch.zeros(1, 4, 3, 5), torch.zeros(6, 4, 3, 3), impl="triton")
