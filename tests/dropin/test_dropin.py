"""The drop-in: what it finds in somebody else's model, what it leaves alone, and what stays as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from strangers import (
    CrossModalDecoder,
    Fusion,
    Layer,
    MaskHead,
    NormalisedHead,
    NormlessDecoder,
    QueryHead,
    Stranger,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastris
from fastris.dropin.patch import patch, unpatch
from fastris.models import cris


def make_inputs(batch: int = 3, height: int = 4, width: int = 6, words: int = 9, seed: int = 2):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    sizes = zip((32, 64, 48), (4, 2, 1), strict=True)
    imgs = [normal(batch, channels, scale * height, scale * width) for channels, scale in sizes]
    padding = torch.zeros(batch, words, dtype=torch.bool)
    padding[0, (words + 1) // 2 :] = padding[1, max(1, words - 1) :] = True
    return imgs, normal(batch, words, 32), normal(batch, 48), padding


def step(model: nn.Module, inputs: tuple | None = None) -> dict[str, torch.Tensor]:
    """Output, every gradient and every BatchNorm statistic of one training step, in float64 without dropout."""
    model = copy.deepcopy(model).double().train()
    for child in model.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        elif isinstance(child, nn.MultiheadAttention):
            child.dropout = 0.0
    return trace(model, inputs or make_inputs())


def in_float64(value):
    if isinstance(value, list):
        return [in_float64(one) for one in value]
    return value.double() if value.is_floating_point() else value


def trace(model: nn.Module, inputs: tuple) -> dict[str, torch.Tensor]:
    output = model(*map(in_float64, inputs))
    outputs = output if isinstance(output, tuple) else (output,)
    generator = torch.Generator().manual_seed(3)
    sum((o.view(-1) * torch.randn(o.numel(), generator=generator)).sum() for o in outputs).backward()
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    results |= {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return results | {n.removeprefix("module."): buffer for n, buffer in model.named_buffers()}


def assert_same_step(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        scale = value.double().abs().max()
        assert (value.double() - second[name].double()).abs().max() <= 1e-10 * scale, name


HEADS = {
    "published": MaskHead(48, 16),
    "1x1 text kernel": MaskHead(48, 16, kernel_size=1),
    "5x5 text kernel": MaskHead(48, 16, kernel_size=5),
    "five maps": MaskHead(48, 16, maps=5),
    "narrow first convolution": MaskHead(48, 32, narrow=True),
    "narrow, two maps": MaskHead(48, 32, narrow=True, maps=2),
    "two text kernels": QueryHead(48, 16),
    "three 1x1 text kernels": QueryHead(48, 16, kernel_size=1, queries=3),
    "one text kernel of many": QueryHead(48, 16, queries=1),
}


def test_every_part_of_a_renamed_model_is_replaced_and_computes_the_same():
    torch.manual_seed(0)
    model = Stranger()
    expected = step(model)
    report = patch(model)
    assert sorted(path for path, _ in report.replaced) == [
        "fusion", "head", "reader", "reader.layers.0", "reader.layers.1",
    ]  # fmt: skip
    assert not report.left_alone
    assert_same_step(expected, step(model))


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_model_is_patched_where_no_gradients_are_kept(without_gradients):
    model = Stranger()
    with without_gradients():
        report = patch(model)
    assert len(report.replaced) == 5 and not report.left_alone
    step(model)


@pytest.mark.parametrize("name", HEADS)
def test_every_kind_of_head_is_replaced_and_computes_the_same(name):
    head = copy.deepcopy(HEADS[name])
    inputs = torch.randn(3, 32, 4, 6), torch.randn(3, 48)
    expected = step(head, inputs)
    report = patch(head)
    assert [path for path, _ in report.replaced] == [""] and not report.left_alone
    assert_same_step(expected, step(head, inputs))


@pytest.mark.parametrize(("height", "width", "words"), [(4, 4, 77), (1, 1, 1), (2, 5, 17)])
def test_any_map_and_sentence_length_computes_the_same(height, width, words):
    torch.manual_seed(0)
    model = Stranger(hidden=32)
    inputs = make_inputs(height=height, width=width, words=words)
    expected = step(model, inputs)
    patch(model)
    assert_same_step(expected, step(model, inputs))


def test_training_side_by_side_stays_together():
    torch.manual_seed(0)
    model = Stranger(dropout=0.0).double().train()
    twin = copy.deepcopy(model)
    patch(twin)
    losses: tuple[list[float], list[float]] = ([], [])
    for one, record in zip((model, twin), losses, strict=True):
        optimizer = torch.optim.Adam(one.parameters(), lr=1e-3)
        for number in range(5):
            imgs, words, state, padding = make_inputs(seed=number)
            logits = one([x.double() for x in imgs], words.double(), state.double(), padding)
            loss = logits.sigmoid().sub(0.5).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            record.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("head", ["published", "five maps", "two text kernels"])
def test_autocast_gives_the_dtypes_of_the_original(head):
    model = Stranger().eval()
    model.head = HEADS[head].eval()
    inputs = make_inputs()

    def run() -> list[torch.Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            fused = model.fusion(inputs[0], inputs[2])
            read = model.reader(fused, inputs[1], inputs[3])
            answer = model.head(read.reshape(fused.shape), inputs[2])
        return [fused, read, *(answer if isinstance(answer, tuple) else (answer,))]

    expected = run()
    patch(model)
    for got, want in zip(run(), expected, strict=True):
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


def test_report_says_in_three_lines_what_was_replaced_and_what_was_left_alone():
    odd = [NormalisedHead(48, 16), NormalisedHead(48, 16)]
    model = nn.ModuleDict({"good": MaskHead(48, 16), "odd": nn.ModuleList(odd)})
    assert str(patch(model)).splitlines() == [
        "fastris replaced the forward of 1 module",
        "  replaced: good (Projector)",
        "  left alone: odd.0, odd.1: Projector-like, but in eval mode its values or gradients differ from CRIS's",
    ]


def test_report_says_that_what_it_does_not_name_runs_as_before():
    text = str(patch(nn.ModuleDict({"backbone": nn.Conv2d(3, 8, 3), "head": MaskHead(48, 16)})))
    assert "replaced: head (Projector)" in text and text.endswith("encoders, loss and the rest run as before")


def test_decoder_around_strange_layers_is_replaced_without_touching_the_layers():
    model = NormlessDecoder(2, 32, 4, 64, dropout=0.0).eval()
    inputs = torch.randn(2, 32, 3, 5), torch.randn(2, 6, 32), torch.zeros(2, 6, dtype=torch.bool)
    expected = model(*inputs)
    report = patch(model)
    assert [path for path, _ in report.left_alone] == ["layers.0", "layers.1"]
    torch.testing.assert_close(model(*inputs), expected)


def test_list_of_intermediate_maps_is_kept():
    model = CrossModalDecoder(2, 32, 4, 64, dropout=0.0, lists=True).eval()
    inputs = torch.randn(2, 32, 3, 5), torch.randn(2, 6, 32), torch.zeros(2, 6, dtype=torch.bool)
    expected = model(*inputs)
    assert len(patch(model).replaced) == 3
    for got, want in zip(model(*inputs), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_parameters_names_state_and_optimizer_references_stay():
    model = Stranger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    keys = list(model.state_dict())
    patch(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert list(model.state_dict()) == keys
    before = model.head.txt.weight.clone()
    model(*make_inputs()).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.txt.weight)


def test_hooks_still_fire_with_the_published_outputs():
    model, seen = Stranger().eval(), []
    model.reader.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs)))
    patch(model)
    assert not seen, "the proof must not run a user's hooks"
    model(*make_inputs())
    assert seen == [(3, 32, 96), 2]


def test_patching_touches_these_instances_only_and_unpatching_restores_them():
    model, other = Stranger().eval(), Stranger().eval()
    inputs, original = make_inputs(), Layer.forward
    expected = model(*inputs)
    patch(model)
    assert Layer.forward is original and not any("forward" in m.__dict__ for m in other.modules())
    assert unpatch(model) == 5
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(model(*inputs), expected)
    assert unpatch(model) == 0


def test_patching_twice_changes_nothing_more():
    model = Stranger()
    patch(model)
    again = patch(model)
    assert not again.replaced and all(why == "already patched" for _, why in again.left_alone)


def test_proof_leaves_random_state_statistics_and_mode_alone():
    model = Stranger().train()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.random.get_rng_state()
    patch(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())


def test_deep_copy_is_patched_and_a_pickle_is_not():
    model = Stranger().eval()
    patch(model)
    inputs = make_inputs()
    twin = copy.deepcopy(model)
    assert twin.head.__dict__["forward"].__self__ is twin.head
    revived = pickle.loads(pickle.dumps(model))
    assert unpatch(revived) == 0
    assert revived.head.forward.__func__ is MaskHead.forward
    torch.testing.assert_close(revived(*inputs), model(*inputs), rtol=0, atol=1e-5)
    assert len(patch(revived).replaced) == 5, "an unpickled model can be patched again"


def test_patch_reaches_through_ddp_and_leaves_no_parameter_unused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = Stranger(dropout=0.0).double().train()
        expected = step(model)
        wrapped = DistributedDataParallel(model)
        assert len(patch(wrapped).replaced) == 5
        assert_same_step(expected, trace(wrapped, make_inputs()))
    finally:
        dist.destroy_process_group()


def test_sync_batchnorm_is_accepted():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Stranger())
    assert len(patch(model).replaced) == 5


def test_parts_built_from_fastris_are_left_as_they_are():
    model = nn.ModuleList([cris.Projector(48, 16), cris.FPN((32, 64, 48), (16, 32, 48)), Fusion()])
    report = patch(model)
    assert report.replaced == [("2", "FPN")]
    assert report.left_alone == [("0", "already fastris"), ("1", "already fastris")]


@pytest.mark.parametrize("model", [None, Stranger, {"model": 1}])
def test_what_is_no_module_is_refused_by_name(model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        patch(model)


@pytest.mark.slow
def test_patched_model_compiles_without_graph_breaks():
    model = Stranger().eval()
    inputs = make_inputs()
    expected = model(*inputs)
    patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected, rtol=0, atol=1e-5)
    assert len(patch(compiled).left_alone) == 5, "patching a compiled model finds the parts once"


@pytest.mark.slow
def test_compiled_model_runs_hooks_on_layers_that_patching_bypasses():
    model, inputs = Stranger().eval(), make_inputs()
    twin = copy.deepcopy(model)
    patch(model)
    for one in (model, twin):
        one.head.vis[4].register_forward_hook(lambda module, inputs, output: 2 * output)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), twin(*inputs), rtol=0, atol=1e-5)


def test_public_name_stays_a_function_after_its_module_was_imported():
    assert fastris.patch is patch and fastris.unpatch is unpatch


def renamed(module: nn.Module, old: str, new: str) -> nn.Module:
    setattr(module, new, getattr(module, old))
    delattr(module, old)
    return module


class HA(Fusion):
    """A neck of another house: one level is joined elsewhere."""

    def __init__(self):
        super().__init__()
        del self.f3_cat


NEAR = {
    "neck without a level": (HA(), "FPN-like, not supported: HA lacks `f3_cat`"),
    "neck with a renamed block": (
        renamed(Fusion(), "aggr", "aggregate"),
        "FPN-like, not supported: Fusion lacks `aggr`",
    ),
    "layer with one dropout less": (
        renamed(Layer(32, 4, 64), "dropout3", "drop"),
        "TransformerDecoderLayer-like, not supported: Layer lacks `dropout3`",
    ),
    "layer without its cross norm": (renamed(Layer(32, 4, 64), "cross_attn_norm", "post"), "lacks `cross_attn_norm`"),
    "decoder that never returns lists": (
        renamed(CrossModalDecoder(1, 32, 4, 64), "return_intermediate", "lists"),
        "TransformerDecoder-like, not supported: CrossModalDecoder lacks `return_intermediate`",
    ),
    "projector without its kernel size": (
        renamed(MaskHead(48, 16), "kernel_size", "k"),
        "Projector-like, not supported: MaskHead lacks `kernel_size`",
    ),
    "projector with other names": (
        renamed(renamed(MaskHead(48, 16), "vis", "pixels"), "txt", "words"),
        "lacks `vis`, `txt`",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_module_that_lacks_one_attribute_is_named_with_what_it_lacks(name):
    module, reason = NEAR[name]
    (row,) = [row for row in patch(nn.ModuleDict({"odd": module})).left_alone if row[0] == "odd"]
    assert reason in row[1]


def test_near_misses_of_one_kind_are_one_entry_of_the_report():
    text = str(patch(nn.ModuleList([HA(), HA()])))
    assert text.splitlines()[-1] == "  left alone: 0, 1: FPN-like, not supported: HA lacks `f3_cat`"


def ordinary_models() -> dict[str, nn.Module]:
    from open_clip.model import CLIP
    from torchvision.models import resnet18
    from torchvision.models.segmentation import fcn_resnet50

    vision = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8, "patch_size": None}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2}
    upsampling = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3), nn.Upsample(scale_factor=2))
    return {
        "resnet": resnet18(),
        "segmentation": fcn_resnet50(weights=None, weights_backbone=None),
        "transformer": nn.Transformer(16, 2, 1, 1, 32),
        "clip": CLIP(16, vision, text),
        "upsampling": nn.Sequential(upsampling, nn.Linear(4, 4), nn.MultiheadAttention(4, 2)),
    }


def test_ordinary_models_give_no_near_misses():
    for name, model in ordinary_models().items():
        report = patch(model)
        assert not report.replaced and not report.left_alone, name


def test_model_of_fastris_is_said_to_be_one_and_stays_as_it_is():
    model = fastris.CRIS(fastris.CRISConfig.preset("tiny"))
    assert str(patch(model)).splitlines()[1:] == ["  replaced: nothing", "  left alone: the model: already fastris"]
    report = patch(nn.ModuleDict({"mine": model, "head": MaskHead(48, 16), "neck": model.neck}))
    assert report.replaced == [("head", "Projector")] and report.left_alone == [("mine", "already fastris")]
    assert patch(model.proj).left_alone == [("", "already fastris")]
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_class_derived_from_ours_with_a_forward_of_its_own_is_proved():
    class Doubled(cris.Projector):
        def forward(self, x, word):
            return 2 * super().forward(x, word)

    assert "values or gradients differ" in patch(Doubled(48, 16)).left_alone[0][1]
