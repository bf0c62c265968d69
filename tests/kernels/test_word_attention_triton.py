"""The kernels of word attention, on a GPU or interpreted: any layout and length, half precision, what a tile holds."""

from __future__ import annotations

import os

import pytest
import torch
from bounds import assert_path_same, run_with_gradients
from operator_cases import word_problem
from torch.utils.flop_counter import FlopCounterMode

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import word_attention as kernels  # noqa: E402
from fastris.kernels.configs import pretended_class, watched  # noqa: E402
from fastris.kernels.launch import recording  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
PADDED = word_problem(2, 35, 32, 4, (12, 7), real=(6, 2))  # several tiles of float32's pixels


def inputs_of(problem=PADDED, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {k: v.to(DEVICE, dtype if v.is_floating_point() else None) for k, v in problem.make().items()}


@pytest.mark.skipif(not HAS_GPU, reason="AlignFormer's own size takes minutes under the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_size_of_the_published_model_is_right(dtype):
    problem = word_problem(2, 4725, 256, 8, (768, 768), real=(6, 4))
    assert_path_same(problem.call("triton"), problem.call("reference"), inputs_of(problem, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles_are_the_published_formula(dtype):
    draws = None if HAS_GPU else 2
    assert_path_same(PADDED.call("triton"), PADDED.call("reference"), inputs_of(dtype=dtype), dtype, draws)


def absorbed(words: int, dim: int = 24, heads: int = 2) -> tuple[torch.Tensor, ...]:
    """A query (1, 3, D), keys, their bias, values and the output's bias, as leaves."""
    shapes = (1, 3, dim), (1, heads, words, dim), (1, heads, words), (1, heads, words, dim), (dim,)
    return tuple(torch.randn(shape).to(DEVICE).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("words", [1, 16, 17, 32])
def test_every_length_up_to_the_tiles_own_is_right(words):
    leaves = absorbed(words)
    query, keys, key_bias, values, bias = leaves
    weights = ((query[:, None] @ keys.mT) + key_bias[:, :, None]).softmax(-1)
    expected = (weights @ values).sum(1) + bias
    found = kernels.fused_word_attention(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(each, leaves, upstream) for each in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_pixels_may_lie_in_memory_in_any_way():
    inputs = inputs_of()
    expected = run_with_gradients(PADDED.call("triton"), inputs)
    sequence_first = inputs["query"].transpose(0, 1).contiguous().transpose(0, 1)
    for query in (sequence_first, inputs["query"].mT.contiguous().mT):
        results = run_with_gradients(PADDED.call("triton"), inputs | {"query": query})
        assert all(torch.equal(value, expected[name]) for name, value in results.items())


@pytest.mark.parametrize(("dim", "words", "launches"), [(256, 32, 2), (256, 33, 0), (260, 20, 0)])
@pytest.mark.parametrize("shared", ["small", "tiny"])
def test_what_a_tile_does_not_hold_is_left_to_plain_pytorch(dim, words, launches, shared):
    problem = word_problem(1, 3, dim, 4, (8, 8))
    inputs = {name: value.requires_grad_() for name, value in inputs_of(problem).items()}
    for name in ("key", "value"):
        inputs[name] = torch.randn(1, words, 8, device=DEVICE)
    with pretended_class(shared), recording() as found:
        problem.call("triton")(**inputs).sum().backward()
    assert len(found) == launches


def test_no_attention_weight_is_kept_for_the_backward_pass():
    inputs = {name: value.requires_grad_(value.is_floating_point()) for name, value in inputs_of().items()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        PADDED.call("triton")(**inputs)
    of_pixels = [tuple(tensor.shape) for tensor in kept if tensor.numel() > 35 * 24]
    assert of_pixels.count((2, 35, 32)) == 1 and not any(35 in shape and shape != (2, 35, 32) for shape in of_pixels)


def test_a_longer_sentence_takes_the_same_tile_and_variant():
    with watched() as seen:
        for words in (17, 20):
            kernels.fused_word_attention(*(each.detach() for each in absorbed(words)))
    assert {choice.variant for choice in seen} == {"W32D32"} and len(seen) == 1


def test_operators_pass_opcheck():
    leaves = absorbed(3, dim=8)
    torch.library.opcheck(kernels._answer, leaves)
    query, keys, key_bias, values, _ = (each.detach() for each in leaves)
    torch.library.opcheck(kernels.gradients, (torch.randn_like(query), query, keys, key_bias, values))


def test_both_passes_count_their_operations():
    leaves = absorbed(3, dim=8)
    with FlopCounterMode(display=False) as counter:
        kernels.fused_word_attention(*leaves).sum().backward()
    assert counter.get_total_flops() == (4 + 6 + 4) * 3 * 8 * 2 * 3
