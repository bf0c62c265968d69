"""The gallery shows every row, whatever the pictures' sizes, in colours that say where masks agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastris.pictures.gallery import AGREE, EXTRA, MISSED, GalleryRow, save_gallery


def make_row(height: int = 32, width: int = 48) -> GalleryRow:
    truth, prediction = np.zeros((2, height, width), bool)
    truth[: height // 2, : width // 2] = True
    prediction[: height // 2, width // 4 : 3 * width // 4] = True
    image = np.full((height, width, 3), 120, np.uint8)
    return GalleryRow(
        image, "the grey thing that a very long phrase describes in every detail " * 3, truth, prediction, 0.3
    )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_gallery_grows_with_its_rows(tmp_path, count):
    sizes = [
        Image.open(save_gallery(tmp_path / f"{n}.png", [make_row()] * n, "title")).size for n in (count, count + 2)
    ]
    assert sizes[1][1] > sizes[0][1] and sizes[1][0] == sizes[0][0]


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (640, 480)])
def test_pictures_of_any_size_are_shown(tmp_path, size):
    assert save_gallery(tmp_path / "deep" / "gallery.png", [make_row(*size)], "title").is_file()


def test_overlay_tells_agreement_from_misses_and_extras(tmp_path):
    picture = np.asarray(Image.open(save_gallery(tmp_path / "gallery.png", [make_row()], "title"))).astype(int)
    overlay = picture[150:320, 680:870]  # below the legend, which has the same colours
    for colour in (AGREE, MISSED, EXTRA):
        toned = 0.75 * np.array(colour) + 0.25 * 192
        assert (np.abs(overlay - toned).max(axis=-1) < 12).sum() > 300, colour


@pytest.mark.parametrize("phrase", ["two\nlines\x1b[2J", "odd \udcff bytes", "long " * 50_000])
def test_any_phrase_can_be_drawn(tmp_path, phrase):
    assert save_gallery(tmp_path / "gallery.png", [make_row()._replace(phrase=phrase)], "title").stat().st_size


def test_full_disk_leaves_the_old_gallery_and_no_half_one(tmp_path, monkeypatch):
    path = save_gallery(tmp_path / "gallery.png", [make_row()], "title")
    before = path.read_bytes()

    def fill_the_disk(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    with pytest.raises(OSError, match=r"could not write .*gallery\.png: No space left on device"):
        save_gallery(path, [make_row()], "title")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_gallery_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows is empty"):
        save_gallery(tmp_path / "gallery.png", [], "title")
