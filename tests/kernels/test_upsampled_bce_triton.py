"""The kernels of the loss on upsampled logits, on a GPU or interpreted: every pixel once, no large map."""

from __future__ import annotations

import os

import pytest
import torch
from bounds import assert_path_same, run_with_gradients
from operator_cases import upsampled_bce_problem

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import upsampled_bce as kernels  # noqa: E402
from fastris.kernels.configs import Config, replaced, watched  # noqa: E402
from fastris.kernels.launch import Pointer, recording  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]


def inputs_of(problem, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE, dtype) for name, tensor in problem.make().items()}


@pytest.mark.skipif(not HAS_GPU, reason="AlignFormer's own size takes minutes under the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_size_of_the_published_model_is_right(dtype):
    problem = upsampled_bce_problem(2, 7, (120, 120), (480, 480))
    assert_path_same(problem.call("triton"), problem.call("reference"), inputs_of(problem, dtype), dtype)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 5), (3, 12), (7, 7), (5, 13), (13, 5), (2, 40)])
def test_every_pixel_lies_in_one_cell_and_counts_once(inputs, outputs):
    """Where all logits are equal, so are the losses of all pixels, and their slopes add up to the logits' gradient."""
    logits = torch.full((1, 1, inputs, 2), 0.7, device=DEVICE)
    loss, gradient = kernels._upsampled_bce(logits, torch.zeros(1, 1, outputs, 3, device=DEVICE), 1.0, True)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(logits[0, 0, 0, 0]))
    torch.testing.assert_close(gradient.sum(), logits[0, 0, 0, 0].sigmoid())


def test_any_tiles_give_the_same_numbers():
    problem = upsampled_bce_problem(1, 2, (9, 7), (20, 31))
    inputs = inputs_of(problem)
    with watched() as seen:
        expected = run_with_gradients(problem.call("triton"), inputs)
    choice = next(each for each in seen if each.kernel == "upsampled_bce loss")
    for block in (32, 128):
        with replaced({choice: Config((("BLOCK", block),), 4, 1)}):
            found = run_with_gradients(problem.call("triton"), inputs)
        assert all(torch.allclose(found[name], value, rtol=1e-6, atol=1e-7) for name, value in expected.items())


def test_nothing_of_the_masks_size_is_written_and_no_corner_where_no_gradient_is_wanted():
    problem = upsampled_bce_problem(1, 2, (6, 5), (24, 20))
    logits, target = (inputs_of(problem)[name] for name in ("logits", "target"))
    with recording() as found:
        problem.call("triton")(logits, target)
        problem.call("triton")(logits.requires_grad_(), target).backward()
    names = [each.kernel.fn.__name__ for each in found]
    assert names == ["_loss_kernel", "_loss_kernel", "_corners_kernel"]
    corners = [dict(each.arguments)["corners_ptr"] for each in found[:2]]
    assert corners[0] is None and isinstance(corners[1], Pointer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_thousands_have_the_published_loss_and_a_finite_gradient(dtype):
    logits = torch.tensor([[-1e4, 1e4], [1e4, -1e4]], device=DEVICE, dtype=dtype).reshape(1, 1, 2, 2).requires_grad_()
    target = torch.tensor([[0.0, 1.0], [0.0, 1.0]], device=DEVICE).repeat_interleave(4, 0).repeat_interleave(4, 1)
    problem = upsampled_bce_problem(1, 1, (2, 2), (8, 8))
    loss, expected = (problem.call(impl)(logits, target[None, None]) for impl in ("triton", "reference"))
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_operator_passes_opcheck():
    logits, target = torch.randn(1, 1, 2, 3, device=DEVICE), torch.rand(1, 1, 5, 7, device=DEVICE)
    torch.library.opcheck(kernels._upsampled_bce, (logits.requires_grad_(), target, 1.1, True))
    torch.library.opcheck(kernels._upsampled_bce, (logits.detach(), target, 1.1, False))
