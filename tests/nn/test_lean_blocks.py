"""Blocks that keep less for the backward pass compute what the published ones do, to the last gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from bounds import EXACT
from torch import Tensor, nn

from fastris import use_impl
from fastris.bench.counter import saved_storages
from fastris.nn.lean_linear import gelu_linear, normed_linear
from fastris.nn.separate_attention import CrossAttentionLayer
from fastris.nn.swin import SwinBlock
from fastris.nn.window_attention import _WindowAttention, windows_of

WIDTH = 12


def block(shifted: bool = True, drop_path: float = 0.0, window: int = 4) -> SwinBlock:
    torch.manual_seed(0)
    made = SwinBlock(WIDTH, 3, window, shifted, drop_path)
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def step(module: nn.Module, impl: str, x: Tensor) -> dict[str, Tensor]:
    """The output and all gradients under a random upstream gradient."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(2)
    with use_impl(impl):
        output = module(x)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype)
    output.backward(upstream)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **gradients}  # type: ignore[dict-item]


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert actual.keys() == expected.keys()
    return {n: float((actual[n] - e).abs().max() / e.abs().max().clamp_min(1e-30)) for n, e in expected.items()}


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (4, 4), (3, 2), (9, 6), (4, 13)])
def test_a_block_is_the_published_one_in_every_gradient_whatever_is_padded(size, shifted):
    made, x = block(shifted, drop_path=0.3).double(), torch.randn(2, *size, WIDTH, dtype=torch.double)
    found = errors(step(made, "torch", x), step(made, "reference", x))
    assert len(found) == 2 + len(list(made.parameters()))
    assert max(found.values()) < EXACT, found


def test_windows_worked_on_in_parts_give_the_same_block(monkeypatch):
    made, x = block().double(), torch.randn(2, 9, 6, WIDTH, dtype=torch.double)
    expected = step(made, "torch", x)
    monkeypatch.setattr("fastris.nn.window_attention.CPU_PART_BYTES", 2 * 3 * 16 * 16 * 8)  # two windows' weights
    assert max(errors(step(made, "torch", x), expected).values()) < EXACT


def test_a_block_under_autocast_loses_no_more_than_the_published_one():
    made, x = block(), torch.randn(2, 9, 6, WIDTH)
    truth = step(copy.deepcopy(made).double(), "reference", x.double())
    with torch.autocast("cpu", torch.bfloat16):
        lost = {impl: errors(step(made, impl, x), truth) for impl in ("torch", "reference")}
    mean = {impl: sum(each.values()) / len(each) for impl, each in lost.items()}
    assert mean["torch"] <= 1.25 * mean["reference"] + torch.finfo(torch.bfloat16).eps, lost


def test_a_block_keeps_less_than_half_of_the_published_one():
    made, x = SwinBlock(64, 2, 12, True, 0.0), torch.randn(1, 24, 24, 64, requires_grad=True)
    kept = {}
    for impl in ("reference", "torch"):
        with use_impl(impl), saved_storages([*made.parameters(), *made.buffers()]) as saved:
            made(x)
        kept[impl] = sum(saved.values()) / x.nbytes
    assert kept["torch"] < 10.1  # x twice, queries, keys, values, what is read, and 4 for the MLP
    assert kept["torch"] < 0.5 * kept["reference"]


def test_every_pixel_has_one_place_and_every_other_place_is_padding():
    windows = windows_of(2, 5, 6, 4, 2, torch.device("cpu"))
    assert windows.padded is not None
    torch.testing.assert_close(windows.source.flatten()[windows.place], torch.arange(60))
    assert int((~windows.padded).sum()) == 60 and not windows.padded.flatten()[windows.place].any()


def test_a_norm_and_a_linear_keep_their_input_alone():
    norm, linear = nn.LayerNorm(8), nn.Linear(8, 24)
    x = torch.randn(5, 8)
    with saved_storages([*norm.parameters(), *linear.parameters()]) as saved, use_impl("torch"):
        gelu_linear(normed_linear(x, norm, linear)[1], torch.randn(3, 24), None)
    assert sum(saved.values()) == x.nbytes + 5 * 24 * 4 + 3 * 24 * 4  # x, the GELU's input, and the free matrix


@pytest.mark.parametrize("read", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("frozen", [(), ("norm",), ("linear",), ("norm", "linear")])
def test_what_is_read_and_trained_of_a_normed_linear_gets_its_gradient(read, frozen):
    parts = nn.ModuleDict({"norm": nn.LayerNorm(8), "linear": nn.Linear(8, 6)}).double()
    for name in frozen:
        parts[name].requires_grad_(False)

    class Chosen(nn.Module):
        parts: nn.ModuleDict

        def __init__(self) -> None:
            super().__init__()
            self.parts = parts

        def forward(self, x: Tensor) -> Tensor:
            found = normed_linear(x, self.parts["norm"], self.parts["linear"])  # type: ignore[arg-type]
            return torch.cat([found[number] for number in read], dim=-1)

    x = torch.randn(3, 5, 8, dtype=torch.double)
    found = errors(step(Chosen(), "torch", x), step(Chosen(), "reference", x))
    assert max(found.values()) < EXACT, found


def test_a_layer_behind_its_attention_is_the_published_one():
    torch.manual_seed(0)
    layer = CrossAttentionLayer(8, 12, 16).double()
    layer.forward = lambda x: layer.after(x, x.flip(1))  # type: ignore[method-assign]
    x = torch.randn(2, 5, 8, dtype=torch.double)
    found = errors(step(layer, "torch", x), step(layer, "reference", x))
    assert max(found.values()) < EXACT, found


def test_the_reference_path_runs_timms_own_block(monkeypatch):
    def never(*arguments: object) -> None:
        raise AssertionError("the published block does not come here")

    monkeypatch.setattr(_WindowAttention, "apply", never)
    with use_impl("reference"):
        block()(torch.randn(1, 8, 8, WIDTH))
    with use_impl("torch"), pytest.raises(AssertionError, match="published block"):
        block()(torch.randn(1, 8, 8, WIDTH))
