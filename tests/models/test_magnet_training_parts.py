"""Mask Grounding and the alignment loss on MagNet: what is hidden, what the predictor sees, and what is left out."""

from __future__ import annotations

import pytest
import torch
from test_magnet import batch, small
from torch import Tensor

from fastris import MagNetConfig, for_inference
from fastris.models.magnet import training_parts
from fastris.models.magnet.training_parts import SentenceGrounding
from fastris.models.vocabulary import read_vocabulary
from fastris.nn.mask_grounding import METRICS
from fastris.nn.masked_words import DRAWS
from fastris.ops.pixel_contrast import pixel_contrast

pytest.importorskip("transformers", reason="MagNet's text encoder is BERT: pip install 'fastris[magnet]'")

IDS = read_vocabulary("built-in")
VOCABULARY = {"bert": {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
                       "intermediate_size": 32, "max_position_embeddings": 16}}  # fmt: skip
BOTH = {"mask_grounding": 1.0, "alignment_loss": 0.5}
OVR_CNN = {"predictor_layers": 6, "predictor_ffn": 768, "predictor_heads": 8}


def still(**changes):
    """A small model in training mode that drops nothing out."""
    model = small(**VOCABULARY, **changes).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if model.grounding is not None:
        for layer in model.grounding.layers:
            layer.self_attn.dropout = 0.0
    return model


def spoken(*sentences: str) -> Tensor:
    tokens = torch.zeros(len(sentences), 9, dtype=torch.int64)
    for row, sentence in enumerate(sentences):
        pieces = ["[CLS]", *sentence.split(), "[SEP]"]
        tokens[row, : len(pieces)] = torch.tensor([IDS[piece] for piece in pieces])
    return tokens


def some() -> tuple[Tensor, Tensor, Tensor]:
    images, _, mask = batch()
    return images, spoken("the red ##a ##b circle", "blue square"), mask


def with_draws(monkeypatch, *samples: float) -> None:
    """Every word is selected in the samples whose number is below a half; a piece is never left visible."""

    def draws(rows: int, length: int, device: torch.device) -> Tensor:
        found = torch.full((DRAWS, rows, length), 0.1)
        found[1] = 0.9
        found[2] = torch.tensor(samples)[:, None]
        return found

    monkeypatch.setattr(training_parts, "draw_ahead", draws)


def test_off_there_is_nothing_and_files_for_others_are_off():
    plain = small(**VOCABULARY)
    assert plain.grounding is None and plain.metric_names == () == tuple(plain.take_metrics())
    model = small(**VOCABULARY, **BOTH)
    own = {name for name in model.state_dict() if not name.startswith("grounding.")}
    assert own == set(plain.state_dict()) and model.config.for_others() == plain.config
    assert "mask_grounding" not in plain.config.to_dict()
    assert MagNetConfig.from_dict(model.config.to_dict()) == model.config


def test_marks_and_unknown_words_are_never_hidden_and_words_are_hidden_whole(monkeypatch):
    model = still(mask_grounding=1.0)
    tokens = spoken("the red ##a ##b [UNK]", "blue square")
    with_draws(monkeypatch, 0.1, 0.9)
    hidden = model.grounding.hide(tokens)
    words = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 9], dtype=torch.bool)
    assert torch.equal(hidden.masking.selected, words) and torch.equal(hidden.masking.hidden, words)
    assert torch.equal(hidden.masked, torch.where(words, IDS["[MASK]"], tokens))
    monkeypatch.undo()
    torch.manual_seed(0)
    many = tokens[:1].expand(4000, -1)
    masking = model.grounding.hide(many).masking
    assert abs(float(masking.selected.any(1).float().mean()) - 0.5) < 0.03
    pieces = masking.selected[:, 2:5]
    assert torch.equal(pieces.any(1), pieces.all(1))
    assert abs(float(masking.hidden[masking.selected].float().mean()) - 0.9) < 0.02
    apart = still(mask_grounding=1.0, whole_words=False)
    assert not torch.equal(*((found := apart.grounding.hide(many).masking.selected)[:, 2:4].T))
    assert found.any()


@pytest.mark.parametrize("twice", [False, True])
def test_the_predictor_does_not_see_what_was_hidden(monkeypatch, twice):
    model = still(mask_grounding=1.0, clean_segmentation=twice)
    images, tokens, mask = some()
    seen = []

    def forward(text, tokens, valid, selected, image, *rest):
        seen.append((text, image))
        return text.sum() * 0

    monkeypatch.setattr(model.grounding, "forward", forward)
    with_draws(monkeypatch, 0.1, 0.1)
    logits = []
    other = torch.where(model.grounding.words[tokens] & (tokens != 0), IDS["green"], tokens)
    for given in (tokens, other):
        logits.append(model.loss(model.encode_image(images), given, mask)[1])
    for one, two in zip(*seen, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(*logits) is not twice  # the segmentation hears the words only where they are encoded for it
    clean = model.eval().segment(model.encode_image(images), tokens)
    assert torch.allclose(clean, logits[0], atol=1e-5) is twice


def test_alignment_is_the_contrast_of_the_samples_that_heard_whole_sentences(monkeypatch):
    model = still(**BOTH)
    images, tokens, mask = some()
    model.grounding.forward = lambda text, *rest: text.sum() * 0
    with_draws(monkeypatch, 0.9, 0.1)
    loss, _ = model.loss(model.encode_image(images), tokens, mask)
    hidden = torch.where(torch.tensor([[False], [True]]) & model.grounding.words[tokens] & (tokens != 0), 
                         IDS["[MASK]"], tokens)  # fmt: skip
    plain = still()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("grounding.")})
    segmentation, _ = plain.loss(plain.encode_image(images), hidden[:, :7], mask)
    encoded = model._encode(images, hidden[:, :7], last_words=True)
    scored = model.classifier(encoded.maps, all_outputs=False)
    features = model.classifier.pixel_decoder.mask_features(scored.features)
    sentence = model.lang_proj(encoded.words[:1, 1:6].mean(1))  # the red ##a ##b circle
    expected = pixel_contrast(features[:1], sentence, mask[:1])
    torch.testing.assert_close(loss, segmentation + 0.5 * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [BOTH, {"mask_grounding": 1.0, "clean_segmentation": True}, {"alignment_loss": 1.0}]
)
@pytest.mark.parametrize("recompute", ["none", "stages"])
def test_every_part_that_is_on_gets_a_gradient_whatever_was_hidden(monkeypatch, changes, recompute):
    for samples in ((0.9, 0.9), (0.1, 0.9)):
        model = still(**changes).set_recompute(recompute)
        images, tokens, mask = some()
        with_draws(monkeypatch, *samples)
        loss = model(images, tokens, mask)[2]
        loss.backward()
        assert loss.isfinite()
        missing = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
        assert not missing
        asked = {name for name, p in model.named_parameters() if "pwams.3" in name or "res_gates.3" in name}
        assert all(model.get_parameter(name).requires_grad for name in asked)
        assert model.lang_proj.weight.requires_grad is bool(model.config.alignment_loss)


def test_metrics_tell_how_many_hidden_words_were_guessed(monkeypatch):
    model = still(mask_grounding=1.0)
    images, tokens, mask = some()
    assert model.metric_names == METRICS
    with_draws(monkeypatch, 0.1, 0.9)
    model(images, tokens, mask)
    found = model.take_metrics()
    assert set(found) == set(METRICS) and found["most_frequent_share"] == pytest.approx(1 / 5)
    assert model.metrics_state()["seen"].sum() == 5
    model.restore_metrics(model.metrics_state())


def test_under_autocast_their_losses_are_finite_float32(monkeypatch):
    model = still(**BOTH)
    images, tokens, mask = some()
    with_draws(monkeypatch, 0.1, 0.9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, tokens, mask)[2]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_trained_model_with_them_answers_as_one_without():
    model = small(**VOCABULARY, **BOTH)
    images, tokens, _ = some()
    made = for_inference(model)
    assert made.grounding is made.cal is None and torch.equal(made(images, tokens), model(images, tokens))
    plain = small(**VOCABULARY)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("grounding.")})
    assert torch.equal(model(images, tokens), plain(images, tokens))


def test_an_empty_batch_of_words_has_a_grounding_loss_of_zero():
    model = still(mask_grounding=1.0)
    tokens = spoken("", "")
    assert not model.grounding.hide(tokens).masking.selected.any()
    images, _, mask = some()
    loss = model(images, tokens, mask)[2]
    loss.backward()
    assert loss.isfinite()


def test_the_predictor_is_of_berts_sizes_or_of_those_that_are_asked_for():
    plain, small = (MagNetConfig(mask_grounding=1.0, vocabulary="built-in", **sizes) for sizes in ({}, OVR_CNN))
    found = []
    for config in (plain, small):
        with torch.device("meta"):
            grounding = SentenceGrounding(config)
        layers = grounding.layers
        found.append((len(layers), layers[0].linear1.out_features, layers[0].self_attn.num_heads))
        about = sum(config.parameter_counts().values()) - sum(MagNetConfig().parameter_counts().values())
        assert about == pytest.approx(sum(p.numel() for p in grounding.parameters()), rel=0.02)
    assert found == [(4, 3072, 12), (6, 768, 8)]
    assert MagNetConfig.from_dict(small.to_dict()) == small and small.for_others() == plain.for_others()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_grounding": -1.0}, "mask_grounding must be the weight of a loss, 0"),
        ({"alignment_loss": "on"}, "alignment_loss must be the weight of a loss"),
        ({"mask_rate": 0.5}, "mask_rate=0.5 would do nothing without mask_grounding"),
        ({"mask_grounding": 1.0, "mask_rate": 0}, "mask_rate must be a probability above 0"),
        ({"mask_grounding": 1.0, "clean_segmentation": 1}, "clean_segmentation must be true or false"),
        ({"mask_grounding": 1.0, "predictor_layers": 0}, "predictor_layers must be a whole number from 1"),
        ({"mask_grounding": 1.0, "predictor_ffn": -1}, "predictor_ffn must be a whole number from 1"),
        ({"mask_grounding": 1.0, "predictor_heads": False}, "predictor_heads must be a whole number from 1"),
        ({"mask_grounding": 1.0, "predictor_heads": 7}, r"predictor_heads \(7\) must divide bert.hidden_size \(768\)"),
        ({"predictor_ffn": 768}, "predictor_ffn=768 would do nothing without mask_grounding"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        MagNetConfig(**fields)


def test_a_vocabulary_without_a_mask_is_one_line(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n")
    with pytest.raises(ValueError, match=r"mask_grounding needs a vocabulary with \[MASK\]"):
        small(mask_grounding=1.0, vocabulary=str(tmp_path / "vocab.txt"))
