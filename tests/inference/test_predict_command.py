"""The command ``fastris predict``: the files it leaves, and what it says about mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_segmenter import BLUE, RED, photo

from fastris.commands.cli import main
from fastris.inference.segmenter import Segmenter


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
    assert len(list(out.iterdir())) == 8


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
    assert sorted(path.name for path in out.iterdir()) == [*first, "predictions.json", "predictions.jsonl"]
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
