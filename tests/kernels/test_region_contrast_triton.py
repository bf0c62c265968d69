"""The kernels of the region contrast, on a GPU or interpreted: any layout, the map's own dtype, what is kept."""

from __future__ import annotations

import os

import pytest
import torch
from bounds import assert_path_same
from operator_cases import region_contrast_problem

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import region_contrast as kernels  # noqa: E402
from fastris.kernels.launch import recording  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
PROBLEM = region_contrast_problem(3, 9, 8, 7, pointwise=6)
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
}


def inputs_of(problem=PROBLEM, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {k: v.to(DEVICE, dtype if v.is_floating_point() else None) for k, v in problem.make().items()}


@pytest.mark.skipif(not HAS_GPU, reason="AlignFormer's own size takes minutes under the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_size_of_the_published_model_is_right(dtype):
    problem = region_contrast_problem(4, 256, 120, 120, pointwise=256)
    assert_path_same(problem.call("triton"), problem.call("reference"), inputs_of(problem, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_and_gradient_are_those_of_plain_products(layout, dtype):
    """Channels and pixels that fill no tile, and two chunks of pixels."""
    x = LAYOUTS[layout](torch.randn(2, 37, 18, 31).to(DEVICE, dtype)).detach().requires_grad_()
    weights = torch.rand(2, 2, 18 * 31).to(DEVICE)
    scale, pointwise = torch.rand(2, 2, 1).to(DEVICE), torch.randn(5, 37).to(DEVICE).requires_grad_()
    found = kernels.region_means(x.flatten(2), weights, scale, pointwise)
    expected = (weights @ x.float().flatten(2).mT * scale) @ pointwise.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    upstream = torch.randn_like(found)
    pairs = zip(*(torch.autograd.grad(each, (x, pointwise), upstream) for each in (found, expected)), strict=True)
    for got, want in pairs:
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want, rtol=1e-2 if dtype is torch.float16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_lies_in_memory_as_the_map_does(layout):
    inputs = inputs_of(dtype=torch.float16)
    inputs["features"] = inputs["features"].contiguous(memory_format=layout).requires_grad_()
    (gradient,) = torch.autograd.grad(PROBLEM.call("triton")(**inputs), inputs["features"])
    assert gradient.dtype is torch.float16 and gradient.is_contiguous(memory_format=layout)


def test_neither_the_map_nor_its_products_are_kept():
    inputs = {k: v.requires_grad_(v.is_floating_point()) for k, v in inputs_of().items()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        PROBLEM.call("triton")(**inputs)
    assert max(tensor.numel() for tensor in kept) == 3 * 2 * 8 * 7, "two weights a cell"


def test_gradient_of_frozen_features_is_not_computed():
    inputs = {k: v.requires_grad_(v.is_floating_point() and k != "features") for k, v in inputs_of().items()}
    with recording() as found:
        PROBLEM.call("triton")(**inputs).backward()
    assert [each.kernel.fn.__name__ for each in found] == ["_sums_kernel"]


def test_operators_pass_opcheck():
    x, weights = torch.randn(1, 3, 7, device=DEVICE), torch.rand(1, 2, 7, device=DEVICE)
    pointwise = torch.randn(2, 3, device=DEVICE)
    torch.library.opcheck(kernels._region_means, (x.requires_grad_(), weights, weights[..., :1], pointwise))
    torch.library.opcheck(kernels.gradient, (torch.randn(1, 2, 3, device=DEVICE), weights, True, torch.float16))
