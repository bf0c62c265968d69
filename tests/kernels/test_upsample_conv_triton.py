"""upsample2x_conv3x3's Triton kernels: under the interpreter on a CPU (TRITON_INTERPRET=1), or on a GPU."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_path_same, run_with_gradients
from operator_cases import poison
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastris import reference
from fastris.ops.upsample_conv import upsample2x_conv3x3, upsample2x_conv3x3_stats

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton kernels run on a CUDA device, or with TRITON_INTERPRET=1 in Triton's interpreter",
)
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")

DTYPES = [torch.float32, torch.float16]
by_kernels = partial(upsample2x_conv3x3, impl="triton")
stats_by_kernels = partial(upsample2x_conv3x3_stats, impl="triton")


def make_inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    batch, channels, out_channels, height, width = case
    x = torch.randn(batch, channels, height, width, dtype=dtype)
    weight = torch.randn(out_channels, channels, 3, 3, dtype=dtype) / (9 * channels) ** 0.5
    inputs = {"x": x, "weight": weight, "bias": torch.randn(out_channels, dtype=dtype)}
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@gpu_only
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [(2, 512, 512, 26, 26), (2, 512, 256, 52, 52), (3, 64, 100, 37, 29)])
def test_gpu_precision_is_within_the_bounds(case, dtype):
    assert_path_same(by_kernels, reference.upsample2x_conv3x3, make_inputs(case), dtype)


def test_output_is_channels_last_and_gradients_have_their_shapes():
    inputs = make_inputs((2, 3, 4, 2, 3), torch.float32)
    output = by_kernels(**inputs)
    assert output.shape == (2, 4, 4, 6) and output.is_contiguous(memory_format=torch.channels_last)


def test_parts_of_the_batch_are_a_setting_that_changes_nothing():
    from fastris.kernels import upsample_conv
    from fastris.kernels.configs import Config, replaced, watched

    inputs = make_inputs((3, 4, 16, 2, 1), torch.float32)
    with watched() as seen:
        whole = run_with_gradients(stats_by_kernels, inputs)
    choice = next(choice for choice in seen if choice.kernel == "upsample_conv parts")
    assert seen[choice]["PART_BYTES"] == 512 * 2**20
    assert [config["PART_BYTES"] for config in seen[choice].alternatives] == [48 * 2**20]
    with replaced({choice: Config((("PART_BYTES", 2 * 9 * 16 * 2 * 4),))}):
        assert len(list(upsample_conv._parts(inputs["x"], 16))) == 2
        in_parts = run_with_gradients(stats_by_kernels, inputs)
    for name, value in in_parts.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5)


def test_same_bits_on_every_run():
    inputs = make_inputs((1, 3, 16, 3, 4), torch.float32)
    first, second = (run_with_gradients(stats_by_kernels, inputs) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_only_x_and_weight_are_kept_for_backward():
    inputs = {name: value.requires_grad_() for name, value in make_inputs((1, 4, 16, 2, 3), torch.float32).items()}
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        by_kernels(**inputs)
        with torch.no_grad():
            by_kernels(**inputs)
    assert sorted(kept) == [(1, 4, 2, 3), (16, 4, 3, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_returned_output(monkeypatch, dtype):
    poison(monkeypatch)
    for case in ((1, 3, 5, 2, 3), (1, 4, 16, 4, 5)):
        output, mean, var = stats_by_kernels(**make_inputs(case, dtype))
        expected_var, expected_mean = torch.var_mean(output.double(), dim=(0, 2, 3), correction=0)
        assert mean.dtype is var.dtype is torch.float32
        torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var.double(), expected_var, rtol=1e-5, atol=1e-6)


def test_variance_survives_a_large_mean():
    x, weight, bias = make_inputs((2, 6, 16, 4, 3), torch.float32).values()
    output, _, var = stats_by_kernels(x, weight, bias + 1e4)
    torch.testing.assert_close(var.double(), output.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_batch_norm_from_statistics_has_the_published_gradients():
    def published(x, weight, bias):
        return F.batch_norm(reference.upsample2x_conv3x3(x, weight, bias), None, None, training=True)

    def ours(x, weight, bias):
        output, mean, var = stats_by_kernels(x, weight, bias)
        return (output - mean[:, None, None]) * (var + 1e-5).rsqrt()[:, None, None]

    inputs = make_inputs((2, 5, 16, 3, 2), torch.float32)
    del inputs["bias"]  # has no gradient through a normalisation
    published, ours = partial(published, bias=None), partial(ours, bias=None)
    expected = run_with_gradients(published, {name: value.double() for name, value in inputs.items()})
    for name, value in run_with_gradients(ours, inputs).items():
        error = (value.double() - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= 1e-5, f"{name}: {error}"


def test_autocast_computes_and_answers_in_its_dtype():
    inputs = make_inputs((1, 4, 3, 2, 2), torch.float32)
    with torch.autocast(DEVICE, dtype=torch.float16):
        result = run_with_gradients(by_kernels, inputs)
    low = by_kernels(**{name: value.half() for name, value in inputs.items()})
    assert torch.equal(result["output 0"], low)
    assert all(value.dtype is torch.float32 for name, value in result.items() if name.startswith("gradient"))


@pytest.mark.parametrize("operator", ["upsample2x_conv3x3", "upsample2x_conv3x3_stats"])
def test_operators_pass_opcheck(operator):
    from fastris.kernels import upsample_conv

    inputs = {name: value.requires_grad_() for name, value in make_inputs((1, 2, 16, 1, 2), torch.float32).items()}
    torch.library.opcheck(getattr(upsample_conv, operator), tuple(inputs.values()))


def test_backward_operator_passes_opcheck():
    from fastris.kernels import upsample_conv

    x, weight, _ = make_inputs((1, 2, 16, 1, 2), torch.float32).values()
    upstream = torch.randn(1, 16, 2, 4, device=DEVICE)
    for needs in ((True, True), (False, True)):
        torch.library.opcheck(upsample_conv._convolution_backward, (upstream, x, weight, *needs))


def test_flops_are_those_of_the_products_at_low_resolution():
    x, weight, _ = (value.requires_grad_() for value in make_inputs((1, 4, 16, 2, 3), torch.float32).values())
    with FlopCounterMode(display=False) as counter:
        output = by_kernels(x, weight)
        assert counter.get_total_flops() == 2 * (2 * 3) * 4 * (9 * 16)
        output.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 3) * 4 * (9 * 16)


@gpu_only
@pytest.mark.gpu
def test_captured_in_a_cuda_graph_repeats_the_numbers():
    inputs = make_inputs((2, 64, 48, 13, 13), torch.bfloat16)
    expected = stats_by_kernels(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = stats_by_kernels(**inputs)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@gpu_only
@pytest.mark.gpu
@pytest.mark.slow
def test_outputs_past_two_to_the_31_elements_are_right():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    batch, size = 520, 64  # 520 * 256 * 128 * 128 = 2.18e9 outputs
    x = torch.randn(1, 16, size, size, device=DEVICE, dtype=torch.float16)
    weight = torch.randn(256, 16, 3, 3, device=DEVICE, dtype=torch.float16) / 12
    output = by_kernels(x.expand(batch, -1, -1, -1), weight)
    assert torch.equal(output[-1], by_kernels(x, weight)[0])


@gpu_only
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_runs_on_the_device_of_its_tensors():
    inputs = {name: value.to("cuda:1") for name, value in make_inputs((1, 4, 5, 3, 2)).items()}
    assert_path_same(by_kernels, reference.upsample2x_conv3x3, inputs, torch.float32)
