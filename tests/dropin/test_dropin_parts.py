"""The drop-in finds CRIS's parts in the shapes that its descendants gave them, and leaves their near misses alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import strangers_decoders as decoders
import strangers_more as more
import torch
from torch import nn

from fastris.dropin.patch import patch, unpatch

DIFFER = "values or gradients differ"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gate_inputs(keys: int = 1, first: bool = False) -> tuple:
    pixels, memory = normal(15, 3, 16, seed=1), normal(keys, 3, 16, seed=2)
    return (pixels.transpose(0, 1), memory.transpose(0, 1)) if first else (pixels, memory)


def neck_inputs(scales: tuple = (4, 2, 1)) -> tuple:
    sizes = [(channels, 2 * scale, 3 * scale) for channels, scale in zip((24, 32, 40), scales, strict=True)]
    return [normal(3, *size, seed=i) for i, size in enumerate(sizes)], normal(3, 40, seed=4)


def head_inputs() -> tuple:
    return normal(3, 32, 3, 4, seed=5), normal(3, 48, seed=6)


def layer_inputs(mask: bool = True) -> tuple:
    inputs = normal(8, 2, 32), normal(3, 2, 32, seed=1), normal(8, 1, 32, seed=2), normal(3, 1, 32, seed=3)
    return (*inputs, torch.tensor([[False, False, True], [False] * 3])) if mask else inputs


def decoder_inputs(mask: bool = True) -> tuple:
    inputs = normal(2, 32, 3, 4), normal(2, 5, 32, seed=1)
    return (*inputs, torch.tensor([[False] * 3 + [True] * 2, [False] * 5])) if mask else inputs


# name -> (module, inputs, modules replaced, of the scale: the decoders' position tables are float32)
FOUND = {
    "gate": (more.SentenceGate(16, 4), gate_inputs(), 1),
    "gate without biases": (more.SentenceGate(16, 4, bias=False), gate_inputs(), 1),
    "gate, batch first": (more.SentenceGate(16, 4, batch_first=True), gate_inputs(first=True), 1),
    "added sentence": (more.AddedSentence(16, 4), gate_inputs(), 1),
    "alignment": (more.Alignment(), neck_inputs(), 3),
    "alignment of maps of one size": (more.EvenAlignment(), neck_inputs((2, 2, 2)), 3),
    "alignment with a way around": (more.ResidualAlignment(), neck_inputs(), 3),
    "a bias for each of five maps": (more.TaskHead(), head_inputs(), 1),
    "a bias for each of six maps": (more.TaskHead(maps=6), head_inputs(), 1),
    "maps in another order": (more.ShuffledTaskHead(), head_inputs(), 1),
    "maps in one tensor": (more.StackedTaskHead(maps=2), head_inputs(), 1),
    "maps in a list": (more.ListedTaskHead(maps=3), head_inputs(), 1),
    "three maps that three 1x1 kernels could be": (more.TaskHead(maps=3), head_inputs(), 1),
    "five maps that five 1x1 kernels could be": (more.StackedTaskHead(size=5), head_inputs(), 1),
    "1x1 kernel, padding 1": (more.PaddedHead(), head_inputs(), 1),
    "1x1 kernel, padding 2": (more.PaddedHead(padding=2), head_inputs(), 1),
    "3x3 kernel, no padding": (more.PaddedHead(size=3, padding=0), head_inputs(), 1),
    "3x3 kernel, its numbers unnamed": (more.PaddedHead(size=3, padding=1), head_inputs(), 1),
    "another width named": (more.HalvedHead(), head_inputs(), 1),
    "5x5 kernel, padding 1": (more.PaddedHead(size=5, padding=1), head_inputs(), 1),
    "projector under other names": (more.OtherNamesHead(), head_inputs(), 1),
    "projector under other names, nested": (more.OtherNamesInALine(), head_inputs(), 1),
    "layer under other names": (decoders.OtherNamesLayer(32, 4, 64), layer_inputs(), 1),
    "layer without a mask": (decoders.OpenLayer(32, 4, 64), layer_inputs(mask=False), 1),
    "layer with weights, no mask": (decoders.OpenWeightsLayer(32, 4, 64), layer_inputs(mask=False), 1),
    "decoder, no switch": (decoders.OtherDecoder(), decoder_inputs(), 3),
    "decoder and an empty list": (decoders.NothingBesidesDecoder(), decoder_inputs(), 3),
    "decoder and every layer's": (decoders.AllBesidesDecoder(), decoder_inputs(), 3),
    "decoder and the weights": (decoders.WeightsBesidesDecoder(), decoder_inputs(), 3),
    "decoder without a mask": (decoders.OpenDecoder(), decoder_inputs(mask=False), 3),
    "decoder that ignores the mask": (decoders.DeafDecoder(), decoder_inputs(), 3),
    "decoder of layers under other names": (decoders.OtherNamesDecoder(), decoder_inputs(), 3),
}


def without_dropout(module: nn.Module) -> nn.Module:
    """A copy in float64, in training."""
    module = copy.deepcopy(module).double().train()
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        elif isinstance(child, nn.MultiheadAttention):
            child.dropout = 0.0
    return module


def tensors(answer) -> list[torch.Tensor]:
    if isinstance(answer, torch.Tensor):
        return [answer]
    return [tensor for one in answer for tensor in tensors(one)]


def leaf(value):
    if isinstance(value, list):
        return [leaf(one) for one in value]
    return value.clone().requires_grad_() if value.is_floating_point() else value


def trace(module: nn.Module, inputs: tuple) -> list[torch.Tensor]:
    """Outputs, gradients of inputs and parameters, and statistics of one training step."""
    module.zero_grad()
    given = [leaf(value) for value in inputs]
    outputs = tensors(module(*given))
    sum((one * normal(*one.shape, seed=9)).sum() for one in outputs).backward()
    sources = [one for one in tensors(given) if one.requires_grad]
    gradients = [one.grad for one in (*sources, *module.parameters())]
    return [*(one.detach() for one in outputs), *gradients, *(b.clone() for b in module.buffers())]


def assert_close(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            scale = other.double().abs().max().clamp_min(1.0)
            assert one.shape == other.shape and (one.double() - other.double()).abs().max() <= 1e-10 * scale


@pytest.mark.parametrize("name", FOUND)
def test_descendant_is_replaced_and_trains_three_steps_like_the_original(name):
    module, inputs, count = FOUND[name]
    module = without_dropout(module)
    twin = copy.deepcopy(module)
    report = patch(twin)
    assert len(report.replaced) == count, report
    assert_close(trace(twin, inputs), trace(module, inputs))
    for one in (module, twin):
        # eps above rounding noise: the keys' biases have no gradient but that, and Adam would step along it
        optimizer = torch.optim.Adam(one.parameters(), lr=1e-3, eps=1e-3)
        for _ in range(3):
            trace(one, inputs)
            optimizer.step()
    assert_close(list(twin.state_dict().values()), list(module.state_dict().values()))
    with torch.no_grad():
        assert_close(tensors(twin.eval()(*inputs)), tensors(module.eval()(*inputs)))


# name -> (module, part of the reason)
LEFT_ALONE = {
    "squashed gate": (more.SoftGate(16, 4), DIFFER),
    "gate that is open at first": (more.OpenGate(16, 4), DIFFER),
    "centred gate": (more.CentredGate(16, 4), DIFFER),
    "gate with a dropout of its own": (more.NoisyGate(16, 4), "draws random numbers of its own"),
    "gate with two keys": (more.LookingBackGate(16, 4), DIFFER),
    "gate with a zero key": (more.SentenceGate(16, 4, add_zero_attn=True), "adds keys of its own"),
    "gate with a learned key": (more.SentenceGate(16, 4, add_bias_kv=True), "adds keys of its own"),
    "gate with keys of another width": (more.SentenceGate(16, 4, kdim=8, vdim=8), "of another width"),
    "one map is a probability": (more.SquashedTaskHead(), DIFFER),
    "one map sees another": (more.LinkedTaskHead(), DIFFER),
    "one map is scaled": (more.TurnedTaskHead(), DIFFER),
    "samples mixed": (more.MixedBatchHead(maps=2), DIFFER),
    "ones around": (more.OnesAroundHead(), DIFFER),
    "strided text kernel": (more.PaddedHead(size=3, stride=2), "does not give kernels and a bias"),
    "too much padding": (more.PaddedHead(size=3, padding=2), "does not give kernels and a bias"),
    "layer without a mask for half the words": (decoders.FirstWordLayer(32, 4, 64), DIFFER),
    "decoder that scales what it gives besides": (decoders.RawBesidesDecoder(), "returns a tuple of 2"),
    "decoder of sums": (decoders.SummedDecoder(), DIFFER),
    "decoder with a norm too many": (decoders.TwiceNormedDecoder(), DIFFER),
    "layer under other names without word positions": (decoders.PlacelessWordsLayer(32, 4, 64), DIFFER),
    "layer under other names, GELU": (decoders.SmoothOtherNamesLayer(32, 4, 64), DIFFER),
    "projector under other names, nearest": (more.NearestHead(), DIFFER),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_near_miss_of_a_descendant_is_left_alone_with_its_reason(name):
    module, reason = LEFT_ALONE[name]
    report = patch(module)
    own = [why for path, why in report.left_alone if not path]
    assert "" not in dict(report.replaced) and len(own) == 1, report
    assert reason in own[0]
    assert "forward" not in module.__dict__


class AveragedGate(more.SentenceGate):
    """The same while every query finds the same; with dropout on the weights it finds the average."""

    def join(self, pixels, found):
        return pixels * found.mean(0)


@pytest.mark.parametrize("kind", [more.SentenceGate, AveragedGate])
def test_gate_with_dropout_on_its_one_weight_draws_as_the_original_does(kind):
    gate = kind(16, 4, dropout=0.5).double()
    twin = copy.deepcopy(gate)
    assert len(patch(gate).replaced) == 1
    answers = []
    for one in (gate, twin):
        torch.manual_seed(3)
        answers.append(one(*gate_inputs()))
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], gate.eval()(*gate_inputs()))


# Calls of a gate that have more than one key or something to say about it: (arguments, keywords).
GATE_CALLS = {
    "many keys": (gate_inputs(keys=4), {}),
    "padding": (gate_inputs(), {"padding": torch.tensor([[False], [True], [False]])}),
    "positions of the keys": (gate_inputs(), {"memory_pos": normal(1, 1, 16)}),
    "no batch": (tuple(x[:, 0] for x in gate_inputs()), {}),
}


@pytest.mark.parametrize("name", GATE_CALLS)
def test_other_call_of_a_gate_works_as_on_the_original(name):
    arguments, keywords = GATE_CALLS[name]
    gate = more.SentenceGate(16, 4).double()
    expected = gate(*arguments, **keywords)
    assert len(patch(gate).replaced) == 1
    assert torch.equal(gate(*arguments, **keywords).nan_to_num(9.0), expected.nan_to_num(9.0))


def test_unused_weights_of_a_gate_keep_their_zero_gradient():
    gate = more.SentenceGate(16, 4).double()
    patch(gate)
    gate(*gate_inputs()).sum().backward()
    assert all(p.grad is not None for p in gate.parameters())
    assert torch.equal(gate.look.in_proj_weight.grad[:32], torch.zeros(32, 16, dtype=torch.float64))


RENAMED = {
    "projector": (more.OtherNamesHead(), head_inputs(), lambda m: m.final),
    "layer": (decoders.OtherNamesLayer(32, 4, 64, dropout=0.0), layer_inputs(), lambda m: m.before["words"]),
    "gate": (more.SentenceGate(16, 4), gate_inputs(), lambda m: m.look),
}


def doubled(module, inputs, output):
    return tuple(2 * o for o in output) if isinstance(output, tuple) else 2 * output


@pytest.mark.parametrize("name", RENAMED)
def test_hook_on_a_layer_under_another_name_still_counts(name):
    module, inputs, child = RENAMED[name]
    module = copy.deepcopy(module).double().eval()
    twin = copy.deepcopy(module)
    assert len(patch(twin).replaced) == 1
    plain = module(*inputs)
    for one in (module, twin):
        child(one).register_forward_hook(doubled)
    if name == "gate":  # its attention returns a tuple with None or weights
        assert not torch.equal(twin(*inputs), plain)
    assert_close([twin(*inputs)], [module(*inputs)])


@pytest.mark.parametrize("name", RENAMED)
def test_copy_of_a_patched_descendant_has_parameters_of_its_own(name):
    module, inputs, _ = RENAMED[name]
    module = copy.deepcopy(module).double().eval()
    patch(module)
    plain = module(*inputs)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    expected = twin(*inputs)
    assert torch.equal(module(*inputs), plain)
    assert unpatch(twin) == 1
    assert_close([twin(*inputs)], [expected])
    assert unpatch(pickle.loads(pickle.dumps(module))) == 0


RENAMED_FOUND = ("projector under other names, nested", "layer under other names", "decoder and every layer's")
AUTOCAST = ("gate", "alignment", "a bias for each of five maps", "1x1 kernel, padding 1", "3x3 kernel, no padding")


@pytest.mark.parametrize("name", [*AUTOCAST, "projector under other names", "layer without a mask"])
def test_autocast_gives_a_descendant_the_dtypes_of_the_original(name):
    module, inputs, _ = FOUND[name]
    module = copy.deepcopy(module).float().eval()
    given = [[one.float() for one in value] if isinstance(value, list) else value.float() for value in inputs]

    def run() -> list[torch.Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return tensors(module(*given))

    expected = run()
    patch(module)
    for got, want in zip(run(), expected, strict=True):
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["alignment", "maps in another order", *RENAMED_FOUND])
def test_patched_descendant_compiles_without_graph_breaks(name):
    module, inputs, _ = FOUND[name]
    module = without_dropout(module).eval()
    patch(module)
    expected = tensors(module(*inputs))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, want in zip(tensors(compiled(*inputs)), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "stack",
    [
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2, nn.LayerNorm(32), enable_nested_tensor=False),
        nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64), 2, nn.LayerNorm(32)),
        nn.ModuleDict({"vis": nn.Conv2d(3, 8, 3), "txt": nn.Linear(8, 8)}),
        nn.MultiheadAttention(32, 4),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)),
    ],
)
def test_ordinary_module_is_neither_replaced_nor_mentioned(stack):
    report = patch(stack)
    assert not report.replaced and not report.left_alone


@pytest.mark.parametrize("part", [more.OtherNamesHead(), more.SentenceGate(16, 4)])
def test_wrapper_around_a_part_is_not_taken_for_one(part):
    report = patch(more.Wrapper(copy.deepcopy(part)))
    assert [path for path, _ in report.replaced] == ["part"] and not report.left_alone
