"""Recomputation in AlignFormer changes what is kept for the backward pass, and no number."""

from __future__ import annotations

import copy

import pytest
import torch
from test_alignformer import batch, small
from torch import Tensor

from fastris import AlignFormer, use_impl
from fastris.nn import recompute

pytest.importorskip("transformers", reason="AlignFormer's text encoder is BERT: pip install 'fastris[alignformer]'")

RECOMPUTING = recompute.RECOMPUTE_SETTINGS[1:]
SIZE = (72, 56)  # windows of 4 patches pad both sides, and shift


def prepared(setting: str, dtype: torch.dtype = torch.float32) -> AlignFormer:
    model = small(drop_path=0.4, window=4).to(dtype).train().set_recompute(setting)
    model.instance_contrast = 0.1
    return model


def one_step(model: AlignFormer, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Loss and gradients of a step, whose backward pass finds the generator in another state than the forward's."""
    images, tokens, masks = batch(SIZE)
    torch.manual_seed(5)
    loss = model(images.to(dtype), tokens, masks.to(dtype))[2]
    torch.manual_seed(9)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(actual[name], value)]


@pytest.mark.parametrize("setting", RECOMPUTING)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_has_the_bits_of_one_that_keeps_everything(setting, impl, dtype):
    with use_impl(impl):
        expected = one_step(prepared("none", dtype), dtype)
        assert_same_bits(one_step(prepared(setting, dtype), dtype), expected)


@pytest.mark.parametrize("setting", RECOMPUTING)
def test_step_under_autocast_has_the_same_bits(setting):
    with torch.autocast("cpu", torch.bfloat16):
        expected = one_step(prepared("none"))
        assert_same_bits(one_step(prepared(setting)), expected)


def test_paths_left_out_differ_from_step_to_step_so_that_the_masks_are_at_stake():
    model, (images, tokens, masks) = prepared("none"), batch(SIZE)
    assert len({model(images, tokens, masks)[2].item() for _ in range(4)}) > 1


@pytest.mark.parametrize("setting", RECOMPUTING)
def test_every_part_is_computed_again_once(setting):
    model, runs = prepared(setting), []
    encoder = model.classifier.pix_dec.transformer.encoder
    parts = {
        "BERT": [model.text_encoder.encoder],
        "blocks": [block for stage in model.backbone.layers for block in stage.blocks],
        "exchanges": [stage.fusion for stage in model.backbone.layers],
        "pixel layers": list(encoder.layers),
    }
    for name, modules in parts.items():
        for module in modules:
            module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    one_step(model)
    again = {name: runs.count(name) / len(modules) for name, modules in parts.items()}
    assert again == dict.fromkeys(parts, 2.0)


def test_unknown_setting_lists_the_valid_ones_and_copies_keep_theirs():
    with pytest.raises(ValueError, match="recompute must be one of none, pointwise, stages, got 'all'"):
        small().set_recompute("all")
    model = prepared("stages")
    assert copy.deepcopy(model).backbone.recompute == "stages"
    assert model.state_dict().keys() == prepared("none").state_dict().keys()


def test_eval_mode_takes_no_detour(monkeypatch):
    monkeypatch.setattr(recompute, "checkpoint", None)
    model, (images, tokens, _) = prepared("stages").eval(), batch(SIZE)
    assert model.segment(model.encode_image(images), tokens).requires_grad


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("setting", recompute.RECOMPUTE_SETTINGS)
def test_compiled_equals_eager(setting):
    images, tokens, masks = batch(SIZE)

    def step(compiled: bool) -> dict[str, Tensor]:
        model = small().double().train().set_recompute(setting if compiled else "none")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # compiled, it draws other numbers
        run = torch.compile(model, backend="aot_eager") if compiled else model
        loss = run(images.double(), tokens, masks.double())[2]
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    actual, expected = step(True), step(False)
    assert actual.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= 1e-10 * largest, name
