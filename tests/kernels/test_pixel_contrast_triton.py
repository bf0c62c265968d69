"""The kernels of the alignment loss, on a GPU or interpreted: any layout, the map's own dtype, what is launched."""

from __future__ import annotations

import os

import pytest
import torch
from bounds import assert_path_same
from operator_cases import pixel_contrast_problem

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import pixel_contrast as kernels  # noqa: E402
from fastris.kernels.launch import recording  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
PROBLEM = pixel_contrast_problem(3, 9, 8, 7)
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
}


def inputs_of(problem=PROBLEM, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {k: v.to(DEVICE, dtype if v.is_floating_point() else None) for k, v in problem.make().items()}


@pytest.mark.skipif(not HAS_GPU, reason="MagNet's own size takes minutes under the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_size_of_the_published_model_is_right(dtype):
    problem = pixel_contrast_problem(4, 256, 120, 120)
    assert_path_same(problem.call("triton"), problem.call("reference"), inputs_of(problem, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_pass_is_what_plain_products_give(layout, dtype):
    """Channels and pixels that fill no tile, and two chunks of pixels; some pixels are zeros."""
    made = LAYOUTS[layout](torch.randn(2, 37, 18, 31).to(DEVICE, dtype))
    made[1, :, :2] = 0
    x = made.flatten(2)
    weights, vectors = torch.rand(2, 5, 18 * 31, device=DEVICE), torch.randn(2, 5, 37, device=DEVICE)
    wide, close = x.float(), {"rtol": 1e-4, "atol": 1e-3}
    norm, sums = kernels.norms(x, weights[:, :2])
    expected = wide.norm(dim=1, keepdim=True).clamp_min(1e-6)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(sums, weights[:, :2] / expected @ wide.mT, **close)
    torch.testing.assert_close(kernels.cosines(x, norm, vectors[:, :3]), vectors[:, :3] @ wide / expected, **close)
    torch.testing.assert_close(kernels.sums(x, weights[:, 2:]), weights[:, 2:] @ wide.mT, **close)
    along, inverse = torch.rand(2, 2, 1, 18 * 31, device=DEVICE) / 9
    found = kernels.gradient(x, vectors, weights, along, inverse)
    along = along + (weights[:, 3:] * (vectors[:, 3:] @ wide)).sum(1, keepdim=True)
    torch.testing.assert_close(found, (vectors.mT @ weights - wide * along * inverse).to(dtype), rtol=4e-3, atol=1e-3)
    assert found.stride() == x.stride() or layout == "every second column"


def test_gradient_of_frozen_features_is_not_computed():
    inputs = {k: v.requires_grad_(k == "sentence") for k, v in inputs_of(dtype=torch.float16).items()}
    with recording() as found:
        PROBLEM.call("triton")(**inputs).backward()
    assert [each.kernel.fn.__name__ for each in found] == ["_norms_kernel", "_cosines_kernel", "_sums_kernel"]
    maps = [dict(each.arguments)["x_ptr"].dtype for each in found]
    assert maps == [torch.float16] * 3, "the map is read as it is"


def test_operators_pass_opcheck():
    x, rows = torch.randn(1, 3, 7, device=DEVICE), torch.rand(1, 5, 7, device=DEVICE)
    vectors = torch.randn(1, 5, 3, device=DEVICE)
    torch.library.opcheck(kernels.norms, (x, rows[:, :2]))
    torch.library.opcheck(kernels.cosines, (x, rows[:, :1], vectors[:, :3]))
    torch.library.opcheck(kernels.sums, (x, rows[:, :3]))
    torch.library.opcheck(kernels.gradient, (x.mT.contiguous().mT, vectors, rows, rows[:, :1], rows[:, :1]))
