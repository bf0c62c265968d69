"""Recomputation in MagNet changes what is kept for the backward pass, and no number."""

from __future__ import annotations

import copy

import pytest
import torch
from test_magnet import batch, small
from torch import Tensor

from fastris import MagNet
from fastris.nn import recompute

pytest.importorskip("transformers", reason="MagNet's text encoder is BERT: pip install 'fastris[magnet]'")

RECOMPUTING = recompute.RECOMPUTE_SETTINGS[1:]
SIZE = (72, 56)  # windows of 4 patches pad both sides, and shift


def prepared(setting: str, dtype: torch.dtype = torch.float32) -> MagNet:
    return small(drop_path=0.4, window=4, pixel_layers=2).to(dtype).train().set_recompute(setting)


def one_step(model: MagNet, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_has_the_bits_of_one_that_keeps_everything(setting, dtype):
    expected = one_step(prepared("none", dtype), dtype)
    assert_same_bits(one_step(prepared(setting, dtype), dtype), expected)


@pytest.mark.parametrize("setting", RECOMPUTING)
def test_step_under_autocast_has_the_same_bits(setting):
    with torch.autocast("cpu", torch.bfloat16):
        expected = one_step(prepared("none"))
        assert_same_bits(one_step(prepared(setting)), expected)


@pytest.mark.parametrize("setting", RECOMPUTING)
def test_every_part_is_computed_again_once(setting):
    model, runs = prepared(setting), []
    stages = model.image_model.layers
    parts = {
        "BERT": list(model.language_model.encoder.layer),
        "blocks": [block for stage in stages for block in stage.blocks],
        "exchanges": [stage.fusion for stage in stages],
        "words": list(model.language_model.pwams[:-1]),
        "pixel layers": list(model.classifier.pixel_decoder.transformer.encoder.layers),
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
    assert copy.deepcopy(model).language_model.recompute == "stages"


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
