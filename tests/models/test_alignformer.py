"""AlignFormer's behaviour where no released number tells: lengths, sizes, modes, groups, files and a short training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from training_helpers import train_set, val_set

import fastris
from fastris import AlignFormerConfig, Segmenter
from fastris.commands.train import TrainConfig, train
from fastris.evaluation.evaluate import evaluate
from fastris.models import registry
from fastris.models.alignformer.pixel_decoder import Words
from fastris.training.optim import build_optimizer
from fastris.weights.load import load_model

pytest.importorskip("transformers", reason="AlignFormer's text encoder is BERT: pip install 'fastris[alignformer]'")

SMALL = {
    "bert": {
        "vocab_size": 30,
        "hidden_size": 32,
        "num_hidden_layers": 1,
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
    "pixel_layers": 1,
    "pixel_ffn": 32,
    "word_ffn": 32,
    "query_layers": 2,
    "query_ffn": 32,
    "input_size": 64,
}


def small(**changes):
    torch.manual_seed(0)
    model = registry.create(AlignFormerConfig(**{**SMALL, **changes})).eval()
    for stage in model.backbone.layers:  # open gates: closed ones would hide what passes them
        for gate in (stage.res_gate, stage.sym_res_gate):
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


def test_trimmed_sentences_equal_padded_ones_in_loss_and_gradients():
    model = small().double()
    images, tokens, mask = batch()
    images, mask = images.double(), mask.double()
    results = []
    for used in (tokens, tokens[:, :5]):
        with fastris.use_impl("reference"):  # which trims nothing
            loss, logits = model.loss(model.encode_image(images), used, mask)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        results.append((loss, logits, *torch.autograd.grad(loss, parameters)))
    for padded, trimmed in zip(*results, strict=True):
        torch.testing.assert_close(padded, trimmed, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(images, tokens), results[0][1].detach(), rtol=1e-9, atol=1e-9)
    assert model._fitted(tokens).shape == (2, 5)


def test_compat_pads_to_the_released_length_and_computes_the_same():
    model, compat = small().double(), small(behaviour="compat").double()
    compat.load_state_dict(model.state_dict())
    images, tokens, _ = batch()
    assert compat._fitted(tokens[:, :5]).shape == (2, 9)
    torch.testing.assert_close(compat(images.double(), tokens[:, :5]), model(images.double(), tokens))


def test_gates_start_closed_in_intended_and_open_in_compat_but_never_twice_zero():
    for behaviour, closed in (("intended", True), ("compat", False)):
        model = registry.create(AlignFormerConfig(**SMALL, behaviour=behaviour))
        for stage in model.backbone.layers:
            for gate in (stage.res_gate, stage.sym_res_gate):
                assert bool(gate[2].weight.any()) is not closed and gate[0].weight.any()


def test_closed_gates_learn_from_the_first_step_on_and_the_last_have_no_gradient():
    model = registry.create(AlignFormerConfig(**SMALL)).train()
    images, tokens, mask = batch()
    model(images, tokens, mask)[2].backward()
    gates = {name: p for name, p in model.named_parameters() if "res_gate" in name}
    alive = {name for name, p in gates.items() if p.grad is not None and p.grad.any()}
    assert alive == {name for name in gates if ".2.weight" in name and not name.startswith("backbone.layers.3")}
    assert {name for name, p in gates.items() if not p.requires_grad} == {
        name for name in gates if name.startswith("backbone.layers.3")
    }


@pytest.mark.parametrize("size", [(31, 31), (33, 47), (64, 20), (90, 66), (1, 1)])
def test_images_of_any_size_get_logits_of_that_size(size):
    model = small()
    images, tokens, _ = batch(size)
    logits = model(images, tokens)
    assert logits.shape == (2, 1, *size) and logits.isfinite().all()
    together = model(images[:1], tokens[None, :1])
    torch.testing.assert_close(together, logits[:1], rtol=1e-4, atol=1e-4)


def test_one_pixel_in_the_last_stage_is_refused_in_training_only():
    model = small().train()
    images, tokens, mask = batch((32, 31))
    with pytest.raises(ValueError, match="img is 32x31 pixels, of which the last stage sees one"):
        model(images, tokens, mask)
    images, tokens, mask = batch((33, 20))
    assert model(images, tokens, mask)[2].isfinite()


@pytest.mark.parametrize("lengths", [(1, 4), (0, 3), (0, 0), (9, 9)])
def test_one_word_and_nothing_but_padding_stay_finite_with_their_gradients(lengths):
    model = small().train()
    images, tokens, mask = batch(lengths=lengths)
    model.instance_contrast = 0.1
    _, _, loss = model(images, tokens, mask)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_sentence_of_nothing_but_padding_is_heard_as_zeros_on_every_device():
    model = small()
    decoder = model.classifier.pix_dec
    torch.nn.init.normal_(decoder.transformer.encoder.cross_attn_layers[0].cross_attn.in_proj_bias)
    maps = [torch.randn(1, width, 8 >> n, 8 >> n) for n, width in enumerate(model.config.widths[1:])]
    silent, zeros = torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 4, 32)
    found = decoder.decode_levels(maps, Words(zeros, silent))
    torch.testing.assert_close(found, decoder.decode_levels(maps, Words(zeros, ~silent)))


def test_bfloat16_autocast_stays_close_and_the_loss_is_float32():
    model = small().train()
    images, tokens, mask = batch()
    with torch.no_grad():
        _, _, exact = model(images, tokens, mask)
        with torch.autocast("cpu", torch.bfloat16):
            logits, _, loss = model(images, tokens, mask)
    assert loss.dtype == logits.dtype == torch.float32
    assert abs(float(loss / exact) - 1) < 0.05


def test_empty_whole_and_other_sized_masks_have_a_loss():
    model = small().train()
    model.instance_contrast = 0.1
    images, tokens, _ = batch()
    for mask in (torch.zeros(2, 1, 64, 64), torch.ones(2, 1, 64, 64), torch.ones(2, 1, 40, 90)):
        assert model(images, tokens, mask)[2].isfinite()


def test_loss_is_the_sum_over_all_outputs_with_the_objects_pixels_weighted():
    model = small()
    images, tokens, mask = batch()
    scored = model.score(model.encode_image(images), tokens)
    outputs = torch.nn.functional.interpolate(scored.logits, (64, 64), mode="bilinear").split(1, dim=1)
    weight = torch.tensor(1.1)
    terms = [torch.nn.functional.binary_cross_entropy_with_logits(o, mask, pos_weight=weight) for o in outputs]
    loss, logits = model.loss(model.encode_image(images), tokens, mask)
    assert len(terms) == 3
    torch.testing.assert_close(loss, torch.stack(terms).sum())
    torch.testing.assert_close(logits, outputs[-1])


def test_wrong_arguments_are_one_error_that_names_them():
    model = small()
    images, tokens, _ = batch()
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


def test_optimizer_decays_no_norm_of_the_image_encoder_and_never_moves_berts_embeddings():
    model = small()
    groups = build_optimizer(model.parameter_groups(), {"head": 0.1, "head, no decay": 0.1}, 0.01).param_groups
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("head", 0.01), ("head, no decay", 0.0)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, exempt = ({names[id(p)] for p in group["params"]} for group in groups)
    assert set(names.values()) - decayed - exempt == {n for n in names.values() if "text_encoder.embeddings." in n}
    assert all(n.startswith("backbone.") and ("norm" in n or "position_bias_table" in n) for n in exempt)
    assert {"backbone.norm0.weight", "backbone.layers.1.blocks.0.attn.relative_position_bias_table"} <= exempt
    assert {"backbone.layers.1.blocks.0.attn.qkv.bias", "classifier.pix_dec.adapter_1.1.weight"} <= decayed
    assert model.text_encoder.embeddings.word_embeddings.weight.requires_grad


def test_folder_and_shapes_give_the_model_back(tmp_path):
    model = small()
    images, tokens, _ = batch()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded(images, tokens), model(images, tokens))
    inferred = type(model).infer_config(model.state_dict())
    known = {"bert": model.config.bert, "vocabulary": "built-in", "drop_path": 0.0, "input_size": 64}
    assert type(model).infer_config(model.state_dict()).depths == (1, 2, 1, 1)
    assert inferred.behaviour == "compat" and inferred.vocabulary == AlignFormerConfig().vocabulary
    assert AlignFormerConfig(**{**vars(inferred), **known, "behaviour": "intended"}) == model.config


def test_tiny_preset_trains_is_scored_saved_loaded_and_asked(tmp_path):
    changes = {"bert": AlignFormerConfig.preset("alignformer_tiny").bert, "depths": (1, 1, 1, 1), "query_layers": 1}
    config = TrainConfig(
        model="alignformer_tiny", dataset="synthetic", device="cpu", output_folder=tmp_path, epochs=1, batch_size=4,
        base_lr=1e-3, workers=0, workers_val=0, pictures=0, max_steps=2, input_size=64, evaluate=False,
        extra={"depths": changes["depths"], "query_layers": 1, "pixel_layers": 1},
    )  # fmt: skip
    result = train(config, train_set(), val_set())
    assert result.step == 2
    model = load_model(tmp_path / "last.pth")
    assert type(model).__name__ == "AlignFormer" and model.config.input_size == 64
    scores = evaluate(model, val_set(), sentences="first").scores
    assert 0 <= scores.best_by <= 1 or 0 <= scores.best_by <= 100
    photo = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    found = Segmenter(model, device="cpu").predict(photo, ["the red circle", "a blue square"])
    assert found.masks.shape == (2, 40, 30)
