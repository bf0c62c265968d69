"""COCO's instances, as tools for labelling export them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_trees import make_coco_tree, make_folder_tree, pixels
from PIL import Image
from refer_tree import make_refer_tree

from fastris.commands import cli
from fastris.commands.eval import EvalConfig
from fastris.data import DataError, load_dataset, load_split
from fastris.data.formats.pictures import SHARED, SHARED_IN_PART
from fastris.data.formats.table import discover
from fastris.data.options import selection

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "traffic_light"}]


def box(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def square(number: int, category: int, left: int, **changes: Any) -> dict[str, Any]:
    """An object of 4 x 4 pixels at the top of picture 1."""
    row = {"id": number, "image_id": 1, "category_id": category, "segmentation": box(left, 0, left + 4, 4)}
    return row | changes


def coco(root: Path, annotations: Any, file: str = "annotations.json", images: str = "images", **changes: Any) -> Path:
    """A picture of 20 x 10 pixels with these objects."""
    (root / images).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10)).save(root / images / "a.png")
    image = {"id": 1, "file_name": "a.png", "height": 10, "width": 20} | changes
    (root / file).parent.mkdir(exist_ok=True)
    content = {"images": [image], "annotations": annotations, "categories": CATEGORIES}
    (root / file).write_text(json.dumps(content))
    return root


def told(data: Any) -> dict[Any, tuple[tuple[str, ...], int]]:
    """Id -> sentences, and the number of columns of the mask."""
    references = [data.reference(index) for index in range(len(data))]
    return {ref.ref_id: (ref.sentences, int(data.mask(i).any(0).sum())) for i, ref in enumerate(references)}


THREE = [
    square(1, 2, 0),
    square(2, 1, 5),
    square(3, 1, 12, phrases=["cat", "the cat on the right"]),
    square(4, 2, 16, iscrowd=1, caption=" the lights\nmany of them"),
]


def test_a_phrase_that_objects_of_a_picture_share_names_none_of_them(tmp_path: Path) -> None:
    data = load_dataset("folder", "train", coco(tmp_path, THREE))
    assert told(data) == {1: (("traffic light",), 4), 3: (("the cat on the right",), 4)}
    assert data.skipped == {SHARED: [2, 4], SHARED_IN_PART: [3]}


def test_merged_a_shared_phrase_names_all_of_its_objects(tmp_path: Path) -> None:
    data = load_dataset("folder", "train", coco(tmp_path, THREE), several="merge")
    assert told(data) == {
        1: (("traffic light",), 4),
        3: (("the cat on the right",), 4),
        "2+3": (("cat",), 8),
        "4": (("the lights", "many of them"), 4),
    }
    assert data.skipped == {}


def test_what_is_left_out_is_said_by_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco(tmp_path, THREE)
    for action in ("inspect", "check"):
        assert cli.main(["data", action, str(tmp_path), "word_len=0"]) == 0
        assert f"2 left out: {SHARED}" in capsys.readouterr().out
    assert cli.main(["data", "check", str(tmp_path), "several=merge", "word_len=0"]) == 0
    assert "left out" not in capsys.readouterr().out
    assert cli.main(["data", "convert", str(tmp_path), f"out={tmp_path / 'out'}", "several=merge"]) == 0
    assert told(load_dataset("folder", "train", tmp_path / "out"))["2+3"] == (("cat",), 8)
    options = EvalConfig(model="x", dataset="folder", data_root=str(tmp_path), several="merge", format="coco")
    assert len(load_split(options, "train")) == 4
    given = {"dataset": "folder", "data_root": str(tmp_path), "format": "coco", "several": "merge"}
    assert selection(options) == given


def test_several_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"several= is for the formats coco.*, but .* is read as jsonl; leave it out"):
        load_dataset("folder", "train", make_folder_tree(tmp_path / "a"), several="merge")
    with pytest.raises(DataError, match="several='both' is unknown; choose 'skip' or 'merge'"):
        load_dataset("folder", "train", coco(tmp_path / "b", []), several="both")


@pytest.mark.parametrize(
    ("file", "images", "split"),
    [
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("annotations/instances_val2017.json", "images/val2017", "val2017"),
        ("valid/_annotations.coco.json", "valid", "validation"),
        ("annotations/instances_default.json", "images", "train"),
        ("result.json", "images", "train"),
        ("test.json", ".", "test"),
    ],
)
def test_splits_and_pictures_lie_where_tools_put_them(tmp_path: Path, file: str, images: str, split: str) -> None:
    coco(tmp_path, [square(1, 1, 0)], file, images)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    if "2017" in file:  # the published folder has captions beside
        (tmp_path / "annotations/captions_train2017.json").write_text('{"images": [], "annotations": []}')
    data = load_dataset("folder", split, tmp_path)
    assert pixels(data, 0)[0] == (10, 20, 3)
    assert len(load_dataset("folder", split, tmp_path / file, images=tmp_path / images)) == 1


BAD = [
    ([square(1, 1, 0, segmentation=[])], {}, "annotation 1, has no segmentation, and a box is no mask"),
    ([square(1, 1, 0, segmentation=[[1, 1, 1, 1, 1, 1]])], {}, None),
    ([square(1, 1, 0, segmentation={"size": [10, 20], "counts": [200]})], {}, None),
    ([square(1, 1, 0, segmentation={"size": [20, 10], "counts": [200]})], {}, "size mismatch"),
    ([square(1, 9, 0)], {}, "category_id 9, which is none of the file's categories"),
    ([square(1, 9, 0, caption=[1])], {}, "has caption \\[1\\], which must be a text or a list of texts"),
    ([square(1, 1, 0, image_id=5)], {}, "is of image 5, which the file does not list"),
    ([square(1, 1, 0)], {"file_name": "../secret.png"}, "leaves the folder of images"),
    ([square(1, 1, 0)], {"file_name": "A.PNG"}, "no file A.PNG in .*, but a.png, and upper and lower case differ"),
    ([square(1, 1, 0)], {"file_name": "b.png"}, "no file b.png in [^,]*images. Mend: put the file there"),
    ([square(1, 1, 0)], {"height": 10**6, "width": 10**6}, "pixels \\(height x width\\) is out of bounds"),
    ([square(1, 1, 0)], {"height": -1}, "has height -1"),
]


@pytest.mark.parametrize(("annotations", "image", "message"), BAD)
def test_a_wrong_object_is_one_line_and_can_be_left_out(
    tmp_path: Path, annotations: Any, image: dict[str, Any], message: str | None
) -> None:
    root = coco(tmp_path, annotations, **image)
    if message is not None:
        with pytest.raises(DataError, match=message) as error:
            load_dataset("folder", "train", root)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="every one of its 1 references is unusable"):
        load_dataset("folder", "train", root, on_error="skip")


def test_files_that_are_no_coco_are_one_line(tmp_path: Path) -> None:
    root = coco(tmp_path, [square(1, 1, 0)])
    file = root / "annotations.json"
    file.write_bytes(file.read_bytes().replace(b'"cat"', b'"\xff"'))
    with pytest.raises(DataError, match=r"annotations.json is not valid JSON .*utf-8"):
        load_dataset("folder", "train", root)
    for name in ("train.json", "train2014.json"):
        coco(root, [], name)
    with pytest.raises(DataError, match="both hold the split 'train'; rename one"):
        load_dataset("folder", "train", root)


def test_labels_beside_other_data_are_not_in_its_way(tmp_path: Path) -> None:
    root = make_folder_tree(tmp_path / "a")
    coco(root, [square(1, 1, 0)])
    assert [entry.format for entry in discover(root)] == ["jsonl"]
    assert load_dataset("folder", "val", root).reference(0).sentences[0] == "red block"
    assert load_dataset("folder", "train", root, format="coco").reference(0).sentences == ("cat",)


def test_the_instances_of_a_published_data_set_are_not_taken_for_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data set"):
        discover(make_refer_tree(tmp_path) / "refcoco")


def test_pictures_of_one_name_are_never_written_over_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, colour in (("train", "red"), ("val", "blue")):
        coco(tmp_path / "a", [square(1, 1, 0)], f"annotations/{split}.json", f"../{split}")
        Image.new("RGB", (20, 10), colour).save(tmp_path / split / "a.png")
        (tmp_path / "a" / split).symlink_to(tmp_path / split)
    assert cli.main(["data", "convert", str(tmp_path / "a"), f"out={tmp_path / 'out'}", "copy_images=true"]) == 2
    assert "two references have different images of the name 'a.png'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wrong_name_is_answered_by_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"It does hold data of your own \(coco\): pass dataset=folder"):
        load_dataset("refcoco", "train", coco(tmp_path, [square(1, 1, 0)]))


def test_a_turned_photo_is_read_as_it_was_labelled_and_stays_so_when_converted(tmp_path: Path) -> None:
    root, exif = coco(tmp_path, [square(1, 1, 0)]), Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    stored = np.zeros((20, 10, 3), np.uint8)
    stored[-4:, :4] = 255  # the lower left corner is the upper left one when shown
    Image.fromarray(stored).save(root / "images" / "a.png", exif=exif)
    assert cli.main(["data", "convert", str(root), f"out={tmp_path / 'out'}"]) == 0
    for folder in (root, tmp_path / "out"):
        for on_error in ("raise", "skip"):
            data = load_dataset("folder", "train", folder, on_error=on_error)  # type: ignore[arg-type]
            assert data.image(0).shape == (10, 20, 3)
            assert (data.mask(0) == (data.image(0)[..., 0] > 0)).all()


def test_two_files_share_no_picture_by_accident(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["images"].append(content["images"][0])

    with pytest.raises(DataError, match="holds image 581000 twice"):
        load_dataset("folder", "train", make_coco_tree(tmp_path, change))
