"""Files of strangers, bent at random: a reader gives a value or raises its one documented error, and nothing else.

Inputs tried in every run, the same ones each time: 150 for each test with `FUZZ`, 60 where files are written, 2,010 in
all. On 2026-11-21 a further 21,200 random ones were tried once, and 760 files of LMDB and 600 of Parquet with one to
eight changed bytes, each in a process of its own: no other outcome, and no crash. On 2026-11-22 8,500 more were tried
of COCO's, LabelMe's and CVAT's files and of the hub's rows, with the same outcome.
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from fastris.data import DataError, load_dataset, paths
from fastris.data.formats import annotation, hub_rows, jsonl, lmdb_files, parquet, refer_files
from fastris.data.formats.annotated import Annotated, UnusableReference
from fastris.data.formats.budget import Budget
from fastris.data.formats.table import open_split
from fastris.data.formats.unpickle import loads_plain

FUZZ = settings(max_examples=150, deadline=None, derandomize=True)
FUZZ_FILES = settings(max_examples=60, deadline=None, derandomize=True)

NUMBERS = st.integers(-3, 9) | st.sampled_from([2**31, 2**63, 10**30, -(2**70)]) | st.floats()
WORDS = st.sampled_from(
    ["a", "", "a.png", "../a.png", "/etc/passwd", "\0", "size", "counts", "mask", "image", "split", "train"]
)
TEXTS = st.text(max_size=6) | WORDS
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)


@st.composite
def run_lengths(draw: Any) -> Any:
    """Run lengths of a mask of 4 x 6 pixels, as a list or as COCO's text, of which up to two are changed."""
    changes = draw(st.lists(st.integers(1, 23), unique=True, max_size=9).map(sorted))
    counts: Any = np.diff([0, *changes, 24]).tolist()
    if draw(st.booleans()):
        counts = list(coco.frPyObjects({"size": [4, 6], "counts": counts}, 4, 6)["counts"].decode())
    strange = st.integers(-3, 30) if type(counts[0]) is int else st.characters(codec="ascii")
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        counts[draw(st.integers(0, len(counts) - 1))] = draw(strange)
    return "".join(counts) if type(counts[0]) is str else counts


CORNERS = st.lists(st.tuples(st.floats(-3, 8), st.floats(-3, 8)), min_size=1, max_size=5).map(lambda p: [*sum(p, ())])
STRANGE = st.lists(st.integers(-9, 19) | NUMBERS, max_size=9)
POLYGONS = st.lists(CORNERS, max_size=3) | st.lists(CORNERS | STRANGE | JSON, max_size=4)
SIZES = st.just([4, 6]) | st.just([4, 6]) | st.just([6, 4]) | JSON
RUNS = st.fixed_dictionaries({"size": SIZES, "counts": run_lengths() | run_lengths() | JSON})
SEGMENTATIONS = POLYGONS | RUNS | POLYGONS | RUNS | JSON


def bent(valid: dict[str, Any], strange: st.SearchStrategy[Any] = JSON) -> st.SearchStrategy[dict[str, Any]]:
    """A valid record, of which up to three fields are something else, or gone."""

    def bend(changes: dict[str, Any], lost: list[str]) -> dict[str, Any]:
        return {key: value for key, value in (valid | changes).items() if key not in lost}

    keys = st.sampled_from(sorted(valid))
    return st.builds(bend, st.dictionaries(keys | TEXTS, strange, max_size=2), st.lists(keys, max_size=1))


@pytest.fixture(scope="module")
def root() -> Any:
    """A folder of one's own data: an image of 6 x 4 pixels and its mask."""
    with tempfile.TemporaryDirectory() as name:
        for folder in ("images", "masks"):
            (Path(name) / folder).mkdir()
            Image.fromarray(np.eye(4, 6, dtype=np.uint8)).save(Path(name) / folder / "a.png")
        yield Path(name)


def plenty() -> Budget:
    return Budget("x", 0)


def read_all(data: Any) -> None:
    for index in range(len(data)):
        try:
            height, width = data.mask(index).shape
            assert data.image(index).shape == (height, width, 3)
            assert all(type(sentence) is str and sentence for sentence in data.reference(index).sentences)
        except UnusableReference:
            continue


@FUZZ
@given(st.binary(max_size=200))
def test_arbitrary_bytes_as_a_binary_pickle(data: bytes) -> None:
    try:
        loads_plain(data, binary=True)
    except DataError:
        return


CODES = [bytes([code]) for code in b"(.012NK\x88]}l)td\x85\x86\x87aesu\x94hjqrJIUXcRbo\x93CB\n"]
WHOLE = [
    b"c_codecs\nencode\n",
    b"c__builtin__\nbytes\n",
    b"X\x02\x00\x00\x00ab",
    b"X\x06\x00\x00\x00latin1",
    b"C\x02ab",
]


@FUZZ
@given(st.lists(st.sampled_from(CODES + WHOLE), max_size=40))
def test_arbitrary_instructions_of_a_binary_pickle_never_leave_a_name(codes: list[bytes]) -> None:
    try:
        value = loads_plain(b"".join(codes) + b".", binary=True)
    except DataError:
        return
    json.dumps(value, default=lambda item: item.decode("latin-1") if type(item) is bytes else 1 / 0, skipkeys=True)


RECORD = {"img": b"\xff\xd8\xff", "mask": b"\x89PNG", "seg_id": 3, "img_name": "a", "num_sents": 1, "sents": ["a"]}


@FUZZ
@given(st.integers(2, 5), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_changed_pickle_of_a_record(protocol: int, changes: list[tuple[int, int]]) -> None:
    data = bytearray(pickle.dumps(RECORD, protocol))
    for position, byte in changes:
        data[position % len(data)] = byte
    try:
        loads_plain(bytes(data), binary=True)
    except DataError:
        return


@FUZZ
@given(SEGMENTATIONS, st.sampled_from([(4, 6), (6, 4), (1, 1), (0, 6), (4, -1), (10**6, 10**6)]))
def test_arbitrary_segmentations_are_masks_of_the_image_or_bad_annotations(value: Any, size: tuple[int, int]) -> None:
    try:
        code = annotation.encode(value, *size)
    except annotation.BadAnnotation:
        return
    if code is not None:
        assert annotation.decode(code).shape == size
        assert annotation.decode(code).any()


@FUZZ
@given(st.lists(SEGMENTATIONS, max_size=3))
def test_arbitrary_unions_are_masks_of_the_image_or_bad_annotations(parts: list[Any]) -> None:
    try:
        code = annotation.encode(annotation.Several(tuple(parts)), 4, 6)
    except annotation.BadAnnotation:
        return
    assert code is None or annotation.decode(code).shape == (4, 6)


@FUZZ
@given(st.text("0123456789:;<=>?@ABCOPQRS_`abcno~\x7f\x80", max_size=30) | run_lengths())
def test_arbitrary_run_lengths_cover_the_image_or_are_bad_annotations(counts: Any) -> None:
    try:
        runs = annotation.checked({"size": [4, 6], "counts": counts}, 4, 6)
    except annotation.BadAnnotation:
        return
    assert sum(runs) == 24


LINE = {"image": "a.png", "mask": "a.png", "sentences": ["it"], "size": [4, 6], "ref_id": 1, "split": "train"}


@FUZZ
@given(bent(LINE, JSON | SEGMENTATIONS))
def test_an_arbitrary_line_of_a_folder(root: Path, row: dict[str, Any]) -> None:
    try:
        assert isinstance(jsonl.build(row, "x.jsonl, line 1", root / "images", root, paths.Look(), plenty()), Annotated)
    except DataError:
        return


@FUZZ_FILES
@given(st.lists(bent(LINE, JSON | SEGMENTATIONS).map(json.dumps).map(str.encode) | st.binary(max_size=40), max_size=4))
def test_an_arbitrary_file_of_lines(root: Path, lines: list[bytes]) -> None:
    (root / "train.jsonl").write_bytes(b"\n".join(lines))
    for on_error in ("raise", "skip", "defer"):
        try:
            data = (
                load_dataset("folder", "train", root, format="jsonl", on_error="raise") if on_error == "raise" else None
            )
            data = data or jsonl.FolderDataset("folder", "train", root, on_error=on_error)
        except DataError:
            continue
        read_all(data)


@FUZZ_FILES
@given(bent({"format": "fastris-data", "version": 1, "name": "folder", "splits": {"train": {"references": 1}}}))
def test_an_arbitrary_manifest(root: Path, manifest: dict[str, Any]) -> None:
    (root / "train.jsonl").write_text(json.dumps(LINE))
    (root / "dataset.json").write_text(json.dumps(manifest))
    try:
        read_all(load_dataset("folder", "train", root))
    except DataError:
        return
    finally:
        (root / "dataset.json").unlink()


class _Lmdb(lmdb_files.LmdbDataset):
    """The reader of records without a file behind it."""

    def __init__(self) -> None:
        self.name, self.split, self._sizes, self._masks, self.path = "refcoco", "train", {}, None, Path("train.lmdb")
        self._budget = plenty()
        self._keys, self._order, self._references, self._last = [b"0"], [0], [None], None
        self.record = b""

    def _get(self, key: bytes) -> bytes | None:
        return self.record


@FUZZ
@given(bent(RECORD, JSON | st.binary(max_size=9) | st.lists(st.binary(max_size=3), max_size=2)), st.integers(2, 5))
def test_an_arbitrary_lmdb_record(record: dict[str, Any], protocol: int) -> None:
    data = _Lmdb()
    data.record = pickle.dumps(record, protocol)
    read_all(data)


ROW = {
    "ref_id": 1,
    "image_id": 2,
    "ann_id": 3,
    "split": "train",
    "sentences": [{"sent": "it"}],
    "raw_anns": json.dumps({"segmentation": [[0, 0, 3, 0, 3, 3]]}),
    "raw_image_info": json.dumps({"height": 4, "width": 6, "file_name": "a.png"}),
}
INFO = {"height": 4, "width": 6, "file_name": "a.png", "segmentation": [[0, 0, 3, 0, 3, 3]]}


@FUZZ
@given(bent(ROW, JSON | bent(INFO, SEGMENTATIONS).map(json.dumps) | st.lists(bent({"sent": "it"}), max_size=2)))
def test_an_arbitrary_parquet_row(root: Path, row: dict[str, Any]) -> None:
    try:
        assert isinstance(parquet.build(row, root / "images", "a.parquet, row 0", plenty()), Annotated)
    except DataError:
        return


REF = {"ref_id": 1, "ann_id": [7], "image_id": 2, "split": "train", "sentences": [{"sent": "it"}], "no_target": False}
ANN = {"id": 7, "image_id": 2, "segmentation": [[0, 0, 3, 0, 3, 3]], "iscrowd": 0}
IMAGE = {"id": 2, "file_name": "a.png", "height": 4, "width": 6}


@FUZZ_FILES
@given(
    st.lists(bent(REF, JSON | st.lists(st.sampled_from([-1, 7, 8]), max_size=3)) | JSON, min_size=1, max_size=3),
    st.lists(bent(ANN, JSON | SEGMENTATIONS), max_size=2).map(lambda anns: [ANN, *anns]) | JSON,
    st.lists(bent(IMAGE), min_size=1, max_size=2) | st.just([IMAGE]),
)
def test_arbitrary_grefcoco_files(root: Path, refs: list[Any], annotations: Any, images: list[Any]) -> None:
    (root / "grefcoco").mkdir(exist_ok=True)
    (root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(refs))
    instances = {"annotations": annotations, "images": images}
    (root / "grefcoco" / "instances.json").write_text(json.dumps(instances))
    files = refer_files.locate("grefcoco", root, root / "images")
    try:
        records = refer_files.read_split(files, "train")
    except DataError:
        return
    assert all(isinstance(record, Annotated | UnusableReference) for record in records)
    from fastris.data.formats.refer import ReferDataset

    read_all(ReferDataset("grefcoco", "train", root, images=root / "images", on_error="defer"))


def read_any_way(root: Path, format: str) -> None:
    """Open and read a split with every `on_error`; nothing but a DataError."""
    for on_error in ("raise", "skip", "defer"):
        for several in ("skip", "merge"):
            try:
                data = open_split("folder", "train", root, format=format, on_error=on_error, several=several)
            except DataError:
                continue
            read_all(data)


OBJECT = ANN | {"category_id": 1, "caption": "it"}
CATEGORY = {"id": 1, "name": "cat"}


@FUZZ_FILES
@given(
    st.lists(bent(OBJECT, JSON | SEGMENTATIONS), max_size=2).map(lambda anns: [OBJECT, *anns]) | JSON,
    st.lists(bent(IMAGE), min_size=1, max_size=2) | st.just([IMAGE]),
    st.lists(bent(CATEGORY), max_size=2) | JSON,
)
def test_arbitrary_coco_files(root: Path, annotations: Any, images: list[Any], categories: Any) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "train.json").write_text(json.dumps(content))
    read_any_way(root, "coco")


PLACES = st.lists(st.lists(st.floats(-3, 8), min_size=2, max_size=2), min_size=2, max_size=4)
SHAPE = {
    "label": "cat",
    "points": [[0, 0], [3, 3]],
    "shape_type": "rectangle",
    "group_id": None,
    "description": "",
    "mask": "AAAA",
}
KINDS = st.sampled_from(["polygon", "circle", "mask", "line", "rectangle"])
SHOWN = {"imagePath": "../images/a.png", "imageData": None, "imageHeight": 4, "imageWidth": 6, "shapes": []}


@FUZZ_FILES
@given(
    st.lists(bent(SHAPE, JSON | PLACES | KINDS), max_size=3) | JSON, bent(SHOWN, JSON | st.just("AAAA")), st.booleans()
)
def test_an_arbitrary_labelme_file(root: Path, shapes: Any, row: dict[str, Any], whole: bool) -> None:
    (root / "labels").mkdir(exist_ok=True)
    row = (SHOWN if whole else row) | {"shapes": shapes}
    (root / "labels" / "a.json").write_text(json.dumps(row))
    read_any_way(root, "labelme")


XML_SHAPE = {
    "label": "cat",
    "points": "0,0;3,0;3,3",
    "rle": "1, 2, 3",
    "left": "1",
    "top": "1",
    "width": "3",
    "height": "2",
    "xtl": "0",
    "ytl": "0",
    "xbr": "3",
    "ybr": "2",
    "rotation": "30",
    "outside": "0",
    "group_id": "1",
}
XML_TEXTS = st.text(max_size=6) | st.sampled_from(
    ["1", "-1", "nan", "inf", "1e9", "9" * 5000, "0,0;1", "1,2,,3", "&", "<", "\ud800"]
)


@FUZZ_FILES
@given(
    st.lists(
        st.tuples(st.sampled_from(["polygon", "box", "mask", "ellipse", "points"]), bent(XML_SHAPE, XML_TEXTS)),
        max_size=3,
    ),
    bent({"name": "a.png", "width": "6", "height": "4", "subset": ""}, XML_TEXTS),
    st.binary(max_size=3),
)
def test_an_arbitrary_cvat_file(root: Path, shapes: Any, image: dict[str, Any], end: bytes) -> None:
    def element(tag: str, attributes: dict[str, str], inner: str = "") -> str:
        named = " ".join(f"{key}={quoteattr(value)}" for key, value in attributes.items() if key.isidentifier())
        return f"<{tag} {named}>{inner}</{tag}>"

    inner = "".join(element(tag, attributes) for tag, attributes in shapes)
    text = f"<annotations>{element('image', image, inner)}</annotations>"
    (root / "annotations.xml").write_bytes(text.encode("utf-8", "surrogatepass") + end)
    read_any_way(root, "cvat")


CELL = {"mask": {"size": [4, 6], "counts": [1, 2, 21]}, "sentences": ["it"], "id": 3}
CELLS = JSON | SEGMENTATIONS | SEGMENTATIONS.map(json.dumps) | st.just({"bytes": b"x", "path": None})


@FUZZ
@given(
    bent({"image_id": 2, "file_name": "a.png"}),
    st.lists(bent(CELL, CELLS), max_size=3) | st.dictionaries(WORDS, st.lists(CELLS, max_size=2), max_size=3) | JSON,
    st.booleans(),
)
def test_an_arbitrary_row_of_the_hub(row: dict[str, Any], objects: Any, listed: bool) -> None:
    columns = hub_rows.Columns("image", "mask", "sentences", "samples" if listed else "")
    if not listed and type(objects) is list:
        row |= objects[0] if objects and type(objects[0]) is dict else {}
    for record in hub_rows.build(row | {"samples": objects}, 0, columns, "x, row 0", plenty(), ["cat"]):
        assert isinstance(record, Annotated | UnusableReference)
        if isinstance(record, Annotated) and not isinstance(record.segmentation, annotation.MaskPicture):
            with suppress(annotation.BadAnnotation):
                annotation.encode(record.segmentation, 4, 6)


@FUZZ
@given(st.lists(st.sampled_from(["..", ".", "a", "/", "\\", "C:", "~", "\0", " ", "..."]), max_size=7).map("".join))
def test_no_name_that_is_accepted_leaves_its_folder(name: str) -> None:
    try:
        paths.safe_name(name, "x")
    except DataError:
        return
    assert os.path.normpath(f"/base/{name}").startswith("/base/") or os.path.normpath(f"/base/{name}") == "/base"
    assert ".." not in name.replace("\\", "/").split("/")
