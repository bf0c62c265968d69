"""The drop-in on a GPU: somebody else's model computes the same by the kernels, patched before or after it is moved."""

from __future__ import annotations

import copy

import pytest
import torch
from strangers import Stranger
from torch import Tensor, nn

from fastris import use_impl
from fastris.dropin.patch import patch, unpatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_inputs() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = zip((32, 64, 48), (4, 2, 1), strict=True)
    maps = [torch.randn(3, channels, 4 * scale, 6 * scale, generator=generator).cuda() for channels, scale in sizes]
    words, state = (torch.randn(*shape, generator=generator).cuda() for shape in ((3, 9, 32), (3, 48)))
    padding = torch.zeros(3, 9, dtype=torch.bool)
    padding[0, 5:] = padding[1, 8:] = True
    return maps, words, state, padding.cuda()


def step(model: nn.Module, autocast: torch.dtype | None = None, double: bool = False) -> list[Tensor]:
    """Output and gradients of a training step."""
    model = copy.deepcopy(model).train()
    maps, words, state, padding = make_inputs()
    if double:
        model, maps, words, state = model.double(), [x.double() for x in maps], words.double(), state.double()
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(maps, words, state, padding)
    outputs = output if isinstance(output, tuple) else (output,)
    sum(o.float().square().mean() if not double else o.square().mean() for o in outputs).backward()
    return [*(o.detach() for o in outputs), *(p.grad for p in model.parameters() if p.grad is not None)]


def error_of(results: list[Tensor], truth: list[Tensor]) -> float:
    """Relative error of all tensors together."""
    assert len(results) == len(truth)
    error = sum(float((a.double() - b).square().sum()) for a, b in zip(results, truth, strict=True))
    return (error / sum(float(b.square().sum()) for b in truth)) ** 0.5


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("moved", ["before", "after"])
def test_a_patched_model_loses_no_more_by_the_kernels_than_it_did(moved, autocast):
    model = Stranger(dropout=0.0)
    truth, published = step(copy.deepcopy(model).cuda(), double=True), step(copy.deepcopy(model).cuda(), autocast)
    model = model.cuda() if moved == "before" else model
    assert len(patch(model).replaced) == 5
    with use_impl("triton"):
        ours = step(model.cuda(), autocast)
    assert error_of(ours, truth) <= 1.5 * error_of(published, truth) + 1e-4


def test_unpatched_it_has_its_own_numbers_again():
    model = Stranger(dropout=0.0).cuda()
    expected = step(model)
    patch(model)
    step(model)
    assert unpatch(model) == 5
    assert error_of(step(model), [value.double() for value in expected]) < 1e-6
