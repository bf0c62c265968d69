"""LabelMe's files, as the tool saves them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastris.commands import cli
from fastris.data import DataError, load_dataset
from fastris.data.formats.pictures import SHARED

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


def shape(label: str, *points: tuple[float, float], kind: str = "polygon", **more: Any) -> dict[str, Any]:
    row = {"label": label, "points": [list(point) for point in points], "shape_type": kind, "group_id": None}
    return row | {"description": "", "flags": {}, "mask": None} | more


def box(label: str, left: int, **more: Any) -> dict[str, Any]:
    """A rectangle of 4 x 4 pixels at the top."""
    return shape(label, (left + 4, 4), (left, 0), kind="rectangle", **more)


def png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def labelled(root: Path, shapes: Any, file: str = "a.json", **changes: Any) -> Path:
    """A picture of 20 x 10 pixels with these shapes."""
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    picture = (root / file).with_suffix(".png")
    Image.new("RGB", (20, 10)).save(picture)
    row = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": picture.name, "imageData": None}
    (root / file).write_text(json.dumps(row | {"imageHeight": 10, "imageWidth": 20} | changes))
    return root


def told(data: Any) -> dict[Any, tuple[tuple[str, ...], int]]:
    """Id -> sentences, and the number of pixels of the mask."""
    references = [data.reference(index) for index in range(len(data))]
    return {ref.ref_id: (ref.sentences, int(data.mask(i).sum())) for i, ref in enumerate(references)}


def test_every_shape_that_encloses_something_is_a_mask(tmp_path: Path) -> None:
    part = np.zeros((3, 2), bool)
    part[0] = True
    shapes = [
        box("red_cat", 0),
        shape("b", (5, 0), (9, 0), (9, 5), (5, 5), description=" the tall one\n\nb "),
        shape("mask", (11, 1), (12, 3), kind="mask", mask=png(part)),
        shape("disc", (16, 5), (16, 9), kind="circle"),
        box("cat", 0, group_id=7),
        box("cat", 12, group_id=7),
    ]
    data = load_dataset("folder", "train", labelled(tmp_path, shapes))
    found = told(data)
    assert abs(found["a:3"][1] - np.pi * 16) < 4
    assert found == {
        "a:0": (("red cat",), 16),
        "a:1": (("the tall one", "b"), 20),
        "a:2": (("mask",), 2),
        "a:3": (("disc",), found["a:3"][1]),
        "a:4": (("cat",), 32),
    }
    assert np.argwhere(data.mask(2)).tolist() == [[1, 11], [1, 12]]


def test_folders_that_are_called_so_are_splits_and_shared_labels_are_told(tmp_path: Path) -> None:
    labelled(tmp_path, [box("cat", 0), box("dog", 5), box("Cat", 10)], "valid/a.json")
    labelled(tmp_path, [box("cat", 0)], "labels/b.json")
    data = load_dataset("folder", "val", tmp_path)
    assert told(data) == {"valid/a:1": (("dog",), 16)}
    assert data.skipped == {SHARED: ["valid/a:0", "valid/a:2"]}
    assert told(load_dataset("folder", "val", tmp_path, several="merge"))["valid/a:0+valid/a:2"] == (("cat",), 32)
    assert told(load_dataset("folder", "train", tmp_path)) == {"labels/b:0": (("cat",), 16)}


def test_pictures_that_were_labelled_elsewhere_are_found_by_their_names(tmp_path: Path) -> None:
    root = labelled(tmp_path / "a", [box("cat", 0)], imagePath="C:\\photos\\a.png")
    (tmp_path / "pictures").mkdir()
    (root / "a.png").rename(tmp_path / "pictures" / "a.png")
    assert told(load_dataset("folder", "train", root, images=tmp_path / "pictures")) == {"a:0": (("cat",), 16)}


def test_an_embedded_picture_stands_in_for_a_missing_file_and_is_converted(tmp_path: Path) -> None:
    shown = np.zeros((10, 20, 3), np.uint8)
    shown[:4, :4] = 200
    root = labelled(tmp_path / "a", [box("cat", 0)], imagePath="C:\\photos\\a.png", imageData=png(shown))
    for on_error in ("raise", "skip", "defer"):
        data = load_dataset("folder", "train", root) if on_error == "raise" else None
        from fastris.data.formats.labelme import LabelmeDataset

        data = data or LabelmeDataset("folder", "train", root, on_error=on_error)  # type: ignore[arg-type]
        assert (data.image(0) == shown).all()
    assert cli.main(["data", "check", str(root), "word_len=0"]) == 0
    assert cli.main(["data", "convert", str(root), f"out={tmp_path / 'out'}"]) == 0
    assert (load_dataset("folder", "train", tmp_path / "out").image(0) == shown).all()
    labelled(root, [box("cat", 0)], "b.json")  # whose picture is a file
    (root / "a.png").unlink()
    for last in ("b.json", "c.json"):  # the embedded one comes first, and then last
        before = sorted(root.iterdir())
        assert cli.main(["data", "convert", str(root), f"out={tmp_path / 'mixed'}"]) == 2
        assert sorted(root.iterdir()) == before, f"something was written through the link; {last} is last"
        if last == "b.json":
            (root / "a.json").rename(root / "c.json")
    assert cli.main(["data", "convert", str(root), f"out={tmp_path / 'mixed'}", "copy_images=true"]) == 0
    assert len(load_dataset("folder", "train", tmp_path / "mixed")) == 2


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_photo_is_turned_as_labelme_shows_it(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = np.zeros((10, 20, 3), np.uint8)
    shown[:4, :4] = 255
    root = labelled(tmp_path / "a", [box("cat", 0)])
    Image.fromarray(np.rot90(shown, 2 if orientation == 3 else 1)).save(root / "a.png", exif=exif)
    assert cli.main(["data", "convert", str(root), f"out={tmp_path / 'out'}"]) == 0
    for folder in (root, tmp_path / "out"):
        assert (load_dataset("folder", "train", folder).image(0) == shown).all()


BAD = [
    ([shape("a", (0, 0), (5, 5), kind="line")], {}, "shape 0, is a 'line', which encloses nothing; draw a polygon"),
    ([shape("a", (0, 0), (5, 5))], {}, "is a polygon of 2 points"),
    ([shape("a", (0, 0), kind="circle")], {}, "is a circle of 1 points, but it must have 2"),
    ([shape("a", (0, 0), (5, 1e300), kind="circle")], {}, "must be a list of .x, y. in pixels"),
    ([shape("a", (900, 0), (905, 0), (905, 9))], {}, "lies outside of its 10 x 20 image"),
    ([shape("a", (0, 0), (1, 1), kind="mask", mask="%%")], {}, "has a mask that is no PNG in base64"),
    ([shape("a", (0, 0), (1, 1), kind="mask", mask="AAAA")], {}, None),
    ([shape("a", (0, 0), (0, 0), (0, 0))], {}, None),
    ([box("a", 0)], {"imagePath": "../../secret.png"}, "has picture '../../secret.png', which leaves the data set"),
    ([box("a", 0)], {"imagePath": "/etc/passwd"}, "which leaves the data set.*correct it, or give images=, the folder"),
    ([box("a", 0)], {"imagePath": "A.png"}, "no file A.png in .*, but a.png, and upper and lower case differ"),
    ([box("a", 0)], {"imageHeight": 10**6, "imageWidth": 10**6}, "is out of bounds"),
    ([box("a", 0)], {"imagePath": "gone.png", "imageData": "AAA"}, None),
    ([box("a", 0)], {"imageHeight": 20, "imageWidth": 10}, None),
    ({}, {}, "has 'shapes' of type dict"),
]


@pytest.mark.parametrize(("shapes", "changes", "message"), BAD)
def test_a_wrong_shape_is_one_line_and_can_be_left_out(
    tmp_path: Path, shapes: Any, changes: dict[str, Any], message: str | None
) -> None:
    root = labelled(tmp_path / "a", shapes, **changes)
    if message is not None:
        with pytest.raises(DataError, match=message) as error:
            load_dataset("folder", "train", root)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="every one of its 1 references is unusable"):
        load_dataset("folder", "train", root, on_error="skip")
    labelled(root, [box("cat", 0)], "b.json")
    assert told(load_dataset("folder", "train", root, on_error="skip")) == {"b:0": (("cat",), 16)}
