"""One's own picture and phrases in, masks out: in Python and on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
from fastris.commands.cli import main
from fastris.data.letterbox import letterbox
from fastris.inference.masks import probability_on_image
from fastris.inference.segmenter import PHRASES_AT_ONCE, Prediction, Segmenter
from fastris.pictures.overlay import colour_of

RED, BLUE = "the red circle", "the blue square"


def photo(height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def model() -> fastris.CRIS:
    torch.manual_seed(0)
    return fastris.CRIS(fastris.CRISConfig.preset("tiny"))


@pytest.fixture(scope="module")
def folder(model: fastris.CRIS, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder)


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
    with pytest.warns(UserWarning, match="'one two three four five' is too long: only its first 4 tokens are read"):
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


def run(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["predict", *args])
    return code, *capsys.readouterr()


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_the_command_writes_mask_probability_overlay_and_a_table(
    folder: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "deep"
    code, printed, errors = run([picture, RED, "50 % of x=y!", f"model={folder}", f"out={out}"], capsys)
    assert (code, errors) == (0, "")
    assert "photo_1_the-red-circle_{mask,probability,overlay}.png" in printed and "50 % of x=y!" in printed
    records = json.loads((out / "predictions.json").read_text())
    assert [record["phrase"] for record in records] == [RED, "50 % of x=y!"]
    assert records[1]["mask"] == "photo_2_50-of-x-y_mask.png"
    expected = Segmenter.from_pretrained(folder, device="cpu").predict(photo(), RED)[0]
    mask, probability = (np.asarray(Image.open(out / records[0][kind])) for kind in ("mask", "probability"))
    np.testing.assert_array_equal(mask, expected.mask * 255)
    np.testing.assert_allclose(probability / 255, expected.probability, atol=0.01)
    assert records[0]["share"] == pytest.approx(expected.mask.mean())
    assert records[0]["score"] == pytest.approx(expected.score, abs=1e-5)
    assert Image.open(out / records[0]["overlay"]).width >= 320
    assert len(list(out.iterdir())) == 7


def test_a_second_run_keeps_the_first_ones_entries(
    folder: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"model={folder}", f"out={tmp_path / 'out'}"]
    for phrase in (RED, BLUE, BLUE):
        assert run([picture, phrase, *options], capsys)[0] == 0
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [record["phrase"] for record in records] == [RED, BLUE]
    other = tmp_path / "elsewhere" / "photo.png"
    other.parent.mkdir()
    Image.fromarray(photo()).save(other)
    assert "replaced pictures of" in run([str(other), RED, *options], capsys)[2]


def test_nothing_found_is_said(folder: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run([picture, RED, f"model={folder}", f"out={tmp_path / 'o'}", "threshold=1"], capsys)
    assert code == 0
    assert f"nothing found for '{RED}': probabilities reach 0." in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "IMAGE is missing"),
        (["PICTURE"], "PHRASES is missing"),
        (["PICTURE", RED], "model=... is missing (model folder (`fastris demo`"),
        (["PICTURE", " ", "model=FOLDER"], "phrases[0] is ' '"),
        (["none.png", RED, "model=FOLDER"], "image none.png does not exist"),
        (["PICTURE", RED, "model=none.pth"], "none.pth"),
        (["PICTURE", RED, "model=FOLDER", "threshold=2"], "threshold must lie in 0..1"),
        (["PICTURE", RED, "model=FOLDER", "device=gpu"], "device='gpu' is unknown"),
        (["PICTURE", RED, "model=FOLDER", "out=PICTURE"], "is a file; give a folder"),
        (["PICTURE", RED, "modell=FOLDER"], "did you mean model?"),
    ],
)
def test_each_mistake_is_one_line_and_exit_code_2(
    args: list[str], message: str, folder: str, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [arg.replace("PICTURE", picture).replace("FOLDER", folder) for arg in args]
    code, printed, errors = run(given, capsys)
    assert (code, printed) == (2, "")
    assert errors.startswith("fastris predict: ") and errors.count("\n") == 1
    assert message in errors


def test_a_foreign_predictions_json_is_not_overwritten(
    folder: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in ("{}x", "{}", '{"mine": 1}', "[1]", '[{"mask": 3}]'):
        (tmp_path / "predictions.json").write_text(content)
        code, _, errors = run([picture, RED, f"model={folder}", f"out={tmp_path}"], capsys)
        assert code == 2 and "was not written by `fastris predict`" in errors
        assert (tmp_path / "predictions.json").read_text() == content


def test_full_disk_leaves_all_pictures_of_a_phrase_or_none(
    folder: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = Image.Image.save, []

    def fill_the_disk(self: Image.Image, file: Any, **options: Any) -> None:
        saved.append(file)
        save(self, file, **options)
        if len(saved) == 5:  # the second phrase's second
            Path(file).write_bytes(b"")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    out = tmp_path / "out"
    code, printed, errors = run([picture, RED, BLUE, f"model={folder}", f"out={out}"], capsys)
    assert (code, printed, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("fastris predict: could not write ") and "No space left on device" in errors
    first = [f"photo_1_the-red-circle_{kind}.png" for kind in ("mask", "overlay", "probability")]
    assert sorted(path.name for path in out.iterdir()) == [*first, "predictions.json"]
    assert [record["phrase"] for record in json.loads((out / "predictions.json").read_text())] == [RED]


def test_odd_names_and_phrases_are_printed_escaped_and_kept_as_they_are(
    folder: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / os.fsdecode(b"odd\xff\x1b[31m.png")
    odd.write_bytes(Path(picture).read_bytes())
    code, printed, errors = run([str(odd), "red\x1b]0;x\x07", f"model={folder}", f"out={tmp_path / 'o'}"], capsys)
    assert (code, errors) == (0, "")
    assert "\x1b" not in printed and r"odd\udcff\x1b[31m.png: 40 x 30" in printed and r"red\x1b]0;x\x07" in printed
    (record,) = json.loads((tmp_path / "o" / "predictions.json").read_text())
    assert record["image"] == str(odd) and record["phrase"] == "red\x1b]0;x\x07"
    code, _, errors = run([picture, "red\udcff", f"model={folder}"], capsys)
    assert code == 2 and r"phrases[0] is 'red\udcff', which is no text in UTF-8" in errors


def test_a_long_name_in_any_script_gives_names_that_a_file_system_takes(
    folder: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / ("\u65e5" * 80 + ".png")
    image.write_bytes(Path(picture).read_bytes())
    assert run([str(image), "red " * 20, f"model={folder}", f"out={tmp_path / 'o'}"], capsys)[0] == 0


MEASURE = """
import resource, sys
from fastris.commands.predict import PredictConfig, run
from PIL import Image
Image.init()
model, picture, small, out = sys.argv[1:]
run(PredictConfig(image=small, phrases=("red",), model=model, out=out))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
run(PredictConfig(image=picture, phrases=("red", "blue"), model=model, out=out))
print((peak() - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the resident set in KiB, as Linux does")
def test_a_large_picture_takes_a_dozen_bytes_a_pixel(folder: str, picture: str, tmp_path: Path) -> None:
    side = 5000
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(tmp_path / "large.png", compress_level=1)
    command = [sys.executable, "-c", MEASURE, folder, str(tmp_path / "large.png"), picture, str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout.splitlines()[-1]) / side**2 < 12
