"""CRIS's contract beyond the golden numbers: sizes, sharing one image among expressions, configuration, bad input."""

from __future__ import annotations

import warnings

import pytest
import torch
from model_helpers import make_tokens, small_config

from fastris import CRIS, CRISConfig

PUBLISHED_YAML = """
DATA:
  dataset: refcoco
  train_lmdb: datasets/lmdb/refcoco/train.lmdb
  mask_root: datasets/masks/refcoco
TRAIN:
  clip_pretrain: pretrain/RN50.pt
  input_size: 416
  word_len: 17
  word_dim: 1024
  vis_dim: 512
  fpn_in: [512, 1024, 1024]
  fpn_out: [256, 512, 1024]
  sync_bn: True
  num_layers: 3
  num_head: 8
  dim_ffn: 2048
  dropout: 0.1
  intermediate: False
  epochs: 50
  weight:  # path to initial weight
Distributed:
  dist_backend: 'nccl'
TEST:
  visualize: False
"""


@pytest.fixture(scope="module")
def model() -> CRIS:
    torch.manual_seed(0)
    return CRIS(small_config()).eval()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 128), (96, 32), (160, 64)])
@pytest.mark.parametrize("length", [2, 17, 77])
def test_any_multiple_of_32_and_any_length_up_to_77_gives_logits_at_a_quarter(model, height, width, length):
    logits = model(torch.randn(2, 3, height, width), make_tokens(length, 2, width=length))
    assert logits.shape == (2, 1, height // 4, width // 4)
    assert torch.isfinite(logits).all() and not logits.requires_grad


def test_shared_encoding_gives_the_values_of_one_by_one(model):
    images, tokens = torch.randn(3, 3, 64, 96), make_tokens(5, 9, 3, 4, 7)
    index = torch.tensor([2, 0, 0, 1, 2])
    with torch.no_grad():
        together = model.segment(model.encode_image(images), tokens, index)
        alone = torch.cat([model(images[i : i + 1], tokens[e : e + 1]) for e, i in enumerate(index)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * alone.abs().max().item())


def test_padding_words_change_nothing(model):
    images, tokens = torch.randn(2, 3, 64, 64), make_tokens(5, 4, width=17)
    with torch.no_grad():
        torch.testing.assert_close(model(images, tokens), model(images, tokens[:, :5]), rtol=0, atol=1e-5)


def test_padding_that_all_sentences_share_is_not_computed(model, monkeypatch):
    seen = []
    encode_text = model.backbone.encode_text
    monkeypatch.setattr(model.backbone, "encode_text", lambda tokens: seen.append(tokens.shape) or encode_text(tokens))
    tokens = torch.tensor([[94, 5, 95, 0, 0, 0], [94, 0, 0, 7, 95, 0]])  # 0 inside a sentence is a word to CLIP
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64), tokens)
        model(torch.randn(2, 3, 64, 64), torch.zeros_like(tokens))
    assert seen == [(2, 5), (2, 1)]


def test_training_returns_prediction_target_and_a_loss_that_reaches_every_trained_parameter():
    model = CRIS(small_config()).train()
    images, mask = torch.randn(2, 3, 64, 64), (torch.rand(2, 1, 64, 64) > 0.5).float()
    prediction, target, loss = model(images, make_tokens(5, 4), mask)
    assert prediction.shape == target.shape == (2, 1, 16, 16) and not prediction.requires_grad
    torch.testing.assert_close(target, mask[:, :, ::4, ::4])
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"backbone.logit_scale"}


def test_intermediate_maps_leave_the_logits_as_they_are():
    torch.manual_seed(0)
    plain = CRIS(small_config(num_layers=2)).eval()
    listing = CRIS(small_config(num_layers=2, intermediate=True)).eval()
    listing.load_state_dict(plain.state_dict())
    images, tokens = torch.randn(1, 3, 64, 64), make_tokens(4)
    assert torch.equal(plain(images, tokens), listing(images, tokens))
    features = torch.randn(1, 32, 4, 4), torch.randn(1, 4, 32), torch.zeros(1, 4, dtype=torch.bool)
    assert [tuple(output.shape) for output in listing.decoder(*features)] == [(1, 32, 16)] * 2


def bad_calls():
    image, tokens = torch.randn(1, 3, 64, 64), make_tokens(4)
    yield "multiples of 32", lambda m: m(torch.randn(1, 3, 60, 64), tokens)
    yield r"img must be \(B, 3, H, W\)", lambda m: m(torch.randn(3, 64, 64), tokens)
    yield "img must be floating point", lambda m: m(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), tokens)
    yield "word must hold integer", lambda m: m(image, tokens.float())
    yield "word must be token ids", lambda m: m(image, tokens[0])
    yield "positions for 1 to 77", lambda m: m(image, make_tokens(78, width=78))
    yield "positions for 1 to 77", lambda m: m(image, tokens[:, :0])
    yield "1 images and 2 expressions", lambda m: m(image, make_tokens(3, 4))
    yield "index must name images 0 to 0", lambda m: m.segment(m.encode_image(image), tokens, torch.tensor([1]))
    yield "index must be int64", lambda m: m.segment(m.encode_image(image), tokens, torch.tensor([0.0]))

    yield "img holds no images", lambda m: m(image[:0], tokens[:0])
    yield "img holds no images", lambda m: m.encode_image(image[:0])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        yield "convert it with img.to", lambda m, dtype=dtype: m(image.to(dtype), tokens)
    yield "img must be a tensor, got ndarray", lambda m: m(image.numpy(), tokens)
    yield "word must be a tensor, got NoneType", lambda m: m(image, None)
    for dtype in (torch.uint8, torch.int16, torch.bool):
        yield r"use word\.long\(\)", lambda m, dtype=dtype: m(image, tokens.to(dtype))
    yield "word must hold token ids 0 to 95, got 0 to 96", lambda m: m(image, torch.tensor([[94, 96, 0]]))
    yield "word must hold token ids 0 to 95, got -1", lambda m: m(image, torch.tensor([[94, -1, 95]]))
    yield "features must be what encode_image returns", lambda m: m.segment(tuple(m.encode_image(image)), tokens)
    yield r"mask \(B, 1, H, W\) is needed", lambda m: m.loss(m.encode_image(image), tokens, None)
    yield "mask must be floating point", lambda m: m.loss(m.encode_image(image), tokens, torch.ones(1, 1, 8, 8) > 0)
    yield "mask must have pixels", lambda m: m.loss(m.encode_image(image), tokens, torch.ones(1, 1, 8, 0))


@pytest.mark.parametrize(("message", "call"), list(bad_calls()))
def test_bad_input_gets_one_error_that_names_the_argument(model, message, call):
    with pytest.raises((ValueError, TypeError), match=message):
        call(model)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "mask .* is needed in training mode"),
        (torch.rand(1, 64, 64), r"mask must be \(1, 1, H, W\)"),
        (torch.ones(1, 1, 64, 64, dtype=torch.bool), "mask must be floating point"),
    ],
)
def test_bad_mask_in_training_is_named(mask, message):
    model = CRIS(small_config()).train()
    with pytest.raises((ValueError, TypeError), match=message):
        model(torch.randn(1, 3, 64, 64), make_tokens(4), mask)


@pytest.mark.parametrize(
    ("expressions", "message"), [(0, "word holds no expressions"), (1, "word holds one expression, but BatchNorm")]
)
def test_batch_too_small_for_batchnorm_is_told_in_training(expressions, message):
    model = CRIS(small_config()).train()
    images, tokens, masks = torch.randn(2, 3, 64, 64), make_tokens(4, 5), torch.ones(2, 1, 64, 64)
    with pytest.raises(ValueError, match=message):
        model(images[:expressions], tokens[:expressions], masks[:expressions])


def test_no_expressions_about_images_give_no_logits(model):
    none = torch.zeros(0, dtype=torch.int64)
    features = model.encode_image(torch.randn(2, 3, 64, 64))
    assert model.segment(features, make_tokens(4)[:0], none).shape == (0, 1, 16, 16)


def test_int32_tokens_and_bfloat16_images_under_autocast_are_taken(model):
    images, tokens = torch.randn(1, 3, 64, 64), make_tokens(4)
    assert torch.equal(model(images, tokens), model(images, tokens.int()))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images.bfloat16(), tokens).isfinite().all()


def test_published_yaml_is_read_without_a_warning(tmp_path):
    path = tmp_path / "cris_r50.yaml"
    path.write_text(PUBLISHED_YAML)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CRISConfig.from_yaml(path) == CRISConfig.preset("cris_r50")


def test_unknown_yaml_keys_are_named_in_a_warning_and_missing_ones_in_an_error(tmp_path):
    path = tmp_path / "cris.yaml"
    path.write_text(PUBLISHED_YAML.replace("num_head: 8", "num_heads: 8\n  num_head: 8"))
    with pytest.warns(UserWarning, match=r"num_heads \(did you mean num_head\?\)"):
        CRISConfig.from_yaml(path)
    path.write_text(PUBLISHED_YAML.replace("  vis_dim: 512\n", "").replace("  dim_ffn: 2048\n", ""))
    with pytest.raises(ValueError, match="lacks the model keys dim_ffn, vis_dim"):
        CRISConfig.from_yaml(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        CRISConfig.from_yaml(tmp_path / "nowhere.yaml")


def test_configuration_survives_a_round_trip_through_a_dict():
    config = CRISConfig.preset("cris_r101")
    assert CRISConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vis_dim": 64}, "vis_dim is 64 but must be 32"),
        ({"word_dim": 64}, "word_dim is 64 but must be 48"),
        ({"num_head": 5}, "divisible by 4 and by num_head"),
        ({"input_size": 100}, "input_size must be a positive multiple of 32"),
        ({"word_len": 78}, "word_len must be between 2 and 77"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
