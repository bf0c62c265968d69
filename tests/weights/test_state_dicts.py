"""Names and shapes: whose weights these are, what about them does not fit, which configuration they tell."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from weight_samples import CONFIG, randomised, same_state, small_clip

from fastris import CRIS, CRISConfig
from fastris.models.cris.keys import CONNECT, architecture, infer_config
from fastris.models.state_dicts import WeightsError, compare
from fastris.weights.load import load_clip, load_model, load_weights

SHAPES = json.loads((Path(__file__).parents[1] / "golden" / "state_dict_shapes.json").read_text())


@pytest.fixture
def model() -> CRIS:
    return randomised(CRIS(CONFIG)).eval()


@pytest.mark.parametrize("name", ["cris_r50", "cris_r101"])
def test_published_state_dict_fits_the_preset_and_tells_its_configuration(name):
    state = {key: torch.empty(shape, device="meta") for key, shape in SHAPES[name]["state_dict"].items()}
    with torch.device("meta"):
        model = CRIS(CRISConfig.preset(name))
    report = compare(state, model.state_dict(), "published")
    assert report.fits and report.loaded == len(state) == len(model.state_dict())
    assert infer_config(state) == CRISConfig.preset(name)
    assert architecture(state) == {"cris_r50": "RN50", "cris_r101": "RN101"}[name]


@pytest.mark.parametrize("wrapped", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}"])
def test_prefixes_of_ddp_and_compile_are_seen_through(model, wrapped):
    fresh = CRIS(CONFIG)
    assert load_weights(fresh, {wrapped.format(k): v for k, v in model.state_dict().items()}).fits
    assert same_state(fresh, model)


def test_compiled_parts_inside_a_model_are_seen_through_on_both_sides(model):
    fresh = CRIS(CONFIG)
    fresh.decoder = torch.compile(fresh.decoder)
    assert load_weights(fresh, model.state_dict()).fits
    back = CRIS(CONFIG)
    assert load_weights(back, fresh.state_dict()).fits and same_state(back, model)


def test_one_name_with_and_without_prefix_is_refused(model):
    state = model.state_dict()
    state["module.decoder.norm.bias"] = state["decoder.norm.bias"]
    with pytest.raises(ValueError, match=r"decoder\.norm\.bias twice"):
        load_weights(CRIS(CONFIG), state)


def test_what_does_not_fit_is_listed_by_name_with_both_shapes_and_nothing_is_copied(model):
    state = model.state_dict()
    del state["neck.aggr.0.weight"]
    state["neck.extra.weight"] = torch.zeros(3)
    state["proj.txt.bias"] = torch.zeros(7)
    fresh = CRIS(CONFIG)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(fresh, state)
    message, report = str(caught.value), caught.value.report
    assert "missing (1): neck.aggr.0.weight" in message and report.missing == ("neck.aggr.0.weight",)
    assert "unexpected (1): neck.extra.weight" in message and report.unexpected == ("neck.extra.weight",)
    assert "proj.txt.bias is (7,), the model's is (145,)" in message
    assert report.reshaped == (("proj.txt.bias", (7,), (145,)),)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())

    lenient = load_weights(fresh, state, strict=False)
    assert (lenient.missing, lenient.loaded) == (report.missing, len(before) - 2) and not lenient.fits
    assert torch.equal(fresh.state_dict()["decoder.norm.bias"], state["decoder.norm.bias"])
    assert "1 missing: neck.aggr.0.weight" in str(lenient)


def test_long_lists_of_names_are_cut_in_the_message_and_whole_in_the_report(model):
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("backbone.")}
    with pytest.raises(WeightsError, match=r"and \d+ more") as caught:
        load_weights(CRIS(CONFIG), state)
    assert set(caught.value.report.missing) == {n for n in model.state_dict() if n.startswith("backbone.")}


def test_half_precision_weights_become_the_precision_of_the_model(model):
    fresh = CRIS(CONFIG)
    load_weights(fresh, {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()})
    assert fresh.proj.txt.weight.dtype == torch.float32
    assert torch.equal(fresh.proj.txt.weight, model.proj.txt.weight.half().float())


@pytest.mark.parametrize(
    "name", ["visual.conv1.weight", "visual.attnpool.q_proj.bias", "transformer.resblocks.1.ln_2.bias", "logit_scale"]
)
def test_nothing_but_connect_may_be_missing_from_clip_weights(name):
    state = small_clip().state_dict()
    del state[name]
    with pytest.raises(WeightsError, match=rf"missing \(1\): backbone\.{re.escape(name)}"):
        load_clip(CRIS(CONFIG), state)


def test_clip_weights_without_batch_counters_load_and_say_so():
    state = {n: t for n, t in small_clip().state_dict().items() if not n.endswith("num_batches_tracked")}
    report = load_clip(CRIS(CONFIG), state)
    assert report.fits and "backbone.visual.bn1.num_batches_tracked" in report.kept


def test_connect_may_not_be_missing_from_a_cris_checkpoint(model):
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(CONNECT)}
    with pytest.raises(WeightsError, match=r"missing \(6\): backbone\.visual\.attnpool\.connect\.0\.weight"):
        load_weights(CRIS(CONFIG), state)


def test_weights_of_another_clip_say_whose_they_look_like():
    vit = small_clip(layers=2, width=768, head_width=64, patch_size=32)
    with pytest.raises(
        WeightsError, match=r"looks like ViT-B/32, the model's is a CLIP ResNet of depths \(1, 2, 1, 1\)"
    ):
        load_clip(CRIS(CONFIG), vit.state_dict())
    r101 = {name: torch.empty(shape, device="meta") for name, shape in SHAPES["cris_r101"]["state_dict"].items()}
    clip = {n.removeprefix("backbone."): t for n, t in r101.items() if n.startswith("backbone.") and "connect" not in n}
    with torch.device("meta"):
        r50 = CRIS(CRISConfig.preset("cris_r50"))
    for weights in (clip, r101):
        with pytest.raises(WeightsError, match=r"looks like RN101, the model's is RN50; use weights of RN50") as caught:
            load_weights(r50, weights)
        assert "backbone.visual.layer3.6.conv1.weight" in caught.value.report.unexpected


def test_whole_cris_is_refused_where_clip_is_wanted_and_the_other_way_round(model):
    with pytest.raises(ValueError, match=r"holds a whole CRIS model; give CLIP's weights"):
        load_clip(CRIS(CONFIG), model.state_dict())
    with pytest.raises(ValueError, match=r"holds CLIP's weights alone; give a whole CRIS model"):
        load_model(small_clip().state_dict())


def test_weights_of_something_else_are_refused():
    with pytest.raises(ValueError, match=r"neither CRIS's weights .* names begin with bias, weight"):
        load_weights(CRIS(CONFIG), torch.nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match=r"its entries are: epoch, net"):
        load_weights(CRIS(CONFIG), {"epoch": 3, "net": {"weight": torch.zeros(2)}})
    with pytest.raises(ValueError, match=r"entry 'decoder.depth' must be a tensor"):
        load_weights(CRIS(CONFIG), {"decoder.norm.bias": torch.zeros(2), "decoder.depth": 3})


def test_configuration_is_read_off_any_sizes_and_takes_what_is_known(model):
    assert infer_config(model.state_dict(), num_head=4, word_len=9, dropout=0.0, input_size=64) == CONFIG
    with pytest.warns(UserWarning, match="num_head of the decoder cannot be read"):
        guessed = infer_config(model.state_dict())
    assert (guessed.num_head, guessed.word_len, guessed.input_size, guessed.dropout) == (8, 12, 416, 0.1)
    with pytest.raises(ValueError, match=r"no CRIS state dict: decoder\.norm\.weight is missing"):
        infer_config(small_clip().state_dict())
