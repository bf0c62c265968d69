"""CVAT for images 1.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastris.commands import cli
from fastris.data import DataError, load_dataset
from fastris.data.formats.cvat import OUTSIDE
from fastris.data.formats.pictures import SHARED

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

BOX = '<box label="{}" occluded="0" xtl="{}" ytl="0" xbr="{}" ybr="4" {}>{}</box>'


def box(label: str, left: int, more: str = "", inner: str = "") -> str:
    """A box of 4 x 4 pixels at the top."""
    return BOX.format(label, left, left + 4, more, inner)


def cvat(
    root: Path, *shapes: str, file: str = "annotations.xml", image: str = "", picture: str = "images/a.png"
) -> Path:
    """A picture of 20 x 10 pixels with these shapes."""
    (root / picture).parent.mkdir(parents=True, exist_ok=True)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10)).save(root / picture)
    image = image or '<image id="0" name="a.png" width="20" height="10">'
    text = f'<?xml version="1.0" encoding="utf-8"?><annotations>{image}{"".join(shapes)}</image></annotations>'
    (root / file).write_text(text, encoding="utf-8")
    return root


def told(data: Any) -> dict[Any, tuple[tuple[str, ...], int]]:
    """Id -> sentences, and the number of pixels of the mask."""
    references = [data.reference(index) for index in range(len(data))]
    return {ref.ref_id: (ref.sentences, int(data.mask(i).sum())) for i, ref in enumerate(references)}


def test_every_shape_that_encloses_something_is_a_mask(tmp_path: Path) -> None:
    phrase = '<attribute name="colour">red</attribute><attribute name="Caption">the one\nleft</attribute>'
    root = cvat(
        tmp_path,
        box("red_cat", 0, 'z_order="1"', phrase),
        '<polygon label="b" occluded="1" points="5,0;9,0;9,5;5,5"/>',
        '<mask label="mask" rle="1, 1, 2, 2" left="10" top="1" width="3" height="2"/>',
        '<ellipse label="disc" cx="16" cy="5" rx="4" ry="2" rotation="90"/>',
        '<box label="turned" xtl="4" ytl="4" xbr="10" ybr="6" rotation="90"/>',
        box("tail", 0, 'group_id="3"'),
        box("tail", 12, 'group_id="3"'),
        '<tag label="indoors"/>',
    )
    data = load_dataset("folder", "train", root)
    found = told(data)
    assert abs(found["a.png:3"][1] - np.pi * 8) < 4
    assert found == {
        "a.png:0": (("the one", "left"), 16),
        "a.png:1": (("b",), 20),
        "a.png:2": (("mask",), 3),
        "a.png:3": (("disc",), found["a.png:3"][1]),
        "a.png:4": (("turned",), 12),
        "a.png:5": (("tail",), 32),
    }
    assert np.argwhere(data.mask(2)).tolist() == [[1, 11], [2, 11], [2, 12]]
    assert [np.ptp(side) + 1 for side in np.nonzero(data.mask(4))] == [6, 2]


def test_what_is_outside_or_shared_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = cvat(tmp_path, box("cat", 0), box("dog", 5, 'outside="1"'), box("cat", 5), box("dog", 10))
    data = load_dataset("folder", "train", root)
    assert told(data) == {"a.png:3": (("dog",), 16)}
    assert data.skipped == {OUTSIDE: ["a.png:1"], SHARED: ["a.png:0", "a.png:2"]}
    assert cli.main(["data", "check", str(root), "word_len=0"]) == 0
    assert f"1 left out: {OUTSIDE}" in capsys.readouterr().out


def test_subsets_and_folders_of_tasks_are_told_apart(tmp_path: Path) -> None:
    cvat(tmp_path, box("cat", 0), file="one/annotations.xml", picture="one/images/a.png")
    subset = '<image name="a.png" subset="Validation" width="20" height="10">'
    cvat(tmp_path, box("dog", 0), file="two/annotations.xml", image=subset, picture="two/images/Validation/a.png")
    Image.new("RGB", (20, 10), "red").save(tmp_path / "two/images/Validation/a.png")
    assert told(load_dataset("folder", "train", tmp_path)) == {"one/images/a.png:0": (("cat",), 16)}
    out = tmp_path / "out"
    assert cli.main(["data", "convert", str(tmp_path), f"out={out}", "copy_images=true"]) == 0
    data = load_dataset("folder", "val", out)
    assert told(data) == {"two/images/Validation/a.png:0": (("dog",), 16)}
    assert data.image(0)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_photo_is_turned_as_cvat_shows_it(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = np.zeros((10, 20, 3), np.uint8)
    shown[:4, :4] = 255
    root = cvat(tmp_path, box("cat", 0))
    Image.fromarray(np.rot90(shown, 2 if orientation == 3 else 1)).save(root / "images" / "a.png", exif=exif)
    assert (load_dataset("folder", "train", root).image(0) == shown).all()


BAD = [
    ('<polyline label="a" points="0,0;1,1;2,2"/>', "shape 0, is a polyline, which encloses nothing; draw a polygon"),
    ('<polygon label="a" points="0,0;1,1"/>', "is a polygon of 2 points"),
    ('<polygon label="a" points="0,0;1"/>', "has points '0,0;1', which must be x,y;x,y"),
    ('<polygon label="a" points="0,0;1e9,0;nan,9"/>', "lies outside of its 10 x 20 image"),
    ('<box label="a" xtl="x" ytl="0" xbr="1" ybr="1"/>', "has xtl 'x', which must be a number of pixels"),
    ('<mask label="a" rle="1,2" left="0" top="0" width="2" height="2"/>', "do not add up to its 4 pixels"),
    ('<mask label="a" rle="1,x" left="0" top="0" width="2" height="1"/>', "are not numbers between commas"),
    ('<mask label="a" rle="1" left="0" top="0" width="99999" height="99999"/>', "99999 x 99999 .* is out of bounds"),
    ('<mask label="a" rle="4" left="0" top="0" width="2" height="2"/>', None),
    ('<mask label="a" rle="0,1" left="9000" top="0" width="1" height="1"/>', "outside of its 10 x 20 image"),
]


@pytest.mark.parametrize(("shape", "message"), BAD)
def test_a_wrong_shape_is_one_line_and_can_be_left_out(tmp_path: Path, shape: str, message: str | None) -> None:
    root = cvat(tmp_path, shape)
    if message is not None:
        with pytest.raises(DataError, match=message) as error:
            load_dataset("folder", "train", root)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="every one of its 1 references is unusable"):
        load_dataset("folder", "train", root, on_error="skip")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ('name="../secret.png" width="20" height="10"', "has name '../secret.png', which leaves the folder of images"),
        ('name="A.png" width="20" height="10"', "no file A.png in .*, but a.png, and upper and lower case differ"),
        ('name="a.png" width="10" height="20"', None),
        ('name="a.png" width="0" height="20"', "has height and width .*, but both must be pixels"),
        ('name="a.png" width="1000000" height="1000000"', "is out of bounds"),
        ('width="20" height="10"', "leaves the folder of images or names no file"),
    ],
)
def test_a_wrong_picture_is_one_line(tmp_path: Path, image: str, message: str | None) -> None:
    root = cvat(tmp_path, box("a", 0), image=f"<image {image}>")
    if message is not None:
        with pytest.raises(DataError, match=message) as error:
            load_dataset("folder", "train", root)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="every one of its 1 references is unusable"):
        load_dataset("folder", "train", root, on_error="skip")


ENTITY = '<!DOCTYPE annotations [<!ENTITY a SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTITY + "<annotations><image name='&a;'/></annotations>", "declares a document type .*; take it out"),
        ("<annotations><image></annotations>", "is not valid XML .mismatched tag"),
        ("<annotations><track/></annotations>", "holds tracks of a video; export it .*'CVAT for images 1.1'"),
        ("<annotations>" + "<a>" * 99 + "</a>" * 99 + "</annotations>", "has elements in more than 64 others"),
        ("<annotations\xff/>", "is not valid XML"),
        ('<?xml version="1.0" encoding="no-such"?><annotations/>', "is not valid XML .*encoding"),
        ("<a><annotations/></a>", "holds <a>, not CVAT's <annotations>"),
    ],
)
def test_a_file_that_is_not_cvats_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "annotations.xml").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message) as error:
        load_dataset("folder", "train", tmp_path)
    assert "\n" not in str(error.value)
