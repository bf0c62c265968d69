"""Mask Grounding and the alignment loss on a CRIS: off they are not there, on they start as CRIS, and nothing leaks."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from model_helpers import make_tokens, small_config
from torch import Tensor, nn

from fastris import CRIS, CRISConfig
from fastris.commands.assemble import model_config
from fastris.commands.train_options import TrainConfig
from fastris.data.samples import TrainSamples
from fastris.data.scenes.dataset import SyntheticExpressions
from fastris.data.tokens import tokenize
from fastris.inference.folding import for_inference
from fastris.models.base import HEAD
from fastris.models.cris import ImageFeatures
from fastris.models.cris import training_parts as parts
from fastris.models.cris.training_parts import GroundingFeatures, SentenceGrounding, spoken
from fastris.nn.masked_words import Masking
from fastris.ops import pixel_contrast
from fastris.options.declare import load_options
from fastris.weights.convert import write_model
from fastris.weights.load import load_model, load_weights

GROUNDING, ALIGNMENT = {"mask_grounding": 1.0}, {"alignment_loss": 0.5}
BOTH = GROUNDING | ALIGNMENT
EVERY = [GROUNDING, ALIGNMENT, BOTH, BOTH | {"vlba": "neck", "centre_layers": 1}, ALIGNMENT | {"vlba": "trunk"}]
every_switch = pytest.mark.parametrize("switches", EVERY, ids=lambda each: " ".join(each))
LENGTHS = (5, 4, 9)


def make_cris(dropout: float = 0.0, predictor_dropout: float = 0.0, **switches) -> CRIS:
    """In float64; the parts that all have start from the same weights."""
    torch.manual_seed(0)
    model = CRIS(small_config(dropout=dropout, **switches)).double()
    for module in model.modules():
        if isinstance(module, SentenceGrounding):
            for inner in module.modules():
                if isinstance(inner, nn.Dropout):
                    inner.p = predictor_dropout
                elif isinstance(inner, nn.MultiheadAttention):
                    inner.dropout = predictor_dropout
    return model


def make_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    masks = torch.zeros(3, 1, 64, 64, dtype=dtype)
    for row, (top, left) in enumerate([(8, 8), (24, 16), (0, 32)]):
        masks[row, :, top : top + 30, left : left + 28] = 1
    return torch.randn(3, 3, 64, 64, dtype=dtype), make_tokens(*LENGTHS), masks


def is_new(name: str) -> bool:
    return name.startswith(("grounding.", "cal."))


def new_keys(model: CRIS) -> set[str]:
    return {name for name in model.state_dict() if is_new(name)}


def hides(model: CRIS, *places: tuple[int, int]) -> None:
    """Make the model hide these (sentence, position) and no others."""

    def hide(tokens: Tensor) -> Masking:
        selected = torch.zeros_like(tokens, dtype=torch.bool)
        selected[tuple(torch.tensor(places).T)] = True
        return Masking(selected, selected)

    model.grounding.hide = hide  # type: ignore[union-attr, method-assign, assignment]


def grounding_inputs(model: CRIS, *batch: Tensor) -> dict[str, Any]:
    """What the predictor is given in a step, by name."""
    seen: list[dict[str, Any]] = []
    names = ("text", "tokens", "valid", "selected", "image", "mask", "embedding", "index")
    hook = model.grounding.register_forward_pre_hook(lambda _, given: seen.append(dict(zip(names, given, strict=True))))
    model.train()(*batch)
    hook.remove()
    return seen[0]


# Off.


def test_off_there_is_nothing_of_it_and_nothing_is_drawn():
    model, batch = make_cris().train(), make_batch()
    assert not new_keys(model) and not model.metric_names and not model.take_metrics() and not model.metrics_state()
    assert (
        isinstance(model.encode_image(batch[0]), ImageFeatures)
        and model.state_for_others().keys() == model.state_dict().keys()
    )
    state = torch.get_rng_state()
    model(*batch)
    assert torch.equal(torch.get_rng_state(), state)
    words = {"mask_grounding", "mask_rate", "predictor_layers", "whole_words", "alignment_loss"}
    assert not model.config.to_dict().keys() & words
    assert small_config(mask_grounding=0, alignment_loss=False) == small_config() == small_config().for_others()


# On, at the first step.


@every_switch
def test_what_is_switched_on_leaves_the_first_weights_of_the_rest_as_they_are(switches):
    others = {name: value for name, value in switches.items() if name in ("vlba", "centre_layers")}
    plain, model = make_cris(**others).state_dict(), make_cris(**switches).state_dict()
    assert all(torch.equal(model[name], value) for name, value in plain.items())


@every_switch
def test_segmentation_of_the_first_step_is_that_of_cris_dropout_and_all(switches, monkeypatch):
    others = {name: value for name, value in switches.items() if name in ("vlba", "centre_layers")}
    plain, model, batch = make_cris(0.2, **others), make_cris(0.2, 0.1, **switches), make_batch()
    assert torch.equal(model.eval()(*batch[:2]), plain.eval()(*batch[:2]))
    found: list[Tensor] = []
    monkeypatch.setattr(CRIS, "_segmentation_loss", kept(CRIS._segmentation_loss, found))
    losses = []
    for each in (plain, model):
        torch.manual_seed(5)
        losses.append(each.train()(*batch)[2])
    # Twice the sentences in one product round by its width in float64; no number is another one.
    near = {"rtol": 1e-12, "atol": 1e-13} if "mask_grounding" in switches else {"rtol": 0, "atol": 0}
    for mine, theirs in zip(found[2:], found[:2], strict=True):
        torch.testing.assert_close(mine, theirs, **near)
    assert losses[1] > losses[0] + 0.1


def kept(function, results: list):
    def call(*args):
        made = function(*args)
        results.extend(made)
        return made

    return call


@every_switch
def test_every_new_parameter_learns_from_the_first_step_on(switches):
    model = make_cris(**switches).train()
    model(*make_batch())[2].backward()
    assert new_keys(model) and not [
        name for name, p in model.named_parameters() if is_new(name) and (p.grad is None or not p.grad.any())
    ]


def test_loss_is_the_weighted_sum_and_the_metrics_are_its_parts():
    batch, both = make_batch(), {"mask_grounding": 0.7, "alignment_loss": 0.3}
    model, plain = make_cris(**both).train(), make_cris().train()
    torch.manual_seed(5)
    loss = model(*batch)[2]
    metrics = model.take_metrics()
    assert tuple(metrics) == model.metric_names
    assert model.metric_names == ("grounding_loss", "masked_accuracy", "most_frequent_share", "alignment_loss")
    expected = plain(*batch)[2] + 0.7 * metrics["grounding_loss"] + 0.3 * metrics["alignment_loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the metrics are in float32
    assert all(value != value for name, value in model.take_metrics().items() if name != "most_frequent_share")


def test_alignment_is_of_the_decoders_map_and_the_mean_word():
    model, (images, tokens, masks) = make_cris(**ALIGNMENT).train(), make_batch()
    decoded = copy.deepcopy(model)._decode(copy.deepcopy(model).encode_image(images), tokens, None)
    words = torch.stack([row[1 : length - 1].mean(0) for row, length in zip(decoded.words, LENGTHS, strict=True)])
    pixels = model.cal.pixel_projection(decoded.pixels.movedim(1, -1)).movedim(-1, 1)
    expected = pixel_contrast(pixels, model.cal.text_projection(words), masks, impl="reference")
    with_loss, plain = (each.train()(images, tokens, masks)[2] for each in (model, make_cris()))
    torch.testing.assert_close(with_loss - plain, 0.5 * expected, rtol=1e-9, atol=0)


# Which words are hidden.


def test_start_end_and_padding_are_no_words():
    tokens = torch.tensor([[94, 7, 8, 95, 0], [95, 0, 0, 0, 0], [94, 95, 0, 0, 0], [0, 0, 0, 0, 0], [94, 3, 4, 5, 95]])
    assert spoken(tokens, 96).int().tolist() == [[0, 1, 1, 0, 0], [0] * 5, [0] * 5, [0] * 5, [0, 1, 1, 1, 0]]


def test_pieces_of_a_word_of_clips_vocabulary_are_hidden_together():
    tokens = tokenize("the skateboarderette wearing mauve", 12).tokens.expand(300, -1)
    clip = {"vocab_size": 49408, "transformer_width": 8, "transformer_layers": 1}
    for whole in (True, False):
        config = small_config(**GROUNDING, whole_words=whole, mask_rate=0.3, predictor_layers=1)
        config.clip.__dict__.update(clip)
        torch.manual_seed(0)
        selected = SentenceGrounding(config).hide(tokens).selected
        ends = torch.tensor(parts.word_ends())[tokens[0]]
        pieces = [place for place in range(1, 11) if not ends[place] and 0 < tokens[0, place] < 49406]
        assert pieces, "the vocabulary has this word in one piece"
        together = [torch.equal(selected[:, place], selected[:, place + 1]) for place in pieces]
        assert all(together) if whole else not any(together)
        assert selected.any(1).all() and not selected[:, 0].any() and not selected[tokens == 49407].any()


def test_words_are_drawn_anew_each_step_and_the_same_again_from_the_same_state():
    model, batch = make_cris(**BOTH).train(), make_batch()  # without dropout: nothing else moves the generator

    def hidden() -> Tensor:
        return grounding_inputs(model, *batch)["selected"]

    torch.manual_seed(7)
    first = [hidden() for _ in range(6)]
    torch.manual_seed(7)
    assert all(torch.equal(hidden(), each) for each in first)
    assert len({tuple(each.flatten().tolist()) for each in first}) > 1


# Nothing leaks.


def test_image_context_does_not_depend_on_the_sentence():
    model, (images, tokens, masks) = make_cris(**GROUNDING, vlba="neck").train(), make_batch()
    for parameter in model.vlba.parameters():
        nn.init.normal_(parameter, std=0.2)  # pixels do hear the words, further on
    found = [grounding_inputs(copy.deepcopy(model), images, each, masks) for each in (tokens, make_tokens(*LENGTHS))]
    assert torch.equal(found[0]["image"], found[1]["image"])
    assert not torch.equal(found[0]["text"], found[1]["text"])
    wanted = [model.backbone.token_embedding.weight, *model.backbone.transformer.parameters(), *model.vlba.parameters()]
    image = grounding_inputs(model, images, tokens, masks)["image"]
    assert not any(g is not None for g in torch.autograd.grad(image.sum(), wanted, allow_unused=True))


def test_another_hidden_word_leaves_all_that_the_predictor_sees_as_it_was():
    model, (images, tokens, masks) = make_cris(**GROUNDING), make_batch()
    hides(model, (0, 2), (1, 1), (2, 6), (2, 7))
    other = tokens.clone()
    other[[0, 1, 2, 2], [2, 1, 6, 7]] = torch.tensor([11, 12, 13, 14])
    assert (other != tokens).sum() == 4
    found = [grounding_inputs(copy.deepcopy(model), images, each, masks) for each in (tokens, other)]
    for name in ("text", "valid", "selected", "image", "mask"):
        assert torch.equal(found[0][name], found[1][name]), name
    other[0, 1] = 20  # a word that is not hidden is heard
    seen = grounding_inputs(model, images, other, masks)
    assert not torch.equal(seen["text"][0, 2], found[0]["text"][0, 2])


def test_row_of_a_hidden_word_gets_its_gradient_from_the_tied_head_alone():
    model, (images, tokens, masks) = make_cris(**GROUNDING), make_batch()
    tokens[0, :5] = torch.tensor([94, 31, 32, 33, 95])
    tokens[1:] = torch.where((tokens[1:] > 30) & (tokens[1:] < 34), 40, tokens[1:])
    hides(model, (0, 2))
    given = grounding_inputs(model, images, tokens, masks)
    weight = model.backbone.token_embedding.weight
    (through_text,) = torch.autograd.grad(
        model.grounding(**given | {"embedding": weight.detach()}), weight, retain_graph=True
    )
    assert not through_text[32].any() and through_text[31].any() and through_text[33].any()
    (with_head,) = torch.autograd.grad(model.grounding(**given), weight)
    assert with_head[32].any()


def test_clean_sentences_reach_nothing_of_the_grounding():
    model, batch = make_cris(**GROUNDING), make_batch()
    encode = model.backbone.encode_text_and_hidden
    losses = []
    for spoil in (1.0, float("nan")):
        again = copy.deepcopy(model).train()

        def spoilt(*args, spoil=spoil):
            words, state, hidden = encode(*args)
            return words * spoil, state * spoil, hidden

        again.backbone.encode_text_and_hidden = spoilt
        torch.manual_seed(3)
        loss = again(*batch)[2]
        losses.append((loss.isnan().item(), again.take_metrics()["grounding_loss"]))
    assert losses[0][1] == losses[1][1] and [nan for nan, _ in losses] == [False, True]


def test_sentence_about_nothing_gives_no_grounding():
    model, (images, tokens, masks) = make_cris(**GROUNDING), make_batch()
    masks[1] = 0
    hides(model, (0, 1), (1, 2), (2, 3))
    given = grounding_inputs(model, images, tokens, masks)
    loss = model.grounding(**given)
    given["text"] = given["text"].detach().clone()
    given["text"][1] += 5
    given["tokens"] = given["tokens"].clone()
    given["tokens"][1, 2] = 1
    assert torch.equal(model.grounding(**given), loss)
    given["tokens"][0, 1] = 1
    assert not torch.equal(model.grounding(**given), loss)


def test_batch_without_any_word_or_object_has_gradients_of_zeros_for_every_parameter():
    model, (images, _, masks) = make_cris(**BOTH).train(), make_batch()
    model(images, torch.tensor([[94, 95], [95, 0], [0, 0]]), torch.zeros_like(masks))[2].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if is_new(name)}
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())


# With the other settings of training.


def test_several_phrases_about_an_image_are_grounded_as_one_by_one():
    model, (images, tokens, masks) = make_cris(**BOTH).train(), make_batch()
    tokens, masks = torch.cat([tokens, tokens[:1]]), torch.cat([masks, masks[:1]])
    found = []
    for given in ((images[:2], tokens.unflatten(0, (2, 2)), masks.unflatten(0, (2, 2))),
                  (images[[0, 0, 1, 1]], tokens, masks)):  # fmt: skip
        torch.manual_seed(5)
        found.append(copy.deepcopy(model)(*given)[2])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("setting", ["pointwise", "stages"])
def test_recomputing_changes_no_bit(setting):
    batch, found = make_batch(), []
    for each in ("none", setting):
        model = make_cris(0.2, 0.1, **BOTH).train().set_recompute(each)
        model.instance_contrast = 0.1
        torch.manual_seed(5)
        loss = model(*batch)[2]
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach()} | gradients | dict(model.named_buffers()))
    assert found[0].keys() == found[1].keys()
    assert not [name for name, value in found[0].items() if not torch.equal(found[1][name], value)]


def test_half_precision_is_near_float32():
    model, batch = make_cris(**BOTH).float().train(), make_batch(torch.float32)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(*batch)[2])
    losses[1].backward()
    assert losses[1].dtype == torch.float32 and abs(losses[1].item() / losses[0].item() - 1) < 0.03
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
@pytest.mark.long
def test_compiled_equals_eager():
    model, batch = make_cris(**BOTH, predictor_layers=1).train(), make_batch()
    found = []
    for each in (copy.deepcopy(model), torch.compile(copy.deepcopy(model), backend="aot_eager")):
        torch.manual_seed(5)
        found.append(each(*batch))
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-9, atol=0)


def test_features_of_eval_mode_are_one_error_in_training():
    model, (images, tokens, masks) = make_cris(**GROUNDING).eval(), make_batch()
    features = model.encode_image(images)
    assert isinstance(features, ImageFeatures)
    torch.testing.assert_close(
        model.loss(features, tokens, masks)[0], make_cris().eval().loss(features, tokens, masks)[0]
    )
    model.train()
    assert isinstance(model.encode_image(images), GroundingFeatures)
    with pytest.raises(TypeError, match=r"features were encoded in eval mode.*call encode_image in training mode"):
        model.loss(features, tokens, masks)


def test_new_parts_train_at_the_full_rate():
    model = make_cris(**BOTH)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {group: {names[id(p)] for p in parameters} for group, parameters in model.parameter_groups().items()}
    assert new_keys(model) <= groups[HEAD]


# Sizes and configuration.


@pytest.mark.parametrize(
    ("switches", "count"),
    [(GROUNDING, 13_714_688), (GROUNDING | {"predictor_layers": 2}, 7_409_920), (ALIGNMENT, 262_656)],
)
def test_parameters_of_each_switch_on_rn50(switches, count):
    plain = CRISConfig.preset("cris_r50")
    config = CRISConfig.from_dict(plain.to_dict() | switches)
    with torch.device("meta"):
        added = {name: p.numel() for name, p in CRIS(config).named_parameters() if is_new(name)}
    about = sum(config.parameter_counts().values()) - sum(plain.parameter_counts().values())
    assert sum(added.values()) == count and about == pytest.approx(count, rel=0.02)


def test_keys_are_named_by_what_they_are():
    names = {".".join(name.split(".")[:2]) for name in new_keys(make_cris(**BOTH))}
    assert names == {
        "grounding.mask_embedding", "grounding.image_projection", "grounding.centroid", "grounding.type_embedding",
        "grounding.norm", "grounding.layers", "grounding.head", "cal.pixel_projection", "cal.text_projection",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_grounding": -1.0}, r"mask_grounding must be the weight of a loss, 0 \(off\) or more, got -1.0"),
        ({"mask_grounding": True}, "mask_grounding must be the weight of a loss"),
        ({"alignment_loss": "yes"}, "alignment_loss must be the weight of a loss"),
        ({"alignment_loss": float("nan")}, "alignment_loss must be the weight of a loss"),
        ({"mask_grounding": float("inf")}, "mask_grounding must be the weight of a loss"),
        (GROUNDING | {"mask_rate": 0}, "mask_rate must be a probability above 0 and at most 1, got 0"),
        (GROUNDING | {"mask_rate": 15}, "mask_rate must be a probability above 0 and at most 1, got 15"),
        (GROUNDING | {"predictor_layers": 0}, "predictor_layers must be a whole number from 1 to 128, got 0"),
        (GROUNDING | {"predictor_layers": 2.5}, "predictor_layers must be a whole number from 1 to 128, got 2.5"),
        (GROUNDING | {"whole_words": "no"}, "whole_words must be true or false, got 'no'"),
        ({"mask_rate": 0.2}, "mask_rate=0.2 would do nothing without mask_grounding; give that a weight"),
        (ALIGNMENT | {"whole_words": False}, "whole_words=False would do nothing without mask_grounding"),
        (GROUNDING | {"vlba": "trunk"}, "mask_grounding needs an encoding of the image that has not heard"),
        (GROUNDING | {"vis_dim": 36, "clip": {"transformer_width": 36}, "fpn_out": (16, 36, 48)},
         r"clip.transformer_width \(36\) must be divisible by 8, the heads of Mask Grounding's predictor"),
    ],
)  # fmt: skip
def test_wrong_switches_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_switches_are_model_keys_of_the_train_command():
    given = ["model=tiny", "mask_grounding=1", "mask_rate=0.3", "whole_words=false", "alignment_loss=0.5"]
    config = model_config(load_options(TrainConfig, given))
    assert (config.mask_grounding, config.mask_rate, config.whole_words, config.alignment_loss) == (1, 0.3, False, 0.5)
    assert config.in_words().endswith(", mask_grounding=1, mask_rate=0.3, whole_words=False, alignment_loss=0.5")


# Files.


def test_weights_of_cris_load_with_exactly_the_new_keys_missing():
    plain, model = make_cris(), make_cris(**BOTH)
    published = {"epoch": 41, "state_dict": {f"module.{name}": value for name, value in plain.state_dict().items()}}
    with pytest.warns(UserWarning, match=r"has no weights of grounding and cal \(\d+ tensors\): new in this model"):
        report = load_weights(model, published)
    assert report.fits and set(report.missing) == new_keys(model) and not report.unexpected and not report.kept


@pytest.mark.parametrize("kind", ["save_pretrained", "pth", "safetensors", "folder"])
def test_files_for_others_are_those_of_a_cris_without_it(kind, tmp_path):
    model = make_cris(**BOTH, vlba="neck").float().eval()
    images, tokens, _ = make_batch(torch.float32)
    target = tmp_path / ("model" if kind in ("folder", "save_pretrained") else f"model.{kind}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if kind == "save_pretrained":
            model.save_pretrained(target)
        else:
            write_model(model, target, kind, "")
        loaded = load_model(target)
        assert loaded.config == small_config(vlba="neck", dropout=0.0) and not new_keys(loaded)
        assert torch.equal(loaded(images, tokens), model(images, tokens))


def test_weights_with_the_new_parts_load_into_a_cris_without_them(tmp_path):
    model, plain = make_cris(**BOTH).float(), make_cris().float()
    nn.init.ones_(plain.proj.txt.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = load_weights(plain, model.state_dict())
        assert report.fits and not report.missing and not report.unexpected
        twin = load_model({"config": model.config.to_dict(), "state_dict": model.state_dict()})
        assert twin.config == model.config and all(
            torch.equal(v, twin.state_dict()[n]) for n, v in model.state_dict().items()
        )
        assert not new_keys(load_model(model.state_dict(), small_config(dropout=0.0)))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    images, tokens, _ = make_batch(torch.float32)
    assert torch.equal(plain.eval()(images, tokens), model.eval()(images, tokens))


def test_model_for_inference_has_nothing_of_it():
    model, (images, tokens, _) = make_cris(**BOTH).eval(), make_batch()
    folded = for_inference(model)
    assert folded.grounding is None and folded.cal is None and model.grounding is not None
    torch.testing.assert_close(folded(images, tokens), model(images, tokens), rtol=0, atol=1e-10)


# It learns.

PLAIN = re.compile(r"the (red|green|blue|yellow|purple|orange) \w+")


def pairs(split: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, sentences such as "the red disc" and masks, of the built-in world."""
    data = SyntheticExpressions(split, scenes=count, size=64)
    samples, found = TrainSamples(data, 64, 5), []
    for number in range(len(data)):
        plain = [each for each in data.reference(number).sentences if PLAIN.fullmatch(each)]
        if plain:
            item = samples[number]
            found.append((item["image"], tokenize(plain[0], 5).tokens[0], item["mask"]))
    images, tokens, masks = (torch.stack(each) for each in zip(*found, strict=True))
    return images, tokens, masks


@pytest.mark.slow
def test_hidden_words_are_guessed_better_with_the_right_image_than_with_another():
    """On scenes that were not trained on. The image encoder stays as it was drawn, and words are those that occur."""
    train, val = pairs("train", 300), pairs("val", 80)
    words = torch.cat([train[1], val[1]]).unique()
    fields = CRISConfig.preset("tiny").to_dict() | GROUNDING | {"mask_rate": 0.3, "predictor_layers": 2}
    fields["clip"]["vocab_size"] = len(words)
    torch.manual_seed(0)
    model = CRIS(CRISConfig.from_dict(fields)).train()
    with torch.no_grad():
        seen = [model.backbone.encode_image(images)[2] for images, _, _ in (train, val)]

    def loss(c5: Tensor, tokens: Tensor, masks: Tensor) -> Tensor:
        tokens = torch.searchsorted(words, tokens)
        _, _, hidden = model._encode_text(tokens, hides=True)
        return model.grounding.loss(hidden, tokens, c5, masks, model.backbone.token_embedding.weight, None)

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(400):
        chosen = torch.randperm(len(seen[0]))[:32]
        optimizer.zero_grad()
        loss(seen[0][chosen], train[1][chosen], train[2][chosen]).backward()
        optimizer.step()
    model.take_metrics()
    found = {}
    for name, shift in (("right", 0), ("another", 7)):
        torch.manual_seed(1)
        with torch.no_grad():
            for _ in range(4):
                loss(seen[1].roll(shift, 0), val[1], val[2].roll(shift, 0))
        found[name] = model.take_metrics()
    assert found["right"]["grounding_loss"] < found["another"]["grounding_loss"] - 0.1, found
    assert found["right"]["masked_accuracy"] > 1.3 * found["right"]["most_frequent_share"], found
