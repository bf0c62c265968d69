"""The kernels of pixel-word attention, on a GPU or interpreted: lengths, answers that cancel, what is kept."""

from __future__ import annotations

import os

import pytest
import torch
from bounds import assert_path_same
from operator_cases import pixel_word_problem
from torch.utils.flop_counter import FlopCounterMode

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import pixel_word_attention as kernels  # noqa: E402
from fastris.kernels.configs import watched  # noqa: E402
from fastris.kernels.launch import recording  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]


def inputs_of(problem, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {k: v.to(DEVICE, dtype if v.is_floating_point() else None) for k, v in problem.make().items()}


@pytest.mark.skipif(not HAS_GPU, reason="MagNet's own sizes take minutes under the interpreter")
@pytest.mark.parametrize(("rows", "dim"), [(14400, 128), (225, 1024)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sizes_of_the_published_model_are_right(rows, dim, dtype):
    problem = pixel_word_problem(rows, dim, 768, (20, 7))
    assert_path_same(problem.call("triton"), problem.call("reference"), inputs_of(problem, dtype), dtype)


def made(words: int, rows: int = 70, dim: int = 40) -> dict[str, torch.Tensor]:
    """What the kernels are given, in float64: pixels, keys, and answers without mean whose first two cancel."""
    generator = torch.Generator().manual_seed(words)
    shapes = {"source": (2, rows, dim), "seen": (2, rows, dim), "rstd": (2, rows), "keys": (2, words, dim)}
    shapes |= {"offset": (2, words), "score_bias": (2, words), "answers": (2, words, dim), "bias": (dim,)}
    given = {k: torch.randn(v, generator=generator, dtype=torch.float64).to(DEVICE) for k, v in shapes.items()}
    given["rstd"].abs_()
    answers = given["answers"]
    if words > 1:
        answers[:, 1] = 0.01 * answers[:, 1] - answers[:, 0]
    answers -= answers.mean(-1, keepdim=True)
    return given | {"gram": answers @ answers.mT / dim}


def published(given: dict[str, torch.Tensor]) -> torch.Tensor:
    raw = given["source"] @ given["keys"].mT + given["offset"][:, None]
    weights = (raw * given["rstd"][..., None] + given["score_bias"][:, None]).softmax(-1)
    variance = (weights @ given["gram"] * weights).sum(-1, keepdim=True)
    heard = weights @ given["answers"] / (variance + 1e-5).sqrt() + given["bias"]
    return torch.nn.functional.gelu(given["seen"]) * heard


@pytest.mark.parametrize("words", [1, 16, 17, 32])
def test_every_length_up_to_the_tiles_own_is_right(words):
    """Two tiles of pixels and two of channels; the factor gives the covariance, and gradients are all made anew."""
    given = {k: v.requires_grad_(k not in ("source", "keys", "offset", "rstd")) for k, v in made(words).items()}
    expected = published(given)
    small = {k: v.detach() if k == "gram" else v.detach().float() for k, v in given.items()}
    out, raw, factor = kernels.listen(**small, eps=1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((factor @ factor.mT).double(), given["gram"], rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(expected)
    d_seen, d_bias, d_gram = torch.autograd.grad(expected, [given[k] for k in ("seen", "score_bias", "gram")], upstream)
    kept = {k: small[k] for k in ("seen", "rstd", "score_bias", "answers", "bias")}
    again, found, _, weights, d_scores, of_pixels = kernels.gradients(
        upstream.float(), raw=raw, factor=factor, eps=1e-5, **kept
    )
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(found.double(), d_seen, rtol=1e-4, atol=1e-5)
    close = {"rtol": 1e-3, "atol": 1e-5 * float(d_bias.abs().max() + 1)}
    torch.testing.assert_close(d_scores.sum(2).double(), d_bias, **close)
    made_gram = torch.bmm(weights * of_pixels[:, 1:], weights.mT) / 2
    torch.testing.assert_close(made_gram.double(), d_gram, rtol=1e-3, atol=1e-4 * float(d_gram.abs().max()))


@pytest.mark.parametrize(("words", "rows", "launches"), [(32, 40, 3), (33, 40, 0), (6, 5, 0)])
def test_what_a_tile_does_not_hold_is_left_to_plain_pytorch(words, rows, launches):
    problem = pixel_word_problem(rows, 16, 8, (words,))
    inputs = {name: value.requires_grad_(value.is_floating_point()) for name, value in inputs_of(problem).items()}
    with recording() as found:
        problem.call("triton")(**inputs).sum().backward()
    assert len(found) == launches, "factor, listen and gradients"


@pytest.mark.parametrize("rows", [70, 20], ids=["through weights", "through queries"])
def test_of_every_pixel_and_word_the_score_alone_is_kept(rows):
    problem = pixel_word_problem(rows, 24, 8, (17, 12))
    inputs = {name: value.requires_grad_(value.is_floating_point()) for name, value in inputs_of(problem).items()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        problem.call("triton")(**inputs)
    shapes = [tuple(tensor.shape) for tensor in kept]
    assert shapes.count((2, 17, rows)) == 1 and shapes.count((2, rows, 24)) == 3, "pixels, W_x x and the last GELU's"


def test_a_longer_sentence_takes_the_same_tile_and_variant():
    with watched() as seen:
        for words in (17, 20):
            small = {k: v if k == "gram" else v.float() for k, v in made(words, rows=3, dim=16).items()}
            kernels.listen(**small, eps=1e-5)
    assert {choice.variant for choice in seen} == {"L32"} and len(seen) == 1


def test_operators_pass_opcheck_and_count_their_operations():
    small = {k: v if k == "gram" else v.float() for k, v in made(3, rows=5, dim=8).items()}
    names = ("source", "seen", "rstd", "keys", "offset", "score_bias", "answers", "gram", "bias")
    given = [small[name] for name in names]
    torch.library.opcheck(kernels._listen, (*given, 1e-5))
    with FlopCounterMode(display=False) as counter:
        _, raw, factor = kernels.listen(**small, eps=1e-5)
        _, seen, rstd, _, _, score_bias, answers, _, bias = given
        arguments = seen, seen, raw, rstd, score_bias, answers, factor, bias, 1e-5
        kernels.gradients(*arguments)
    assert counter.get_total_flops() == 2 * 4 * 2 * 5 * 8 * 3
    torch.library.opcheck(kernels._gradients, arguments)
