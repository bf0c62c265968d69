"""A stack of deformable layers that keeps little computes what the layers compute, to the last bit and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import EXACT
from torch import Tensor, nn

from fastris import reference, use_impl
from fastris.bench.cases.table import choose_cases
from fastris.bench.counter import saved_storages
from fastris.nn.deformable import DeformableLayer
from fastris.nn.lean_deformable import lean_stack
from fastris.nn.separate_attention import stacked
from fastris.ops import deformable_samples

SIZES = ((1, 2), (2, 3), (4, 6), (8, 12))
PIXELS, WIDTH, HIDDEN = 128, 64, 256  # heads of 32 channels, 4 levels and 4 points: MagNet's proportions
SHARE = 0.15
"""What is kept at most, as a fraction of what the published form keeps."""


def stack(count: int = 2) -> Any:
    torch.manual_seed(0)
    layers = stacked(DeformableLayer(WIDTH, HIDDEN, WIDTH // 32, 4, 4), count)
    for parameter in layers.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return layers


def in_turn(layers: Any, y: Tensor, *others: Any) -> Tensor:
    for layer in layers:
        y = layer(y, *others)
    return y


def step(run: Callable[..., Any], layers: Any, impl: str, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The output, all gradients under a random upstream gradient, and the bytes kept; of two samples."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(layers.parameters()).dtype
    drawn = torch.randn(3, PIXELS, WIDTH, generator=generator).to(dtype)
    inputs = {"y": drawn[:2].clone(), "positions": drawn[2].clone()}
    leaves = inputs | dict(layers.named_parameters())
    for name, leaf in leaves.items():
        leaf.requires_grad_(not any(part in name for part in frozen)).grad = None
    places = reference.pixel_centres(SIZES, dtype=dtype)
    with use_impl(impl), saved_storages((*layers.parameters(), places)) as saved:
        output = run(layers, inputs["y"], inputs["positions"], SIZES, places)
    if output.requires_grad:
        output.backward(torch.randn(output.shape, generator=generator).to(dtype))
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": output.detach(), "kept": torch.tensor(sum(saved.values()) / output.nbytes), **gradients}


def assert_exact(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        if name != "kept":
            assert (found[name] - each).abs().max() <= EXACT * each.abs().max(), name


def test_every_bit_is_that_of_the_layers_one_after_the_other():
    layers = stack(3)
    found, expected = step(lean_stack, layers, "torch"), step(in_turn, layers, "torch")
    assert found.keys() == expected.keys() and len(found) == 4 + len(list(layers.parameters()))
    assert not [name for name, each in expected.items() if name != "kept" and not torch.equal(found[name], each)]


def test_every_gradient_is_the_published_one_and_a_share_of_the_bytes_is_kept():
    layers = stack(4).double()
    found, expected = step(lean_stack, layers, "torch"), step(in_turn, layers, "reference")
    assert_exact(found, expected)
    # each layer's input before the norm, sum of samples and what the norm gets; the last norm's, and the positions
    kept = 3 * 4 + 1 + 0.5
    assert kept <= found["kept"] < kept + 2.1 / WIDTH  # the last norm's statistics
    assert found["kept"] <= SHARE * expected["kept"], (found["kept"], expected["kept"])


@pytest.mark.parametrize(
    "frozen",
    [
        ("y", "positions"),
        ("self_attn",),
        ("value_proj", "norm"),
        ("sampling_offsets", "attention_weights", "positions"),
        ("linear", "weight"),
        ("y", "positions", "self_attn", "norm"),
        ("y", "positions", "0.", "1.self_attn", "1.norm1", "1.linear1"),
        ("y", "positions", "0.", "1.self_attn.s", "1.self_attn.a", "1.self_attn.v"),
        ("y", "0", "1.norm", "1.linear", "1.self_attn"),
    ],
)
def test_what_is_trained_gets_its_gradient_and_nothing_else_does(frozen):
    layers = stack().double()
    found = step(lean_stack, layers, "torch", frozen)
    assert_exact(found, step(in_turn, layers, "reference", frozen))
    assert len(found) > 2 and not any(part in name for part in frozen for name in found)


def test_samples_are_summed_once(monkeypatch):
    layers, runs = stack(), []
    sums = deformable_samples._summed
    monkeypatch.setattr(deformable_samples, "_summed", lambda *arguments: runs.append(1) or sums(*arguments))
    step(lean_stack, layers, "torch")
    assert len(runs) == len(layers)


def test_magnets_decoder_at_its_own_size_keeps_a_share_of_what_the_published_one_does():
    pytest.importorskip("transformers", reason="MagNet's text encoder is BERT")
    (case,), _ = choose_cases(("magnet_pixel_decoder",))
    kept = {}
    with case.shapes_only() as problem:
        assert case.sizes["side"] == 480 and case.sizes["batch"] == 1
        for impl in ("torch", "reference"):
            resident = (*problem.leaves().values(), *problem.module.buffers())
            with use_impl(impl), saved_storages(resident) as saved:
                problem.training_forward()
            kept[impl] = sum(saved.values())
    assert 2**31 < kept["reference"] < 2**32
    assert kept["torch"] <= SHARE * kept["reference"], kept


class _Adapted(nn.Module):
    """As LoRA's: a layer and a product of two thin matrices beside it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.thin = nn.Sequential(nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.thin(x)


def _adapt(layers: Any) -> None:
    layers[1].linear1 = _Adapted(layers[1].linear1)


def _hook(layers: Any) -> None:
    layers[0].self_attn.value_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


def _override(layers: Any) -> None:
    layers[0].norm2.forward = lambda x: 2 * x


def _without_bias(layers: Any) -> None:
    layers[1].linear2.bias = None


@pytest.mark.parametrize("change", [_adapt, _hook, _override, _without_bias])
def test_layers_that_were_changed_are_called(change):
    layers = stack()
    change(layers)
    layers.double()
    assert takes(layers) is None
    assert_exact(step(in_turn, layers, "torch"), step(in_turn, layers, "reference"))


def takes(layers: Any, impl: str = "torch", samples: int = 1) -> Tensor | None:
    dtype = next(layers.parameters()).dtype
    y, positions = torch.randn(samples, PIXELS, WIDTH, dtype=dtype), torch.randn(PIXELS, WIDTH, dtype=dtype)
    with use_impl(impl):
        return lean_stack(layers, y, positions, SIZES, reference.pixel_centres(SIZES))


def test_layers_are_called_where_nothing_is_kept_or_others_decide_what():
    layers = stack()
    assert takes(layers) is not None
    assert takes(layers, "reference") is None
    assert takes(layers, samples=0) is None
    with torch.no_grad():
        assert takes(layers) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert takes(layers) is None
    layers[1].norm1.double()
    assert takes(layers) is None
    assert takes(layers.double()) is not None


def test_it_can_be_differentiated_once():
    layers = stack(1)
    y = torch.randn(1, PIXELS, WIDTH, requires_grad=True)
    with use_impl("torch"):
        output = lean_stack(layers, y, torch.randn(PIXELS, WIDTH), SIZES, reference.pixel_centres(SIZES))
    assert output is not None
    (slope,) = torch.autograd.grad(output.sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.slow
@pytest.mark.long
def test_compiled_it_is_one_graph_of_the_layers():
    pytest.importorskip("transformers", reason="MagNet's text encoder is BERT")
    from fastris.models.magnet.pixel_decoder import Encoder

    torch.manual_seed(0)
    encoder = Encoder(WIDTH, 2, HIDDEN, 2).double()
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    found = step(lambda _, *inputs: compiled(*inputs), encoder.layers, "auto")
    assert_exact(found, step(lambda _, *inputs: encoder(*inputs), encoder.layers, "auto"))
