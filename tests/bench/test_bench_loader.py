from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[2]))  # bench/ is no installed package: it is run from a checkout

from bench.studies import loader
from fastris.data import load_dataset


def test_the_tree_has_images_of_cocos_size_and_masks_that_decode(tmp_path: Path) -> None:
    data = load_dataset("folder", "train", loader.make_tree(tmp_path, images=2, references=3, quality=90))
    assert (len(data), len(data.by_image())) == (6, 2)
    for index in range(len(data)):
        assert data.image(index).shape == (480, 640, 3)
        assert 1000 < data.mask(index).sum() < 100_000
    with Image.open(tmp_path / "images" / "0.jpg") as image:
        assert image.format == "JPEG"
    assert 80_000 < (tmp_path / "images" / "0.jpg").stat().st_size < 300_000


@pytest.mark.parametrize(("need", "code", "verdict"), [(0.001, 0, "enough"), (1e9, 1, "too slow, give it ")])
def test_the_rate_is_compared_with_what_a_step_needs(
    need: float, code: int, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["images=2", "references=1", "workers=0", "seconds=0.01", "input_size=32"]
    assert loader.main([*options, f"need={need}"]) == code
    printed = capsys.readouterr().out
    assert "images/s per worker" in printed
    assert verdict in printed


def test_wrong_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert loader.main(["images=0"]) == 2
    assert capsys.readouterr().err == "bench.studies.loader: images must be at least 1, got 0\n"
