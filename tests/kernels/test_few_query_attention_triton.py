"""The few-query kernels, on a GPU or under Triton's interpreter: published values and gradients, the same bits."""

from __future__ import annotations

import os

import pytest
import torch
from bounds import assert_path_same, run_with_gradients
from operator_cases import few_query_problem
from torch.utils.flop_counter import FlopCounterMode

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import few_query_attention as kernels  # noqa: E402
from fastris.kernels import few_query_attention_backward as backward_kernels  # noqa: E402
from fastris.kernels.configs import pretended_class  # noqa: E402
from fastris.kernels.launch import recording  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
CHUNKS = few_query_problem(2, 1, 150, 24, 20, 4)  # two chunks of pixels, the second hardly begun


def inputs_of(problem=CHUNKS, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE, dtype) for name, tensor in problem.make().items()}


@pytest.mark.skipif(not HAS_GPU, reason="AlignFormer's own size takes minutes under the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", [15, 30, 60])
def test_the_size_of_the_published_model_is_right(dtype, side):
    problem = few_query_problem(2, 1, side * side, 768, 256, 8, fixed=True)
    assert_path_same(problem.call("triton"), problem.call("reference"), inputs_of(problem), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pixels_may_lie_in_memory_in_any_way_and_their_gradient_lies_alike(dtype):
    inputs = inputs_of(dtype=dtype)
    expected = run_with_gradients(CHUNKS.call("triton"), inputs)
    inside = inputs["pixels"].mT.contiguous().mT
    part = torch.cat([inputs["pixels"], inputs["pixels"]], dim=1)[:, :150]
    for pixels in (inside, part):
        results = run_with_gradients(CHUNKS.call("triton"), inputs | {"pixels": pixels})
        assert all(torch.equal(value, expected[name]) for name, value in results.items())
    results = run_with_gradients(CHUNKS.call("triton"), inputs | {"pixels": inside})
    assert results["gradient of pixels"].stride() == inside.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_and_slopes_beyond_half_precision_stay_finite_and_right(dtype):
    inputs = inputs_of(dtype=torch.float32)
    inputs["query_weight"] *= 1e4
    inputs["pixels"][:, 17] *= 20
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    results = run_with_gradients(CHUNKS.call("triton"), inputs)
    assert all(value.isfinite().all() for value in results.values())
    torch.testing.assert_close(results["output 0"], CHUNKS.call("reference")(**inputs), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("problem", "launches"),
    [
        (CHUNKS, 2),
        (few_query_problem(1, 3, 9, 64, 20, 8), 0),  # 24 rows
        (few_query_problem(1, 1, 9, 24, 260, 4), 0),  # too wide in float32
        (few_query_problem(1, 1, 1, 24, 20, 4), 0),  # one pixel
    ],
    ids=str,
)
def test_what_a_tile_does_not_hold_is_left_to_plain_pytorch(problem, launches):
    inputs = {name: value.requires_grad_() for name, value in inputs_of(problem).items()}
    with recording() as found:
        problem.call("triton")(**inputs).sum().backward()
    assert len(found) == launches
    if not HAS_GPU:
        with pretended_class("tiny"), recording() as found:
            problem.call("triton")(**inputs).sum().backward()
        assert not found


def test_gradient_of_frozen_pixels_is_not_computed():
    inputs = {name: value.requires_grad_(name != "pixels") for name, value in inputs_of().items()}
    with recording() as found:
        CHUNKS.call("triton")(**inputs).sum().backward()
    assert dict(found[-1].arguments)["WANTS_PIXELS"] is False


def folded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels (B, N, K), absorbed queries (B, R, K) and the positions' scores (B, R, N), as leaves."""
    shapes = (2, 19, 6), (2, 3, 6), (2, 3, 19)
    return tuple(torch.randn(shape).to(DEVICE).requires_grad_() for shape in shapes)


def test_operators_pass_opcheck():
    leaves = folded()
    torch.library.opcheck(kernels._pooled, leaves)
    y, absorbed, positions = (each.detach() for each in leaves)
    pooled, scores, log_total = kernels._pooled(y, absorbed, positions)
    for wanted in (True, False):
        arguments = (y, absorbed, scores, log_total, torch.randn_like(pooled), log_total, wanted)
        if wanted:
            torch.library.opcheck(backward_kernels.gradients, arguments)
        else:
            assert len(backward_kernels.gradients(*arguments)) == 3


def test_both_passes_count_their_operations():
    y, absorbed, positions = folded()
    with FlopCounterMode(display=False) as counter:
        kernels.pooled_pixels(y, absorbed, positions).sum().backward()
    assert counter.get_total_flops() == (2 + 4) * 2 * 2 * 19 * 6 * 3
