"""What the drop-in must not replace, what it may, and when a replaced forward must hand back to the original."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from strangers import (
    AlignedHead,
    AskedLayer,
    BiasesFirstHead,
    BundledHead,
    CrossModalDecoder,
    DropFirstLayer,
    ExtraDropoutLayer,
    FullPrecisionHead,
    Fusion,
    Layer,
    MaskHead,
    MasklessLayer,
    NormalisedHead,
    NormlessLayer,
    PostNormLayer,
    QueryHead,
    RememberingLayer,
    ScaledLayer,
    ScoredHead,
    StatelessFusion,
    TwiceFusion,
    UngatedFusion,
    VariedHead,
    WeightsReturningLayer,
    layer_with,
)
from torch import nn
from torch.nn.utils import parametrizations

from fastris.dropin import proof as dropin_proof
from fastris.dropin.patch import patch, unpatch

DIFFER = "values or gradients differ"


def set_child(path: str, child: nn.Module):
    """A change that puts ``child`` at ``path``."""
    parent, _, name = path.rpartition(".")
    return lambda module: setattr(module.get_submodule(parent), name, child)


def with_change(module: nn.Module, change) -> nn.Module:
    change(module)
    return module


def no_bias() -> nn.MultiheadAttention:
    return nn.MultiheadAttention(32, 4, bias=False)


# name -> (module, part of the reason)
LEFT_ALONE = {
    "normalised words": (NormalisedHead(48, 16), DIFFER),
    "aligned corners": (AlignedHead(48, 16), DIFFER),
    "sigmoid at the end": (VariedHead(lambda self, out: out.sigmoid()), DIFFER),
    "learned temperature, 1 so far": (VariedHead(lambda self, out: out * self.temperature.exp()), DIFFER),
    "a hundred-millionth more": (VariedHead(lambda self, out: out * (1 + 1e-8)), DIFFER),
    "clamped logits": (VariedHead(lambda self, out: out.clamp(-5000, 5000)), "on inputs of scale 10000"),
    "autocast off": (FullPrecisionHead(48, 16), "switches autocast by itself"),
    "another gradient": (VariedHead(lambda self, out: 2 * out - out.detach()), DIFFER),
    "a path dropped at random": (
        VariedHead(lambda self, out: out * (not self.training or random.random() < 2)),
        "in training it draws random numbers of its own",
    ),
    "a list": (VariedHead(lambda self, out: [out]), "it returns a list of 1 where CRIS's returns a Tensor"),
    "a dictionary": (VariedHead(lambda self, out: {"mask": out}), "it returns a dict"),
    "single precision": (VariedHead(lambda self, out: out.float()), "changes the dtype from float64 to float32"),
    "biases first": (BiasesFirstHead(48, 16), DIFFER),
    "7x7 text kernel": (MaskHead(48, 16, kernel_size=7), "its text kernel is 7 wide, and fastris has 1, 3 and 5"),
    "text kernel without its bias": (
        with_change(MaskHead(48, 16), set_child("txt", nn.Linear(48, 144))),
        "does not give kernels and a bias",
    ),
    "GELU block": (with_change(MaskHead(48, 16), set_child("vis.1.2", nn.GELU())), "blocks are not Conv2d"),
    "reflected borders": (
        with_change(MaskHead(48, 16), set_child("vis.1.0", nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"))),
        DIFFER,
    ),
    "words without mask": (MasklessLayer(32, 4, 64), DIFFER),
    "no norm behind the cross-attention": (NormlessLayer(32, 4, 64), DIFFER),
    "dropout before the norm": (DropFirstLayer(32, 4, 64), "with dropout2 dropping everything"),
    "one more dropout": (ExtraDropoutLayer(32, 4, 64), "draws random numbers of its own"),
    "scaled residual": (ScaledLayer(32, 4, 64), DIFFER),
    "one more norm": (PostNormLayer(32, 4, 64), DIFFER),
    "stored output": (RememberingLayer(32, 4, 64), "it stores seen on itself"),
    "GELU layer": (layer_with(set_child("ffn.1", nn.GELU())), "its ffn is not"),
    "another eps": (layer_with(lambda m: setattr(m.norm2, "eps", 1e-6)), "its norms differ in eps"),
    "norm without weight": (layer_with(set_child("ffn.3", nn.LayerNorm(64, elementwise_affine=False))), "its norms"),
    "attention without biases": (layer_with(set_child("self_attn", no_bias())), "have no biases"),
    "dropout of whole channels": (layer_with(set_child("dropout1", nn.Dropout1d(0.1))), "its dropouts are not"),
    "block used twice": (TwiceFusion(), DIFFER),
    "bare CoordConv": (with_change(Fusion(), lambda m: setattr(m, "coordconv", m.coordconv[0])), "its coordconv"),
    "another input": (ScoredHead(48, 16), "its forward needs (score) as well"),
    "all inputs in one": (BundledHead(48, 16), "its forward takes (inputs) where CRIS's takes (x, word)"),
    "meta device": (MaskHead(48, 16).to("meta"), "no copy of it could be made"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_variant_that_computes_something_else_is_left_alone_with_its_reason(name):
    module, reason = LEFT_ALONE[name]
    report = patch(module)
    assert not report.replaced and len(report.left_alone) == 1
    assert reason in report.left_alone[0][1]
    assert "forward" not in module.__dict__


def shared(layer: nn.Module) -> None:
    layer.multihead_attn.in_proj_weight = layer.self_attn.in_proj_weight
    layer.norm2.weight = layer.norm1.weight


def frozen(layer: nn.Module) -> None:
    for parameter in (*layer.self_attn.parameters(), *layer.norm2.parameters(), *layer.ffn[0].parameters()):
        parameter.requires_grad_(False)


def all_eps(layer: nn.Module) -> None:
    for child in layer.modules():
        if isinstance(child, nn.LayerNorm):
            child.eps = 1e-3


LAYERS = {
    "published": layer_with(lambda m: None, dropout=0.0),
    "shared parameters": layer_with(shared, dropout=0.0),
    "frozen parameters": layer_with(frozen, dropout=0.0),
    "another eps throughout": layer_with(all_eps, dropout=0.0),
    "attention weights": layer_with(lambda m: None, WeightsReturningLayer, dropout=0.0),
    "weights when asked": layer_with(lambda m: None, AskedLayer, dropout=0.0),
    "reparametrised": layer_with(lambda m: parametrizations.weight_norm(m.ffn[4]), dropout=0.0),
}


def layer_inputs(image_pos_batch: int = 1) -> tuple:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    padding = torch.tensor([[False, False, True], [False, False, False]])
    return normal(8, 2, 32), normal(3, 2, 32), normal(8, image_pos_batch, 32), normal(3, 1, 32), padding


def outputs_and_gradients(module: nn.Module, inputs: tuple, **options) -> list[torch.Tensor]:
    module.zero_grad()
    leaves = [x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    answer = module(*leaves, **options)
    answers = list(answer) if isinstance(answer, tuple) else [answer]
    sum((a * torch.linspace(0, 1, a.numel()).view(a.shape)).sum() for a in answers).backward()
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return [*(a.detach() for a in answers), *(x.grad for x in leaves if x is not None and x.requires_grad), *gradients]


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_that_computes_the_same_is_replaced_and_does(name):
    layer = LAYERS[name]
    expected = outputs_and_gradients(layer, layer_inputs())
    assert len(patch(layer).replaced) == 1
    assert_same(outputs_and_gradients(layer, layer_inputs()), expected)


class Adapted(nn.Linear):
    """A Linear with something on top, as adapters put it there."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


def doubled(module, inputs, output):
    return tuple(2 * o for o in output) if isinstance(output, tuple) else 2 * output


def quiet_dropouts(module: nn.Module) -> None:
    for child in module.train().modules():
        if isinstance(child, (nn.Dropout, nn.MultiheadAttention)):
            child.eval()


def replace_forward(module: nn.Module) -> None:
    norm = module.norm2
    norm.forward = lambda x: 3 * type(norm).forward(norm, x)


def freeze_statistics(module: nn.Module) -> None:
    for child in module.train().modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()


def head_inputs() -> tuple:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(2, 32, 3, 4, generator=generator), torch.randn(2, 48, generator=generator)


# What people do to a model after it was patched.
CHANGES = {
    "hook on the last convolution": (MaskHead(48, 16), lambda m: m.vis[4].register_forward_hook(doubled)),
    "hook on an attention": (Layer(32, 4, 64), lambda m: m.multihead_attn.register_forward_hook(doubled)),
    "adapter": (Layer(32, 4, 64), set_child("ffn.0", Adapted(32, 64))),
    "replaced forward of a norm": (Layer(32, 4, 64), replace_forward),
    "changed setting": (VariedHead(lambda self, out: out * self.knob), lambda m: setattr(m, "knob", 2.0)),
    "dropouts in eval mode in a layer in training": (Layer(32, 4, 64, dropout=0.5), quiet_dropouts),
    "statistics frozen in training": (MaskHead(48, 16), freeze_statistics),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_after_patching_works_as_on_the_original(name):
    module, change = CHANGES[name]
    inputs = layer_inputs() if isinstance(module, Layer) else head_inputs()
    module.eval()
    twin, undisturbed = copy.deepcopy(module), outputs_and_gradients(module, inputs)
    assert len(patch(module).replaced) == 1
    for one in (module, twin):
        change(one)
    expected = outputs_and_gradients(twin, inputs)
    assert_same(outputs_and_gradients(module, inputs), expected)
    assert "training" in name or not torch.allclose(expected[0], undisturbed[0]), "the change must matter"


def test_hook_that_was_there_before_leaves_the_module_alone():
    head = MaskHead(48, 16)
    handle = head.vis[4].register_forward_hook(doubled)
    assert "its vis.4 has hooks" in patch(head).left_alone[0][1]
    handle.remove()
    head.txt.register_forward_hook(doubled)
    assert len(patch(head).replaced) == 1, "the text projection is still called"


def without_gradient(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


IMAGES = [without_gradient(2, 32, 8, 12), without_gradient(2, 64, 4, 6), without_gradient(2, 48, 2, 3)]
STATE = without_gradient(2, 48)
LAYER_INPUTS = layer_inputs()
SOFT_MASK = torch.where(LAYER_INPUTS[-1], -1.0, 0.0)

# Calls that the published code does not make: (module, arguments, keywords).
CALLS = {
    "weights asked for": (AskedLayer(32, 4, 64), LAYER_INPUTS, {"want_weights": True}),
    "no padding mask": (AskedLayer(32, 4, 64), LAYER_INPUTS[:-1], {}),
    "padding mask None": (Layer(32, 4, 64), (*LAYER_INPUTS[:-1], None), {}),
    "additive mask": (Layer(32, 4, 64), (*LAYER_INPUTS[:-1], SOFT_MASK), {}),
    "positions of each sample": (Layer(32, 4, 64), layer_inputs(image_pos_batch=2), {}),
    "by name": (
        Layer(32, 4, 64),
        LAYER_INPUTS[:2],
        dict(zip(("padding", "word_pos", "image_pos"), reversed(LAYER_INPUTS[2:]), strict=True)),
    ),
    "no sentence": (UngatedFusion(), (IMAGES,), {}),
    "sentence None": (UngatedFusion(), (IMAGES, None), {}),
    "further switch": (UngatedFusion(), (IMAGES, STATE), {"deep": True}),
    "further switch off": (UngatedFusion(), (IMAGES, STATE, False), {}),
    "zeros for a missing sentence": (StatelessFusion(), (IMAGES,), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_that_the_published_code_does_not_make_works_as_on_the_original(name):
    module, arguments, keywords = CALLS[name]
    module.eval()
    expected = module(*arguments, **keywords)
    assert len(patch(module).replaced) == 1
    torch.testing.assert_close(module(*arguments, **keywords), expected, rtol=1e-4, atol=2e-5)


def test_one_layer_used_three_times_is_replaced_once():
    decoder = CrossModalDecoder(1, 32, 4, 64, dropout=0.0).eval()
    decoder.layers = nn.ModuleList([decoder.layers[0]] * 3)
    inputs = torch.randn(2, 32, 3, 5), torch.randn(2, 6, 32), torch.zeros(2, 6, dtype=torch.bool)
    expected = decoder(*inputs)
    assert len(patch(decoder).replaced) == 2
    torch.testing.assert_close(decoder(*inputs), expected, rtol=0, atol=1e-5)
    assert unpatch(decoder) == 2


def test_several_text_kernels_drop_out_as_the_original():
    head = QueryHead(48, 16, dropout=1.0).train()
    assert len(patch(head).replaced) == 1
    assert torch.equal(head(*head_inputs()), torch.zeros(2, 2, 12, 16))


def test_layers_that_are_alike_are_proved_once(monkeypatch):
    proved, prove = [], dropin_proof._prove
    monkeypatch.setattr(dropin_proof, "_prove", lambda *args: (proved.append(args[1].name), prove(*args))[1])
    layers = nn.ModuleList([Layer(32, 4, 64) for _ in range(3)])
    layers[1].norm1.weight.data.zero_()
    assert len(patch(layers).replaced) == 3 and len(proved) == 1


def other_eps(layer: nn.Module) -> None:
    layer.ffn[3].eps = 1e-3


def tied(layer: nn.Module) -> None:
    layer.norm2.weight = layer.norm1.weight


# Changes after which the proof of the layer before must not answer for this one.
UNLIKE = {
    "a forward of its own": NormlessLayer(32, 4, 64),
    "another width": Layer(48, 4, 64),
    "a setting of a child": layer_with(other_eps),
    "another child": layer_with(set_child("dropout2", nn.AlphaDropout(0.1))),
    "a tied weight": layer_with(tied),
    "a setting": with_change(Layer(32, 4, 64), lambda m: setattr(m, "number", 2)),
    "an object": with_change(Layer(32, 4, 64), lambda m: setattr(m, "thing", [])),
    "a replaced forward": layer_with(replace_forward),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_layer_that_differs_in_anything_gets_a_proof_of_its_own(name, monkeypatch):
    proved, prove = [], dropin_proof._prove
    monkeypatch.setattr(dropin_proof, "_prove", lambda *args: (proved.append(args[0]), prove(*args))[1])
    patch(nn.ModuleList([Layer(32, 4, 64), UNLIKE[name]]))
    assert any(module is UNLIKE[name] for module in proved)


def test_hook_on_one_of_the_layers_that_are_alike_leaves_that_one_alone():
    layers = nn.ModuleList([Layer(32, 4, 64) for _ in range(2)])
    layers[1].norm3.register_forward_hook(doubled)
    report = patch(layers)
    assert [path for path, _ in report.replaced] == ["0"] and "its norm3 has hooks" in report.left_alone[0][1]


def test_proof_does_not_seed_the_generators_of_gpus(monkeypatch):
    seeds: list = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    assert len(patch(MaskHead(48, 16)).replaced) == 1 and not seeds
