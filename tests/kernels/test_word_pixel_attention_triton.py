"""The kernels of words that read pixels, on a GPU or interpreted: bidirectional attention's, in part."""

from __future__ import annotations

import os

import pytest
import torch
from bounds import assert_path_same
from operator_cases import word_pixel_problem
from torch.utils.flop_counter import FlopCounterMode

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import bidirectional_attention as kernels  # noqa: E402
from fastris.kernels.launch import recording  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]


@pytest.mark.skipif(not HAS_GPU, reason="MagNet's own sizes take minutes under the interpreter")
@pytest.mark.parametrize(("rows", "dim"), [(14400, 128), (225, 1024)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sizes_of_the_published_model_are_right(rows, dim, dtype):
    problem = word_pixel_problem(rows, dim, 768, (20, 7), "masked")
    inputs = {k: v.to(DEVICE, dtype if v.is_floating_point() else None) for k, v in problem.make().items()}
    assert_path_same(problem.call("triton"), problem.call("reference"), inputs, dtype)


@pytest.mark.parametrize("words", [1, 16, 17, 32])
def test_every_length_up_to_the_tiles_own_is_right(words):
    """Three tiles of pixels, of another width as they score than as they are read."""
    few, source, value = (torch.randn(2, *size, device=DEVICE) for size in ((words, 40), (300, 40), (300, 24)))
    wide = few.double().requires_grad_(), value.double()
    weights = (wide[0] @ source.double().mT).softmax(-1)
    expected = weights @ wide[1]
    scores, heard, sums = kernels.read_columns(few, source, value)
    torch.testing.assert_close(heard.double(), expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(heard)
    (d_few,) = torch.autograd.grad(expected, wide[0], upstream.double())
    d_scores, columns = kernels.read_columns_backward(scores, sums, heard, upstream, value)
    torch.testing.assert_close(columns.double(), weights.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(d_scores @ source, d_few.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("words", "rule", "launches"), [(32, "masked", 2), (33, "masked", 0), (6, "released", 0)])
@pytest.mark.parametrize("rows", [5, 60], ids=["through maps", "through the covariance"])
def test_what_a_tile_does_not_hold_is_left_to_plain_pytorch(words, rule, launches, rows):
    problem = word_pixel_problem(rows, 12, 8, (words,), rule)
    inputs = {k: v.to(DEVICE).requires_grad_(v.is_floating_point()) for k, v in problem.make().items()}
    with recording() as found:
        problem.call("triton")(**inputs).sum().backward()
    assert [each.kernel.fn.__name__ for each in found] == ["_scores_kernel", "_backward_kernel"][:launches]


def test_operators_pass_opcheck_and_count_their_operations():
    few, source, value = (torch.randn(2, *size, device=DEVICE) for size in ((3, 8), (5, 8), (5, 4)))
    torch.library.opcheck(kernels._read_columns, (few, source, value))
    with FlopCounterMode(display=False) as counter:
        scores, heard, sums = kernels.read_columns(few, source, value)
        kernels.read_columns_backward(scores, sums, heard, heard, value)
    assert counter.get_total_flops() == 2 * 2 * 3 * 5 * (8 + 4 + 4)
    torch.library.opcheck(kernels._read_columns_backward, (scores, sums, heard, torch.ones_like(heard), value))
