"""One's own picture and phrases in, masks out, in Python."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastris
from fastris.data.letterbox import letterbox
from fastris.inference.masks import probability_on_image
from fastris.inference.segmenter import PHRASES_AT_ONCE, Prediction, Segmenter
from fastris.pictures.overlay import colour_of

RED, BLUE = "the red circle", "the blue square"


def photo(height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


class Corner(nn.Module):
    """Stands in for CRIS: finds the top left quarter of the square, whatever is asked, and notes its calls."""

    def __init__(self, size: int = 64, value: float = 4.0):
        super().__init__()
        self.config = SimpleNamespace(input_size=size, word_len=6)
        self.weight = nn.Parameter(torch.full((), value))
        self.encoded = 0
        self.chunks: list[int] = []

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        self.encoded += 1
        return images

    def segment(self, features: torch.Tensor, tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        assert index.tolist() == [0] * len(tokens) and not self.training
        self.chunks.append(len(tokens))
        side = self.config.input_size // 4
        logits = torch.full((len(tokens), 1, side, side), -1.0)
        logits[:, :, : side // 2, : side // 2] = 1.0
        return logits * self.weight


def corner_prediction(**kwargs: Any) -> Prediction:
    return Segmenter(Corner(**kwargs)).predict(photo(), [RED, BLUE])


def test_masks_have_the_pictures_size_and_types(model: fastris.CRIS) -> None:
    found = Segmenter(model).predict(photo(), [RED, BLUE])
    assert (found.masks.shape, found.masks.dtype) == ((2, 30, 40), np.bool_)
    assert (found.probabilities.shape, found.probabilities.dtype) == ((2, 30, 40), np.float32)
    assert found.probabilities.min() >= 0 and found.probabilities.max() <= 1
    assert found.phrases == (RED, BLUE)
    assert len(found) == 2 and [segment.phrase for segment in found] == [RED, BLUE]
    np.testing.assert_array_equal(found.image, photo())
    np.testing.assert_array_equal(found[1].mask, found.masks[1])
    assert [segment.phrase for segment in found[-1:]] == [BLUE]
    with pytest.raises(IndexError):
        found[2]


def test_one_phrase_may_be_a_plain_string(model: fastris.CRIS) -> None:
    assert Segmenter(model).predict(photo(), RED).masks.shape == (1, 30, 40)


def test_many_phrases_give_what_each_gives_alone(model: fastris.CRIS) -> None:
    segmenter = Segmenter(model)
    together = segmenter.predict(photo(), [RED, BLUE]).logits
    alone = np.concatenate([segmenter.predict(photo(), phrase).logits for phrase in (RED, BLUE)])
    np.testing.assert_allclose(together, alone, atol=1e-4 * np.abs(alone).max())
    assert np.abs(alone[0] - alone[1]).max() > 0


def test_the_image_is_encoded_once_and_phrases_go_in_chunks() -> None:
    corner = Corner()
    found = Segmenter(corner).predict(photo(), ["thing"] * 70)
    assert corner.encoded == 1
    assert corner.chunks == [PHRASES_AT_ONCE, PHRASES_AT_ONCE, 6]
    assert len(found) == 70


def test_a_look_encodes_the_image_once_for_phrases_that_come_later() -> None:
    corner = Corner()
    look = Segmenter(corner).look(photo())
    found = [look([RED, BLUE]), look(RED)]
    assert (corner.encoded, corner.chunks) == (1, [2, 1])
    assert found[0].phrases == (RED, BLUE) and found[0].image is look.image
    with pytest.raises(ValueError, match="phrases is empty"):
        look([])


def test_a_look_answers_what_predict_answers_bit_for_bit(model: fastris.CRIS) -> None:
    segmenter = Segmenter(model, threshold=0.4)
    look, expected = segmenter.look(photo()), segmenter.predict(photo(), [RED, BLUE])
    found = look([RED, BLUE])
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.masks, expected.masks)
    assert found.threshold == 0.4 and "40 x 30 pixels" in repr(look)


def test_a_look_is_refused_where_graphs_hold_both_halves() -> None:
    segmenter = Segmenter(Corner())
    segmenter._run.cuda_graph = True  # as on a GPU
    with pytest.raises(ValueError, match="cuda_graph replays picture and phrases as one"):
        segmenter.look(photo())


def test_probabilities_follow_the_published_steps(model: fastris.CRIS) -> None:
    """Spelled out here with OpenCV and PyTorch alone: letterbox, sigmoid, bicubic, inverse warp, threshold."""
    rgb, size = photo(33, 50), model.config.input_size
    found = Segmenter(model).predict(rgb, RED)
    scale = min(size / 33, size / 50)
    left, top = (size - 50 * scale) / 2, (size - 33 * scale) / 2
    corners = np.array([[0, 0], [50, 0], [0, 33]], np.float32)
    target = np.array([[left, top], [50 * scale + left, top], [left, 33 * scale + top]], np.float32)
    back = cv2.getAffineTransform(target, corners)
    probability = torch.sigmoid(torch.from_numpy(found.logits[:1])[None])
    square = nn.functional.interpolate(probability, (size, size), mode="bicubic", align_corners=True)[0, 0].numpy()
    expected = cv2.warpAffine(square, back, (50, 33), flags=cv2.INTER_CUBIC, borderValue=0.0)
    np.testing.assert_allclose(found[0].probability, expected.clip(0, 1), atol=1e-6)
    np.testing.assert_array_equal(found[0].mask, expected > 0.35)


def test_logits_are_the_models_own_for_the_letterboxed_image(model: fastris.CRIS) -> None:
    from fastris.data.tokens import tokenize

    found = Segmenter(model).predict(photo(), RED)
    image = letterbox(30, 40, model.config.input_size).warp_image(photo())
    with torch.no_grad():
        expected = model.eval()(image[None], tokenize(RED, model.config.word_len).tokens)
    np.testing.assert_allclose(found.logits, expected[:, 0].numpy(), atol=1e-5)


def test_overshoot_is_clipped_in_the_probability_but_decided_before() -> None:
    found = corner_prediction(size=64, value=50.0)
    raw = probability_on_image(found.logits[0], found.warp)
    assert raw.max() > 1 and raw.min() < 0
    assert found[0].probability.max() == 1 and found[0].probability.min() == 0


def test_score_is_the_mean_probability_inside_the_mask() -> None:
    found = corner_prediction()
    segment = found[0]
    assert segment.score == pytest.approx(segment.probability[segment.mask].mean())
    np.testing.assert_allclose(found.scores, [segment.score] * 2)
    empty = Segmenter(Corner(value=0.0), threshold=0.9).predict(photo(), RED)
    assert not empty.masks.any() and empty[0].score == 0.0


def test_threshold_decides_the_mask() -> None:
    found = Segmenter(Corner(value=0.0), threshold=0.4).predict(photo(), RED)
    assert found.masks[:, 5:-5, 5:-5].all()
    assert not Segmenter(Corner(value=0.0), threshold=0.6).predict(photo(), RED).masks.any()


def test_predicting_leaves_a_training_models_statistics_alone(model: fastris.CRIS) -> None:
    segmenter = Segmenter(model)
    model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    segmenter.predict(photo(), RED)
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 2000)])
def test_pictures_of_odd_sizes_are_segmented(model: fastris.CRIS, size: tuple[int, int]) -> None:
    found = Segmenter(model).predict(np.full((*size, 3), 90, np.uint8), RED)
    assert found.masks.shape == (1, *size)
    assert np.isfinite(found.probabilities).all()
    found.overlay(caption=True)


def test_a_path_and_a_turned_photo_work(model: fastris.CRIS, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo()).save(tmp_path / "phone.jpg", exif=exif)
    for source in (tmp_path / "phone.jpg", str(tmp_path / "phone.jpg"), Image.open(tmp_path / "phone.jpg")):
        assert Segmenter(model).predict(source, RED).masks.shape == (1, 40, 30)


@pytest.mark.parametrize(
    ("phrases", "error", "message"),
    [
        ([], ValueError, "phrases is empty"),
        ("", ValueError, r"phrases\[0\] is ''"),
        ([RED, " \t"], ValueError, r"phrases\[1\] is ' \\t', which names nothing"),
        ([RED, 3], TypeError, r"phrases\[1\] must be text, got int"),
    ],
)
def test_phrases_that_name_nothing_are_refused(phrases: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Segmenter(Corner()).predict(photo(), phrases)


def test_a_phrase_that_is_cut_is_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match="'one two three four five' is too long and was cut: the model reads 6 tokens"):
        Segmenter(Corner()).predict(photo(), ["one two three four five"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Segmenter(Corner()).predict(photo(), ["one two three four"])


def test_wrong_thresholds_and_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"threshold must lie in 0..1 \(a probability\), got 35"):
        Segmenter(Corner(), threshold=35)
    with pytest.raises(ValueError, match="device='gpu' is unknown"):
        Segmenter(Corner(), device="gpu")
    with pytest.raises(ValueError, match="device=cuda:99: PyTorch sees"):
        Segmenter(Corner(), device="cuda:99")


def test_damaged_weights_are_told_instead_of_an_empty_mask() -> None:
    with pytest.raises(RuntimeError, match="not finite"):
        Segmenter(Corner(value=float("nan"))).predict(photo(), RED)


def test_from_pretrained_gives_the_same_masks(model: fastris.CRIS, folder: str) -> None:
    loaded = fastris.Segmenter.from_pretrained(folder, device="cpu", threshold=0.5)
    assert loaded.threshold == 0.5
    expected = Segmenter(model).predict(photo(), RED).logits
    np.testing.assert_allclose(loaded.predict(photo(), RED).logits, expected, atol=1e-5)


def test_overlay_tints_the_mask_and_nothing_else() -> None:
    found = corner_prediction()
    mask, plain = found[0].mask, np.asarray(found.overlay(0, alpha=0.0))
    painted = np.asarray(found.overlay(0, alpha=1.0))
    edge = {"borderType": cv2.BORDER_CONSTANT, "borderValue": 0}
    inside = cv2.erode(mask.astype(np.uint8), np.ones((7, 7)), **edge).astype(bool)
    outside = ~cv2.dilate(mask.astype(np.uint8), np.ones((7, 7))).astype(bool)
    assert inside.any() and outside.any()
    assert (painted[inside] == colour_of(0)).all()
    assert (painted[outside] == found.image[outside]).all() and (plain[inside] == found.image[inside]).all()
    assert (np.asarray(found.overlay(1, alpha=1.0))[inside] == colour_of(1)).all()
    np.testing.assert_array_equal(found.image, photo())
    assert found.overlay().size == (40, 30)


def test_captioned_overlay_is_large_enough_to_read_and_not_huge() -> None:
    assert corner_prediction().overlay(caption=True).width >= 320
    large = Prediction(
        np.zeros((1000, 4000, 3), np.uint8), (RED,), np.zeros((1, 16, 16), np.float32), letterbox(1000, 4000, 64)
    )
    assert large.overlay(0, caption=True).width == 1600
    assert large.overlay(0).size == (4000, 1000)


def test_overlay_refuses_what_it_cannot_paint() -> None:
    with pytest.raises(ValueError, match=r"alpha must lie in 0..1"):
        corner_prediction().overlay(alpha=2)
    with pytest.raises(IndexError, match="one of the 2 phrases, got 5"):
        corner_prediction().overlay(5)
