"""The kernels of bidirectional attention, on a GPU or under Triton's interpreter, where the contract does not go."""

from __future__ import annotations

import os

import pytest
import torch
from bounds import assert_path_same
from operator_cases import bidirectional_problem
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import bidirectional_attention as kernels  # noqa: E402
from fastris.kernels.configs import Choice, Config, replaced, watched  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
SMALL = {"N96": bidirectional_problem(96, 16, 8, (5, 2)), "N7": bidirectional_problem(7, 16, 24, (3, 4))}


def drawn(batch: int, pixels: int, words: int, width: int, value: int) -> dict[str, Tensor]:
    """Arguments of ``read``."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"few": (batch, words, width), "bias": (batch, words)}
    shapes |= {"source": (batch, pixels, width), "value": (batch, pixels, value)}
    return {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}


def read_plainly(few: Tensor, bias: Tensor, source: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    scores = few @ source.mT + bias[..., None]
    rows = scores.softmax(1)
    rows = rows - rows.mean(2, keepdim=True)
    return scores, rows, rows @ rows.mT / source.shape[1], scores.softmax(2) @ value


@pytest.mark.parametrize("words", [1, 16, 17, 32])
@pytest.mark.parametrize("pixels", [1, 128, 257])
def test_what_is_read_and_its_gradients_are_those_of_plain_pytorch(pixels, words):
    inputs = drawn(2, pixels, words, 20, 33)
    *found, sums = kernels.read(**inputs)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    expected = read_plainly(**leaves)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    upstream = [torch.randn(each.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE) for each in found[1:]]
    d_scores, columns = kernels.read_backward(found[0], sums, found[3], *upstream, inputs["value"])
    (truth,) = torch.autograd.grad(expected[1:], expected[0], [each.double() for each in upstream])
    torch.testing.assert_close(d_scores.double(), truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max() + 1))
    torch.testing.assert_close(columns.double(), expected[0].softmax(2), rtol=1e-5, atol=1e-6)


def test_scores_of_any_size_stay_finite_and_right():
    inputs = drawn(1, 140, 5, 16, 16)
    inputs["few"] *= 1000
    inputs["bias"][:, 3:] = -1e4
    found, expected = kernels.read(**inputs), read_plainly(**{name: each.double() for name, each in inputs.items()})
    for got, want in zip(found[1:], expected[1:], strict=False):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


def test_what_pixels_have_in_common_costs_the_covariance_no_accuracy():
    inputs = drawn(1, 300, 4, 16, 16)
    inputs["few"] *= 1e-3  # rows are 1/4 and a thousandth
    spread, truth = kernels.read(**inputs)[2], read_plainly(**{name: each.double() for name, each in inputs.items()})[2]
    assert (spread - truth).abs().max() < 1e-4 * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_other_tiles_give_the_published_numbers_too(name, dtype):
    problem = SMALL[name]
    inputs = {key: value.to(DEVICE) for key, value in problem.make().items()}
    with watched() as seen:
        problem.call("triton")(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    tiles = Config((("BLOCK_N", 32), ("BLOCK_D", 16)), num_warps=4, num_stages=1)
    choices: dict[Choice, Config] = {choice: tiles for choice in seen}
    assert {choice.kernel for choice in choices} == {"bidirectional_attention scores"}
    with replaced(choices):
        assert_path_same(problem.call("triton"), problem.call("reference"), inputs, dtype, 2)


def test_more_words_than_a_tile_holds_take_the_way_of_plain_pytorch():
    problem = bidirectional_problem(9, 8, 8, (33, 2))
    inputs = {key: value.to(DEVICE) for key, value in problem.make().items()}
    with watched() as seen:
        assert_path_same(problem.call("triton"), problem.call("reference"), inputs, torch.float32)
    assert not seen


def test_operators_pass_opcheck_and_count_their_work():
    inputs = drawn(2, 9, 3, 8, 6)
    torch.library.opcheck(kernels._read, tuple(inputs.values()))
    scores, rows, spread, heard, sums = kernels.read(**inputs)
    arguments = scores, sums, heard, rows, spread, heard, inputs["value"]
    torch.library.opcheck(kernels._read_backward, arguments)
    for function, count in (
        (lambda: kernels.read(**inputs), 2 * 2 * 3 * 9 * (8 + 6)),
        (lambda: kernels.read_backward(*arguments), 2 * 2 * 3 * 9 * 6),
    ):
        with FlopCounterMode(display=False) as counter:
            function()
        assert counter.get_total_flops() >= count
