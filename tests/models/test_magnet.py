"""MagNet's behaviour where no released number tells: padding, sizes, modes, groups, files and a short training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_helpers import rows, train_set, val_set

from fastris import MagNetConfig, Segmenter, use_impl
from fastris.commands.train import TrainConfig, train
from fastris.evaluation.evaluate import evaluate
from fastris.models import registry
from fastris.models.base import HEAD, NO_DECAY
from fastris.weights.load import load_model

pytest.importorskip("transformers", reason="MagNet's text encoder is BERT: pip install 'fastris[magnet]'")

SMALL = {
    "bert": {
        "vocab_size": 30,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
    },
    "vocabulary": "built-in",
    "word_len": 9,
    "embed_dim": 8,
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 4, 8),
    "window": 4,
    "drop_path": 0.0,
    "conv_dim": 64,
    "decoder_heads": 4,
    "pixel_layers": 1,
    "pixel_ffn": 32,
    "query_layers": 4,
    "query_ffn": 32,
    "input_size": 64,
}


def small(**changes):
    torch.manual_seed(0)
    model = registry.create(MagNetConfig(**{**SMALL, **changes})).eval()
    for gate in model.language_model.res_gates:  # open gates: closed ones would hide what passes them
        torch.nn.init.normal_(gate[2].weight, std=0.3)
    return model


def batch(size: tuple[int, int] = (64, 64), lengths: tuple[int, ...] = (5, 3)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(lengths), 3, *size, generator=generator)
    tokens = torch.zeros(len(lengths), 9, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(1, 30, (length,), generator=generator)
    mask = (torch.rand(len(lengths), 1, *size, generator=generator) > 0.6).float()
    return images, tokens, mask


def test_masked_padding_changes_neither_loss_nor_gradients():
    model = small().double()
    images, tokens, mask = batch()
    images, mask = images.double(), mask.double()
    results = []
    for used in (tokens, tokens[:, :6], tokens[:, :5]):
        with use_impl("reference"):  # which trims nothing
            loss, logits = model.loss(model.encode_image(images), used, mask)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        results.append((loss, logits, *torch.autograd.grad(loss, parameters)))
    for whole, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(whole, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(images, tokens), results[0][1].detach(), rtol=1e-9, atol=1e-9)
    assert model._fitted(tokens).shape == (2, 5)


@pytest.mark.parametrize("rule", ["intended", "released"])
def test_other_rules_see_padding_and_pad_to_the_models_length(rule):
    model = small(language_mask=rule).double()
    images, tokens, _ = batch()
    images = images.double()
    assert model._fitted(tokens[:, :5]).shape == (2, 9)
    torch.testing.assert_close(model(images, tokens[:, :5]), model(images, tokens), rtol=0, atol=0)
    shorter = small(language_mask=rule, word_len=5).double()
    assert (shorter(images, tokens[:, :5]) - model(images, tokens)).abs().max() > 1e-6


def test_released_rule_is_an_argmin_that_scores_of_any_size_do_not_break():
    model = small(language_mask="released")
    images, tokens, _ = batch()
    side = model.language_model.pwams[0]
    words, pixels = torch.randn(2, 9, 32), torch.randn(2, 256, 8)
    found = side(words, pixels, tokens != 0)
    with torch.no_grad():
        side.image_lang_att.f_query[0].weight.mul_(1e6)
        side.image_lang_att.f_query[0].bias.mul_(1e6)
    torch.testing.assert_close(side(words, pixels, tokens != 0), found)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images, tokens).isfinite().all()


def test_what_nothing_reads_is_frozen_and_everything_else_gets_a_gradient():
    for rule in ("masked", "intended", "released"):
        model = small(language_mask=rule).train()
        images, tokens, mask = batch()
        model(images, tokens, mask)[2].backward()
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        dead = ("image_model.norm", "image_model.layers.3.res_gate", "language_model.norms", "lang_proj")
        dead += ("language_model.pwams.3", "language_model.res_gates.3", "classifier.predictor.class_embed")
        silent = {n for n in frozen if not n.startswith(dead)}
        asked = {n for n, _ in model.named_parameters() if "pwams" in n and ("f_query" in n or "f_key" in n)}
        assert silent == ({n for n in asked if "pwams.3" not in n} if rule == "released" else set())
        missing = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
        assert not missing, missing


def test_closed_language_gates_learn_from_the_first_step_on():
    model = registry.create(MagNetConfig(**SMALL)).train()
    images, tokens, mask = batch()
    gates = model.language_model.res_gates
    assert all(gate[0].weight.any() and not gate[2].weight.any() for gate in gates)
    model(images, tokens, mask)[2].backward()
    assert all(gate[2].weight.grad.any() for gate in gates[:3])


def test_words_behind_closed_gates_read_nothing_and_are_the_same_bits():
    model = small(language_mask="released")
    for gate in model.language_model.res_gates:
        torch.nn.init.zeros_(gate[2].weight)
    asked: list[int] = []
    for number, side in enumerate(model.language_model.pwams):
        side.register_forward_pre_hook(lambda *_, number=number: asked.append(number))
    images, tokens, _ = batch()
    expected = model(images, tokens)
    assert asked == [0, 1, 2]
    with torch.no_grad():
        assert torch.equal(model(images, tokens), expected) and asked == [0, 1, 2]
        torch.nn.init.normal_(model.language_model.res_gates[1][2].weight)
        assert not torch.equal(model(images, tokens), expected) and asked == [0, 1, 2, 1]


@pytest.mark.parametrize("size", [(31, 31), (33, 47), (64, 20), (90, 66), (1, 1)])
def test_images_of_any_size_get_logits_of_that_size_and_train(size):
    model = small()
    images, tokens, mask = batch(size)
    logits = model(images, tokens)
    assert logits.shape == (2, 1, *size) and logits.isfinite().all()
    together = model(images[:1], tokens[None, :1])
    torch.testing.assert_close(together, logits[:1], rtol=1e-4, atol=1e-4)
    loss = model.train()(images, tokens, mask)[2]
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("rule", ["masked", "intended", "released"])
@pytest.mark.parametrize("lengths", [(1, 4), (0, 3), (0, 0), (9, 9), (1,)])
def test_one_word_and_nothing_but_padding_stay_finite_with_their_gradients(lengths, rule):
    model = small(language_mask=rule).train()
    images, tokens, mask = batch(lengths=lengths)
    loss = model(images, tokens, mask)[2]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_query_whose_mask_is_all_background_reads_everything():
    model = small()
    with torch.no_grad():
        model.classifier.pixel_decoder.mask_features.weight.zero_()
        model.classifier.pixel_decoder.mask_features.bias.fill_(1.0)
        model.classifier.predictor.mask_embed.layers[2].weight.zero_()
        model.classifier.predictor.mask_embed.layers[2].bias.fill_(-1.0)
    images, tokens, _ = batch()
    logits = model(images, tokens)
    torch.testing.assert_close(logits, torch.full_like(logits, -64.0))
    read = model.score(model.encode_image(images), tokens).queries
    with torch.no_grad():  # now nothing is background
        model.classifier.predictor.mask_embed.layers[2].bias.fill_(1.0)
    torch.testing.assert_close(model.score(model.encode_image(images), tokens).queries, read)


def test_bfloat16_autocast_stays_close_and_the_loss_is_float32():
    model = small().train()
    images, tokens, mask = batch()
    with torch.no_grad():
        model.eval()
        exact, _ = model.loss(model.encode_image(images), tokens, mask)
        with torch.autocast("cpu", torch.bfloat16):
            loss, logits = model.loss(model.encode_image(images), tokens, mask)
    assert loss.dtype == logits.dtype == torch.float32
    assert abs(float(loss / exact) - 1) < 0.05


def test_loss_is_the_mean_over_all_predictions_of_cross_entropy_and_dice():
    model = small()
    images, tokens, mask = batch()
    mask[1] = 0  # an empty one
    scored = model.score(model.encode_image(images), tokens)
    terms = []
    for output in F.interpolate(scored.logits, (64, 64), mode="bilinear", align_corners=True).split(1, dim=1):
        p = output.sigmoid()
        dice = 1 - (2 * (p * mask).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
        terms.append(2 * F.binary_cross_entropy(p, mask) + 2 * dice.mean())
    loss, logits = model.loss(model.encode_image(images), tokens, mask)
    assert len(terms) == 5
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    torch.testing.assert_close(logits, output)
    for other in (torch.ones(2, 1, 64, 64), torch.ones(2, 1, 40, 90)):
        assert model.train()(images, tokens, other)[2].isfinite()


def test_class_score_multiplies_the_probability_and_cannot_be_trained():
    model = small(class_score="on")
    images, tokens, mask = batch()
    scored = model.score(model.encode_image(images), tokens, all_outputs=False)
    share = model.classifier.predictor.class_embed(scored.queries[:, -1]).softmax(-1)[:, 1]
    plain = F.interpolate(scored.logits, (64, 64), mode="bilinear", align_corners=True).sigmoid()
    torch.testing.assert_close(model(images, tokens).sigmoid(), (plain * share[:, None, None, None]).detach())
    with pytest.raises(ValueError, match="class_score=on cannot be trained"):
        model.train()(images, tokens, mask)


def test_wrong_arguments_are_one_error_that_names_them():
    model = small()
    images, tokens, mask = batch()
    for arguments, message in (
        ((images, torch.ones(2, 10, dtype=torch.int64)), "word has 10 tokens a sentence, but this model takes 1 to 9"),
        ((images, tokens + 25), "word must hold token ids 0 to 29"),
        ((images[:, :2], tokens), r"img must be \(B, 3, H, W\)"),
        ((images[:1], tokens), "there are 1 images and 2 expressions"),
        ((images[..., :0], tokens), "img is 64x0 pixels, but it must have some"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(TypeError, match="features must be what encode_image returns, got Tensor"):
        model.segment(images, tokens)
    with pytest.raises(ValueError, match=r"mask must be \(2, 1, H, W\)"):
        model.train()(images, tokens, mask[:1])


def test_no_norm_and_no_table_of_positions_decays_and_all_of_bert_is_trained():
    model = small()
    groups = model.parameter_groups()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, exempt = ({names[id(p)] for p in groups[group]} for group in (HEAD, HEAD + NO_DECAY))
    assert not decayed & exempt
    assert set(names.values()) - decayed - exempt == {n for n, p in model.named_parameters() if not p.requires_grad}
    assert all("norm" in n.lower() or "position_bias" in n or n.split(".")[-2] in "12" for n in exempt)
    assert {"image_model.layers.0.fusion.image_lang_att.W.1.bias", "image_model.layers.1.mixer.1.weight"} <= exempt
    assert {"classifier.pixel_decoder.input_proj.0.1.weight", "image_model.layers.0.pyramids.2.2.bias"} <= exempt
    assert "language_model.embeddings.word_embeddings.weight" in decayed


def test_folder_and_shapes_give_the_model_back(tmp_path):
    model = small()
    images, tokens, _ = batch()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded(images, tokens), model(images, tokens))
    assert loaded.train() is loaded
    inferred = type(model).infer_config(model.state_dict())
    assert (inferred.language_mask, inferred.class_score, inferred.decoder_heads) == ("released", "off", 4)
    known = {name: getattr(model.config, name) for name in ("bert", *MagNetConfig.not_in_shapes)}
    assert MagNetConfig(**{**vars(inferred), **known}) == model.config


def test_tiny_preset_trains_is_scored_saved_loaded_and_asked(tmp_path):
    config = TrainConfig(
        model="magnet_tiny", dataset="synthetic", device="cpu", output_folder=tmp_path, epochs=1, batch_size=4,
        base_lr=1e-3, workers=0, workers_val=0, pictures=0, max_steps=2, input_size=64, evaluate=False,
        extra={"depths": (1, 1, 1, 1), "query_layers": 1, "pixel_layers": 1, "predictor_layers": 1,
               "mask_grounding": 1.0, "alignment_loss": 0.5},
    )  # fmt: skip
    result = train(config, train_set(), val_set())
    assert result.step == 2
    told = rows(tmp_path / "log.csv")
    assert all(float(row["grounding_loss"]) > 0 and float(row["alignment_loss"]) > 0 for row in told)
    assert load_model(tmp_path / "last.pth").grounding is not None
    load_model(tmp_path / "last.pth").save_pretrained(tmp_path / "for others")
    model = load_model(tmp_path / "for others")
    assert model.grounding is None and not model.config.alignment_loss
    assert type(model).__name__ == "MagNet" and model.config.input_size == 64
    scores = evaluate(model, val_set(), sentences="first").scores
    assert scores.rule == "magnet"
    photo = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    found = Segmenter(model, device="cpu").predict(photo, ["the red circle", "a blue square"])
    assert found.masks.shape == (2, 40, 30)
