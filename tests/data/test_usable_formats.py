"""The rule of test_usable.py in the other formats: the same answer everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from format_trees import LIBRARIES, make_lmdb_tree, make_parquet_tree
from PIL import Image
from refer_tree import IMAGE_FOLDER, make_refer_tree
from test_usable import Row, assert_same_answer, encoded

from fastris.data.formats.table import open_split

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


def damage(files: list[Path]) -> None:
    """Five images: whole, cut off, no image, of another size, whole."""
    files[1].write_bytes(files[1].read_bytes()[:-300])
    files[2].write_bytes(b"not an image")
    Image.new("RGB", (5, 5)).save(files[3])


def widen(file: Path) -> None:
    Image.new("RGB", (40000, 8)).save(file, quality=50)


def change_refs(refs: list[Row]) -> None:
    refs[0]["sentences"][0]["sent"] = "x" * 1001
    refs[1]["sentences"][1]["sent"] = "&nbsp;"


def wide_instance(instances: dict[str, Any]) -> None:
    instances["images"][4] |= {"width": 40000, "height": 8}
    for number in (12, 13, 14):
        instances["annotations"][number]["segmentation"] = [[1.0, 1.0, 9.0, 1.0, 9.0, 7.0, 1.0, 7.0]]


EXPECTED = {
    "phrase over 1000 characters": [0],
    "phrase without a word": [1],
    "unreadable image": [3, 4, 5, 6, 7, 8],
    "size mismatch": [9, 10, 11],
    "unsuitable image": [12, 13, 14],
}


def test_refer_files_get_the_same_answer_everywhere(tmp_path: Path) -> None:
    make_refer_tree(tmp_path, images_per_split=6, change_refs=change_refs, change_instances=wide_instance)
    files = sorted((tmp_path / IMAGE_FOLDER).iterdir())
    damage(files)
    widen(files[4])
    assert_same_answer(lambda on_error: open_split("refcoco", "train", tmp_path, on_error=on_error), EXPECTED)


def test_parquet_gets_the_same_answer_everywhere(tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES["parquet"])

    def change(rows: list[Row]) -> None:
        rows[:] = [row for row in rows if row["split"] in ("train", "val", "testA")]
        for row in rows:  # one split of six images
            row["split"] = "train"
        change_refs(rows)
        for row in rows[12:15]:
            row["raw_anns"] = json.dumps({"segmentation": [[1.0, 1.0, 9.0, 1.0, 9.0, 7.0, 1.0, 7.0]]})
            info = json.loads(row["raw_image_info"])
            row["raw_image_info"] = json.dumps(info | {"width": 40000, "height": 8})

    from pyarrow import parquet

    make_parquet_tree(tmp_path, change=lambda rows: (change(rows), rows.extend(dict(rows[0], split=s) for s in "xy")))
    for file in (tmp_path / "data").iterdir():
        if "train" not in file.name:
            file.unlink()
    assert parquet.read_table(next((tmp_path / "data").iterdir())).num_rows == 18
    files = sorted((tmp_path / "coco" / "train2014").iterdir())
    damage(files)
    widen(files[4])
    assert_same_answer(lambda on_error: open_split("refcoco", "train", tmp_path, on_error=on_error), EXPECTED)


def test_lmdb_gets_the_same_answer_everywhere(tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES["lmdb"])
    wide = encoded(Image.new("RGB", (40000, 8)), "JPEG")
    breaks: dict[int, Callable[[Row], Any]] = {
        0: lambda record: record.update(sents=["x" * 1001], num_sents=1),
        1: lambda record: record.update(sents=["left", "&nbsp;"], num_sents=2),
        2: lambda record: record.update(img=record["img"][:-300], img_name="cut.jpg"),
        3: lambda record: record.update(img=wide, img_name="wide.jpg"),
        4: lambda record: record.update(img_name="cut.jpg"),
    }

    def change(record: Row) -> None:
        breaks.get(record["seg_id"], lambda record: None)(record)

    make_lmdb_tree(tmp_path, change=change)
    expected = {
        "phrase over 1000 characters": [0],
        "phrase without a word": [1],
        "unreadable image": [2],
        "unsuitable image": [3],
        "image id of two images": [4],
    }
    assert_same_answer(lambda on_error: open_split("refcoco", "train", tmp_path, on_error=on_error), expected)
