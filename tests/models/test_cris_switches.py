"""AlignFormer's parts on a CRIS: off they are not there, on they start as CRIS, learn, and travel with its files."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_helpers import make_tokens, small_config
from torch import Tensor

from fastris import CRIS, CRISConfig, Segmenter, patch, reference, use_impl
from fastris.commands.assemble import model_config
from fastris.commands.train_options import TrainConfig
from fastris.data.scenes.dataset import SyntheticExpressions
from fastris.evaluation.evaluate import evaluate
from fastris.inference.folding import for_inference
from fastris.models.base import HEAD, Origin, Pixels
from fastris.models.cris import keys
from fastris.options.declare import load_options
from fastris.weights.card import unknown_card
from fastris.weights.convert import write_model
from fastris.weights.load import WeightsError, load_model, load_weights

NECK, TRUNK, CENTRE, ONE_LAYER = {"vlba": "neck"}, {"vlba": "trunk"}, {"centre_layers": 3}, {"centre_layers": 1}
CAM = {"alignment_module": "trunk"}
ALL = NECK | CENTRE
SWITCHES = [NECK, TRUNK, CENTRE, CAM, NECK | {"centre_layers": 6}, TRUNK | ONE_LAYER, CAM | NECK]
LENGTHS = (5, 4, 9)


def by_name(switches: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in switches.items()) or "off"


each_switch = pytest.mark.parametrize("switches", [NECK, TRUNK, CENTRE, CAM], ids=by_name)
every_switch = pytest.mark.parametrize("switches", SWITCHES, ids=by_name)


def make_cris(dropout: float = 0.0, **switches) -> CRIS:
    """In float64; the parts that all have start from the same weights."""
    torch.manual_seed(0)
    return CRIS(small_config(dropout=dropout, **switches)).double()


def make_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    masks = torch.zeros(3, 1, 64, 64, dtype=dtype)
    for row, (top, left) in enumerate([(8, 8), (24, 16), (0, 32)]):
        masks[row, :, top : top + 24, left : left + 28] = 1
    return torch.randn(3, 3, 64, 64, dtype=dtype), make_tokens(*LENGTHS), masks


def opened(model: CRIS) -> CRIS:
    """With random weights in the matrices that start at zero."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if is_new(name) and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def is_new(name: str) -> bool:
    return name.startswith(("vlba.", "centre.", "cam."))


def new_keys(model: CRIS) -> set[str]:
    return {name for name in model.state_dict() if is_new(name)}


# Off.


def test_off_is_cris_with_its_keys_its_files_and_its_numbers():
    model, (images, tokens, masks) = make_cris(), make_batch()
    assert {name.partition(".")[0] for name in model.state_dict()} == {"backbone", "neck", "decoder", "proj"}
    assert model.shares_image and not model.config.to_dict().keys() & {"vlba", "centre_layers"}
    twin = copy.deepcopy(model).train()
    prediction, _, loss = model.train()(images, tokens, masks)
    words, state = twin.backbone.encode_text(tokens)
    fused = twin.neck(twin.backbone.encode_image(images), state)
    decoded = twin.decoder(fused, words, tokens == 0).reshape(fused.shape)
    expected_loss, expected = twin.proj(decoded, state, masks)
    assert torch.equal(prediction, expected.detach()) and torch.equal(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None and theirs.grad is None) or torch.equal(mine.grad, theirs.grad)


@each_switch
def test_what_is_switched_on_leaves_the_first_weights_of_the_rest_as_they_are(switches):
    plain, model = make_cris().state_dict(), make_cris(**switches).state_dict()
    assert all(torch.equal(model[name], value) for name, value in plain.items())


# On, at the first step.


@every_switch
def test_first_step_is_cris_exactly(switches):
    plain, model, (images, tokens, masks) = make_cris(), make_cris(**switches), make_batch()
    assert torch.equal(model.eval()(images, tokens), plain.eval()(images, tokens))
    with torch.no_grad():
        mine, theirs = (each._decode(each.encode_image(images), tokens, None) for each in (model, plain))
    assert torch.equal(mine.state, theirs.state) and torch.equal(mine.words[mine.valid], theirs.words[mine.valid])
    assert model.vlba is None or not mine.words[~mine.valid].any()
    mine, theirs = model.train()(images, tokens, masks), plain.train()(images, tokens, masks)
    # One product scores all outputs of a centre embedding, and rounds by its width; all else has the same bits.
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-14 * bool(model.centre), atol=1e-14 * bool(model.centre))
    torch.testing.assert_close(mine[2], theirs[2], rtol=1e-14 * bool(model.centre), atol=0)


@every_switch
def test_gradients_of_the_first_step_are_those_of_cris(switches):
    plain, model, batch = make_cris().train(), make_cris(**switches).train(), make_batch()
    plain(*batch)[2].backward()
    model(*batch)[2].backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
    for name, parameter in model.named_parameters():
        if not is_new(name) and expected[name] is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-13 * largest)


CANCELLED = ("query.0.bias", "W.0.bias", "value.bias", "sym_value.0.bias")
"""An instance norm behind them takes these out again (of ``value``, because a softmax row sums to one): in exact
arithmetic they change no result and never get a gradient. They are kept, because the released weights have them."""
CANCELLED_IN_CAM = ("f_key.0.bias", "pwam.image_lang_att.f_value.0.bias", "pwam.image_lang_att.W.0.bias")
"""The same; a key's bias adds the same to all scores of a softmax."""


@every_switch
def test_every_new_parameter_learns_from_the_second_step_on(switches):
    model, batch = make_cris(**switches).train(), make_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    first, second = ({}, {})
    for found in (first, second):
        optimizer.zero_grad()
        model(*batch)[2].backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == ["backbone.logit_scale"]
        found.update({n: p.grad.abs().max().item() for n, p in model.named_parameters() if is_new(n)})
        optimizer.step()
    for name, gradient in second.items():
        biases = CANCELLED_IN_CAM if name.startswith("cam.") else CANCELLED
        cancelled = "image_lang_att" in name and name.endswith(biases)
        assert (gradient < 1e-15) if cancelled else (gradient > 1e-12), name
    learned_at_once = {name for name, gradient in first.items() if gradient > 1e-15}
    zero_at_first = {n for n, p in make_cris(**switches).named_parameters() if is_new(n) and not p.any()}
    gates = {n for n in zero_at_first if "gate.2" in n} | {n for n in zero_at_first if "centre.head.4" in n}
    assert learned_at_once == gates


@pytest.mark.parametrize("switches", [ALL, TRUNK | ONE_LAYER, CAM], ids=by_name)
def test_ten_adam_steps_with_instance_contrast_lower_the_loss(switches):
    model, batch = make_cris(**switches).float().train(), make_batch(torch.float32)
    model.instance_contrast = 0.1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(*batch)[2]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[-1] < 0.5 * losses[0], losses


# What the parts compute.


def test_centre_corrects_the_kernel_and_the_last_output_is_the_prediction():
    model, (images, tokens, masks) = opened(make_cris(centre_layers=2)).eval(), make_batch()
    decoded = model._decode(model.encode_image(images), tokens, None)
    maps = [decoded.pixels]
    for convolution, norm, activation in (model.proj.vis[1], model.proj.vis[3]):
        up = F.interpolate(maps[-1], scale_factor=2, mode="bilinear")
        maps.append(activation(norm(F.conv2d(up, convolution.weight, padding=1))))
    levels = [F.avg_pool2d(maps[0], 2), maps[0], maps[1]]
    mean = torch.stack([row[valid].mean(0) for row, valid in zip(decoded.words, decoded.valid, strict=True)])
    centre = model.centre.txt_proj(mean)[:, None]
    outputs = []
    for number in range(3):
        numbers = model.proj.txt(decoded.state) + model.centre.head(centre[:, 0])
        kernel, bias = numbers[:, None, :-1].unflatten(2, (16, 3, 3)), numbers[:, -1:]
        outputs.append(reference.text_to_pixel_similarity(model.proj.vis[4](maps[2]), kernel, bias))
        if number < 2:
            layer, level = model.centre.layers[number], levels[number]
            table = reference.sine_positions_2d(level.shape[2], level.shape[3], 32).double()
            pixels = level.flatten(2).transpose(1, 2) + model.centre.level_embed.weight[number]
            query = centre + model.centre.query_embed.weight
            weights = layer.cross_attn.weights()
            centre = layer.after(centre, reference.separate_attention(query, pixels + table, pixels, weights, 8))
    torch.testing.assert_close(model(images, tokens), outputs[-1], rtol=0, atol=1e-12)
    loss, logits = model.loss(model.encode_image(images), tokens, masks)
    torch.testing.assert_close(logits, outputs[-1], rtol=0, atol=1e-12)
    target = masks[:, :, ::4, ::4]
    expected = sum(F.binary_cross_entropy_with_logits(each, target) for each in outputs) / 3
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_words_flow_through_the_maps_and_on_into_decoder_and_state():
    model, (images, tokens, _) = opened(make_cris(**NECK)).eval(), make_batch()
    with torch.no_grad():
        words, _ = model.backbone.encode_text(tokens)
        valid, maps = tokens != 0, []
        for exchange, x in zip(model.vlba, model.encode_image(images), strict=True):
            pixels = x.flatten(2).transpose(1, 2)
            seen, said = super(type(exchange), exchange).forward(pixels, words, valid)
            maps.append(x + (exchange.res_gate(seen) * seen).transpose(1, 2).reshape(x.shape))
            words = valid[..., None] * (words + exchange.sym_res_gate(said) * said)
        ends = torch.stack([row[length - 1] for row, length in zip(words, LENGTHS, strict=True)])
        state = ends @ model.backbone.text_projection
        decoded = model.decoder(model.neck.fuse(maps, state), words, ~valid).unflatten(2, (4, 4))
        torch.testing.assert_close(model(images, tokens), model.proj(decoded, state), rtol=0, atol=1e-12)
        assert (model(images, tokens) - make_cris().eval()(images, tokens)).abs().max() > 1e-3


def test_words_change_what_each_stage_of_the_trunk_sees():
    model, (images, tokens, _) = opened(make_cris(**TRUNK)).eval(), make_batch()
    seen = []
    model.backbone.visual.layer4.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images, tokens)
        model(images, make_tokens(*LENGTHS))
    assert (seen[0] - seen[1]).abs().max() > 1e-4


@pytest.mark.parametrize("switches", [NECK, TRUNK, ALL, CAM], ids=by_name)
def test_padding_changes_nothing(switches):
    model, (images, tokens, _) = opened(make_cris(**switches)).eval(), make_batch()
    alone = torch.cat([model(images[i : i + 1], tokens[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(images, tokens), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("switches", [{}, ALL, TRUNK, CAM], ids=by_name)
def test_odd_sentences_and_the_smallest_image_are_answered(switches):
    model = opened(make_cris(**switches))
    images, tokens = torch.randn(3, 3, 32, 32).double(), torch.zeros(3, 6, dtype=torch.int64)
    tokens[1, 0], tokens[2, :2] = 95, torch.tensor([94, 95])  # nothing but padding; one word; no word between the marks
    masks = torch.zeros(3, 1, 32, 32).double()
    masks[1] = 1
    model.instance_contrast = 0.1
    assert model.eval()(images, tokens).isfinite().all()
    loss = model.train()(images, tokens, masks)[2]
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# Many phrases about one image.


@pytest.mark.parametrize("switches", [NECK, TRUNK, ALL, TRUNK | CENTRE, CAM], ids=by_name)
def test_several_phrases_about_an_image_are_answered_as_one_by_one(switches):
    model, (images, tokens, masks) = opened(make_cris(**switches)).eval(), make_batch()
    index = torch.tensor([1, 0, 1])
    with torch.no_grad():
        together = model.segment(model.encode_image(images[:2]), tokens, index)
        torch.testing.assert_close(together, model(images[index], tokens), rtol=0, atol=1e-12)
        two_each = model(images[:1], tokens[None, :2])
        torch.testing.assert_close(two_each, model(images[[0, 0]], tokens[:2]), rtol=0, atol=1e-12)
    _, target, loss = model.train()(images[:1], tokens[None, :2], masks[None, :2])
    assert target.shape == (2, 1, 16, 16) and loss.isfinite()


def test_only_the_trunk_encodes_an_image_for_each_phrase():
    (images, tokens, _), encoded = make_batch(), []
    for switches, count in ((NECK, 1), (TRUNK, 3), (CAM, 3)):
        model = make_cris(**switches).eval()
        assert model.shares_image is (switches is NECK)
        hook = model.backbone.visual.layer1.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
        model(images[:1], tokens[None])
        hook.remove()
        assert encoded.pop() == count and not encoded


@pytest.mark.parametrize("switch", ["vlba", "alignment_module"])
def test_encoding_once_for_all_phrases_is_refused_where_the_trunk_hears_them(switch):
    (images, tokens, masks), trunk = make_batch(), make_cris(**{switch: "trunk"})
    features = make_cris(**NECK).encode_image(images)
    for call in (lambda: trunk.segment(features, tokens), lambda: trunk.loss(features, tokens, masks)):
        with pytest.raises(TypeError, match=f"encoded once for all phrases, and with {switch}='trunk'"):
            call()
    with pytest.raises(TypeError, match="features must be what encode_image returns, got Pixels"):
        make_cris(**NECK).segment(Pixels(images), tokens)


def test_prediction_and_evaluation_answer_each_phrase_as_if_it_came_alone():
    torch.manual_seed(0)
    config = CRISConfig.preset("tiny")
    model = opened(CRIS(CRISConfig.from_dict(config.to_dict() | TRUNK | ONE_LAYER))).eval()
    data = SyntheticExpressions("val", scenes=1, size=64)
    phrases = [sentence for index in range(3) for sentence in data.reference(index).sentences]
    segmenter = Segmenter(model)
    together = segmenter.predict(data.image(0), phrases)
    alone = [segmenter.predict(data.image(0), phrase).logits[0] for phrase in phrases]
    np.testing.assert_allclose(together.logits, np.stack(alone), rtol=0, atol=1e-4)
    assert np.abs(alone[0] - alone[3]).max() > 1e-2
    scored = evaluate(model, data, batch_size=4)
    one_by_one = evaluate(for_inference(model), data, batch_size=1, images_per_batch=1)
    assert [s.intersection for s in scored.samples] == pytest.approx(
        [s.intersection for s in one_by_one.samples],
        abs=2,  # pixels on the threshold
    )


@each_switch
def test_patching_finds_in_it_what_it_finds_in_a_plain_one(switches):
    plain, switched = (patch(make_cris(**each).float()) for each in ({}, switches))
    assert (switched.replaced, switched.left_alone) == (plain.replaced, plain.left_alone)


# Instance contrast.


@pytest.mark.parametrize("switches", [{}, *SWITCHES], ids=by_name)
def test_instance_contrast_is_that_of_the_last_kernels_taps(switches):
    model, (images, tokens, masks) = opened(make_cris(**switches)).eval(), make_batch()
    features, contrasts = model.encode_image(images), []
    plain, expected = model.loss(features, tokens, masks)
    model.instance_contrast = 0.1
    with_it, logits = model.loss(features, tokens, masks)
    scored, kernels, _ = model._kernels(model._decode(features, tokens, None), all_outputs=True)
    pixels = model.proj.vis[4](scored)
    contrasts = reference.region_contrast(pixels, kernels[:, -1].sum((-1, -2)), masks)
    torch.testing.assert_close(with_it, plain + 0.1 * contrasts, rtol=1e-12, atol=0)
    assert torch.equal(logits, expected) and contrasts > 0.1


def test_taps_sum_to_what_scores_a_patch_of_equal_pixels():
    model, (images, tokens, _) = make_cris().eval(), make_batch()
    _, kernels, bias = model._kernels(model._decode(model.encode_image(images), tokens, None), all_outputs=True)
    pixel = torch.randn(3, 16, 1, 1).double()
    logits = reference.text_to_pixel_similarity(pixel.expand(-1, -1, 5, 5), kernels, bias)
    expected = torch.einsum("bc,bc->b", kernels[:, 0].sum((-1, -2)), pixel[..., 0, 0]) + bias[:, 0]
    torch.testing.assert_close(logits[:, 0, 2, 2], expected)


def test_instance_contrast_hears_which_expressions_share_an_image_or_a_reference():
    model, (images, tokens, masks) = make_cris().eval(), make_batch()
    model.instance_contrast = 1.0
    index = torch.tensor([0, 0, 1])
    features = model.encode_image(images[:2])
    apart = model.loss(features, tokens, masks, index, Origin(torch.arange(3), torch.arange(3)))[0]
    by_index = model.loss(features, tokens, masks, index)[0]
    same_image = model.loss(features, tokens, masks, index, Origin(index + 7, torch.arange(3)))[0]
    same_reference = model.loss(features, tokens, masks, index, Origin(index, index))[0]
    assert torch.equal(by_index, same_image)
    assert same_reference < same_image < apart


# Training's other settings.


@pytest.mark.parametrize("setting", ["pointwise", "stages"])
@pytest.mark.parametrize("switches", [ALL, TRUNK, CAM], ids=by_name)
def test_recomputing_changes_no_bit(switches, setting):
    batch, found = make_batch(), []
    for each in ("none", setting):
        model = opened(make_cris(dropout=0.2, **switches)).train().set_recompute(each)
        torch.manual_seed(5)
        loss = model(*batch)[2]
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach()} | gradients | dict(model.named_buffers()))
    assert found[0].keys() == found[1].keys()
    assert not [name for name, value in found[0].items() if not torch.equal(found[1][name], value)]


@pytest.mark.parametrize("setting", ["pointwise", "stages"])
def test_exchanges_of_the_trunk_are_recomputed_with_their_stage(setting):
    model, batch, runs = make_cris(**TRUNK).train().set_recompute(setting), make_batch(), []
    for number, exchange in enumerate(model.vlba):
        exchange.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    model(*batch)[2].backward()
    assert sorted(runs) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("switches", [ALL, TRUNK | CENTRE, CAM], ids=by_name)
def test_half_precision_is_near_float32(switches, impl):
    model, batch = opened(make_cris(**switches)).float().train(), make_batch(torch.float32)
    model.instance_contrast = 0.1
    with use_impl(impl):
        expected = model(*batch)[2]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*batch)[2]
        loss.backward()
    assert loss.dtype == torch.float32 and abs(loss.item() / expected.item() - 1) < 0.03
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("switches", [NECK | ONE_LAYER, TRUNK, CAM], ids=by_name)
def test_compiled_without_graph_breaks_equals_eager(switches):
    model, batch = opened(make_cris(**switches)).train(), make_batch()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    eager, other = model(*batch), compiled(*batch)
    torch.testing.assert_close(other[0], eager[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(other[2], eager[2], rtol=1e-10, atol=0)


def test_channels_last_gives_the_same_numbers():
    (images, tokens, masks), layout = make_batch(), {"memory_format": torch.channels_last}
    for switches in (ALL, TRUNK, CAM):
        model = opened(make_cris(**switches)).train()
        expected = model(images, tokens, masks)[2]
        torch.testing.assert_close(model.to(**layout)(images.to(**layout), tokens, masks)[2], expected)


def test_new_parts_train_at_the_full_rate():
    model = make_cris(**ALL)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {group: {names[id(p)] for p in parameters} for group, parameters in model.parameter_groups().items()}
    assert groups.keys() == {"backbone", HEAD} and new_keys(model) <= groups[HEAD]


# Sizes and configuration.


@pytest.mark.parametrize(
    ("switches", "count"),
    [
        (NECK, 19_287_808),
        (TRUNK, 57_839_872),
        ({"centre_layers": 6}, 20_886_785),
        ({"centre_layers": 3}, 11_429_633),
        (CAM, 120_448_000),
    ],
    ids=str,
)
def test_parameters_of_each_switch_on_rn50(switches, count):
    plain = CRISConfig.preset("cris_r50")
    config = CRISConfig.from_dict(plain.to_dict() | switches)
    with torch.device("meta"):
        added = {name: p.numel() for name, p in CRIS(config).named_parameters() if is_new(name)}
    assert sum(added.values()) == count
    about = sum(config.parameter_counts().values()) - sum(plain.parameter_counts().values())
    assert about == pytest.approx(count, rel=0.01)


def test_keys_are_the_released_ones():
    names = new_keys(make_cris(**ALL))
    assert {name.split(".")[2] for name in names if name.startswith("vlba.")} == {
        "vis_project", "lang_project", "image_lang_att", "project_mm", "sym_project_mm", "res_gate", "sym_res_gate",
    }  # fmt: skip
    assert {"vlba.2.image_lang_att.W.0.weight", "vlba.0.sym_res_gate.2.weight", "vlba.1.project_mm.3.bias"} <= names
    assert {n.split(".")[1] for n in names if n.startswith("centre.")} == {
        "txt_proj", "layers", "query_embed", "level_embed", "head",
    }  # fmt: skip
    assert {"centre.head.4.weight", "centre.layers.2.ffn.3.weight", "centre.layers.0.cross_attn.in_proj_bias"} <= names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vlba": "head"}, r"vlba must be one of off, neck, trunk, got 'head' \(text\)"),
        ({"vlba": True}, "vlba must be one of off, neck, trunk, got True"),
        ({"alignment_module": "neck"}, "alignment_module must be one of off, trunk, got 'neck'"),
        (TRUNK | CAM, "vlba=trunk and alignment_module=trunk both change what the same stages pass on; choose one"),
        ({"centre_layers": -1}, r"centre_layers must be a whole number from 0 \(off\) to 128, got -1"),
        ({"centre_layers": 3.0}, "centre_layers must be a whole number"),
        ({"centre_layers": True}, "centre_layers must be a whole number"),
        ({"centre_layers": 129}, "centre_layers must be a whole number"),
        ({"centre_layers": 3, "vis_dim": 36, "clip": {"transformer_width": 36}, "fpn_out": (16, 36, 48)},
         r"vis_dim \(36\) must be divisible by 8, the heads of the centre embedding"),
        ({"vlba": "neck", "fpn_out": (16384, 32, 16384)}, "billion parameters"),
    ],
)  # fmt: skip
def test_wrong_switches_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_bare_off_of_a_yaml_file_is_off(tmp_path):
    path = tmp_path / "cris.yaml"
    fields = "clip_pretrain: RN50.pt\nword_len: 17\nword_dim: 1024\nvis_dim: 512\nfpn_in: [512, 1024, 1024]\n"
    fields += "fpn_out: [256, 512, 1024]\nnum_layers: 3\nnum_head: 8\ndim_ffn: 2048\ndropout: 0.1\n"
    path.write_text(fields + "vlba: off\n")
    assert CRISConfig.from_yaml(path) == CRISConfig.preset("cris_r50")
    path.write_text(fields + "vlba: neck\n")
    assert CRISConfig.from_yaml(path).vlba == "neck"


def test_switches_are_model_keys_of_the_train_command():
    options = load_options(TrainConfig, ["model=tiny", "vlba=neck", "centre_layers=3"])
    config = model_config(options)
    assert (config.vlba, config.centre_layers) == ("neck", 3)
    assert model_config(load_options(TrainConfig, ["model=tiny", "vlba=off"])) == CRISConfig.preset("tiny")
    assert config.in_words().endswith(", vlba=neck, centre_layers=3")
    assert "vlba=neck, centre_layers=3" in unknown_card(config, "x.pth")
    assert make_cris(**ALL).in_words().endswith(" and width 4, vlba=neck, centre_layers=3")


# Files.


@each_switch
def test_weights_of_cris_load_with_exactly_the_new_keys_missing(switches, tmp_path):
    plain, model = make_cris(), make_cris(**switches)
    published = {"epoch": 41, "state_dict": {f"module.{name}": value for name, value in plain.state_dict().items()}}
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    torch.nn.init.ones_(model.proj.txt.weight)
    with pytest.warns(UserWarning, match="has no weights of ") as warned:
        report = load_weights(model, published)
    assert report.fits and set(report.missing) == new_keys(model) and not report.unexpected and not report.kept
    parts = " and ".join(sorted({name.partition(".")[0] for name in report.missing}, reverse=True))
    (line,) = (str(each.message) for each in warned)
    assert line == (
        f"the given state dict has no weights of {parts} ({len(report.missing)} tensors): new in this model, they keep "
        "their initial values"
    )
    assert all(torch.equal(value, initial[name]) for name, value in model.state_dict().items())
    plain.float().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"has no weights of {parts} "):
        loaded = CRIS.from_pretrained(tmp_path, config=model.config)
    images, tokens, _ = make_batch(torch.float32)
    assert torch.equal(loaded(images, tokens), plain.eval()(images, tokens))


def test_half_a_new_part_or_one_that_the_model_lacks_is_a_misfit():
    model = make_cris(**ALL)
    state = model.state_dict()
    cut = {name: value for name, value in state.items() if not name.startswith(("centre.", "vlba.2."))}
    with pytest.raises(WeightsError, match=r"missing \(\d+\): vlba.2") as error:
        load_weights(model, cut)
    assert error.value.report.new_parts == ("centre",)
    with pytest.raises(WeightsError, match=r"unexpected \(\d+\): vlba.0"):
        load_weights(make_cris(), state)
    with pytest.raises(WeightsError, match="of another shape"):
        load_weights(make_cris(**TRUNK), make_cris(**NECK).state_dict())


@each_switch
def test_models_travel_with_their_switches(switches, tmp_path):
    model = opened(make_cris(**switches)).float().eval()
    images, tokens, _ = make_batch(torch.float32)
    expected = model(images, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "folder")
        assert torch.equal(CRIS.from_pretrained(tmp_path / "folder")(images, tokens), expected)
        for kind in ("pth", "safetensors"):
            write_model(model, tmp_path / f"model.{kind}", kind, "")
            loaded = load_model(tmp_path / f"model.{kind}")
            assert loaded.config == model.config and torch.equal(loaded(images, tokens), expected)
        state = keys.infer_config(model.state_dict(), num_head=4, dropout=0.0, input_size=64)
    assert state == model.config
