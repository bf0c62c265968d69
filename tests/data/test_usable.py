"""One rule for `data check`, on_error="skip" and what training and evaluation read: the same answer everywhere."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refer_tree import make_refer_tree
from training_helpers import rows as log_rows
from training_helpers import train_config

from fastris.commands import cli
from fastris.commands.train import train
from fastris.data import DataError, load_dataset
from fastris.data.formats.annotated import AnnotatedDataset
from fastris.data.formats.check import MENDS_OF_CHECK, check_split
from fastris.data.formats.table import open_split
from fastris.data.formats.usable import MENDS, PLAIN
from fastris.data.letterbox import letterbox
from fastris.data.samples import EvalSamples, TrainSamples
from fastris.evaluation.rules import RULES
from fastris.training.expressions import ImageSamples

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

Row = dict[str, Any]
SQUARE = [[2.0, 2.0, 20.0, 2.0, 20.0, 20.0, 2.0, 20.0]]


def photo(seed: int = 0) -> Image.Image:
    """24 x 32 pixels with enough in them that a file's end holds pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def make_folder(root: Path, change: Callable[[Path, list[Row]], Any]) -> Path:
    """A folder of JSON lines with four references to four images, after `change(root, rows)`; the second is b.jpg."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    rows: list[Row] = []
    for number, name in enumerate("abcd"):
        photo(number).save(root / "images" / f"{name}.jpg", quality=95)
        rows.append({"ref_id": number, "image": f"{name}.jpg", "mask": SQUARE, "sentences": ["left one", "the box"]})
    change(root, rows)
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def walk(data: AnnotatedDataset) -> None:
    """Everything that training, with one expression or several for an image, and evaluation read and compute."""
    for samples in (TrainSamples(data, 64), ImageSamples(data, 64, expressions=2), EvalSamples(data, 64)):
        for position in range(len(samples)):
            assert torch.isfinite(samples[position]["image"]).all()
    for index in range(len(data)):
        truth = data.mask(index)
        warp = letterbox(*truth.shape, 64)
        for rule in RULES.values():
            rule.compare(rule.to_image(np.ones((64, 64), np.float32), warp) > rule.cut, rule.truth(truth))


def assert_same_answer(open_: Callable[[str], AnnotatedDataset], expected: dict[str, list[Any]]) -> None:
    """`check` names exactly `expected`, problem -> ref_ids; "skip" leaves out exactly those, and the rest never fails;
    "raise" ends with the first of them, its mend, and a way out that is one."""
    report = check_split(open_("defer"), 0)
    found = {problem: [ref_id for ref_id, _ in cases] for problem, cases in report.problems.items()}
    assert found == expected
    assert all(MENDS_OF_CHECK[problem] for problem in found)
    data = open_("skip")
    assert data.skipped == expected
    left_out = {ref_id for ids in expected.values() for ref_id in ids}
    assert len(data) == report.references - len(left_out)
    if "duplicate id" not in expected:
        assert not left_out & {data.reference(index).ref_id for index in range(len(data))}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        walk(data)
    if not expected:
        walk(open_("raise"))
        return
    with pytest.raises(DataError) as told:
        walk(open_("raise"))
    said = str(told.value)
    assert "\n" not in said
    assert any(
        said.startswith(f"{data.name} train: {problem} at ref_id {expected[problem][0]} ") for problem in expected
    )
    assert any(f"Mend: {MENDS[problem]}; or pass on_error='skip' to leave such" in said for problem in expected)


def image_as(data: bytes, name: str = "b.jpg") -> Callable[[Path, list[Row]], Any]:
    """The second reference's image is a file of that content."""

    def change(root: Path, rows: list[Row]) -> None:
        (root / "images" / name).write_bytes(data)
        rows[1]["image"] = name

    return change


def line_with(**values: Any) -> Callable[[Path, list[Row]], Any]:
    return lambda root, rows: rows[1].update(values)


def in_place(change: Callable[[Path], Any]) -> Callable[[Path, list[Row]], Any]:
    """The second image's file is removed, and `change` puts something there."""

    def changed(root: Path, rows: list[Row]) -> None:
        (root / "images" / "b.jpg").unlink()
        change(root / "images" / "b.jpg")

    return changed


def linked_outside(root: Path, rows: list[Row]) -> None:
    (root / "images" / "b.jpg").rename(root / "real.jpg")
    (root / "images" / "b.jpg").symlink_to(root / "real.jpg")


def mask_of(data: bytes) -> Callable[[Path, list[Row]], Any]:
    def change(root: Path, rows: list[Row]) -> None:
        (root / "masks" / "b.png").write_bytes(data)
        rows[1]["mask"] = "b.png"

    return change


def blank(width: int, height: int, mode: str = "RGB") -> bytes:
    return encoded(Image.new(mode, (width, height)), "PNG")


def thin(width: int, height: int, stated: bool = False) -> Callable[[Path, list[Row]], Any]:
    """An image of these sides; its annotation states them, or leaves them to the file."""

    def change(root: Path, rows: list[Row]) -> None:
        image_as(blank(width, height), "b.png")(root, rows)
        rows[1]["mask"] = {"size": [height, width], "counts": [0, height * width]}
        if not stated:
            mask_of(encoded(Image.new("L", (width, height), 255), "PNG"))(root, rows)

    return change


JPEG, PNG = encoded(photo(), "JPEG", quality=95), encoded(photo(), "PNG")
PROGRESSIVE = encoded(photo(), "JPEG", quality=95, progressive=True)
DEEP = Image.fromarray(np.full((24, 32), 30000, np.uint16))
FLOATING = Image.fromarray(np.full((24, 32), 0.5, np.float32))
CUT = {kind: encoded(photo(), kind) for kind in ("PNG", "BMP", "WEBP", "TIFF", "GIF")}

UNUSABLE: dict[str, tuple[str, Callable[[Path, list[Row]], Any]]] = {
    "no image": ("missing image", in_place(lambda path: None)),
    "a folder": ("missing image", in_place(lambda path: path.mkdir())),
    "a pipe": ("missing image", in_place(lambda path: os.mkfifo(path))),
    "a link to nothing": ("missing image", in_place(lambda path: path.symlink_to("nothing.jpg"))),
    "a link that leaves": ("path outside of its folder", linked_outside),
    "an empty image": ("unreadable image", image_as(b"")),
    "text": ("unreadable image", image_as(b"not an image")),
    "an image without its header's end": ("unreadable image", image_as(JPEG[:100])),
    "a JPEG cut off": ("unreadable image", image_as(JPEG[:-200])),
    "a JPEG without its last bytes": ("unreadable image", image_as(JPEG[:-2])),
    "a progressive JPEG cut off": ("unreadable image", image_as(PROGRESSIVE[:-200])),
    "a PNG with wrong bytes": ("unreadable image", image_as(PNG[:500] + b"\0" * 40 + PNG[540:], "b.png")),
    **{
        f"a {kind} cut off": ("unreadable image", image_as(data[: len(data) * 2 // 3], f"b.{kind.lower()}"))
        for kind, data in CUT.items()
    },
    "40000 x 8": ("unsuitable image", thin(40000, 8)),
    "8 x 40000": ("unsuitable image", thin(8, 40000)),
    "32767 x 1, stated": ("unsuitable image", thin(32767, 1, stated=True)),
    "1 x 32767, stated": ("unsuitable image", thin(1, 32767, stated=True)),
    "16-bit PNG": ("unsuitable image", image_as(encoded(DEEP, "PNG"), "b.png")),
    "16-bit TIFF": ("unsuitable image", image_as(encoded(DEEP, "TIFF"), "b.tiff")),
    "floating point": ("unsuitable image", image_as(encoded(FLOATING, "TIFF"), "b.tiff")),
    "another size": ("size mismatch", line_with(size=[24, 33])),
    "a mask of another size": ("size mismatch", mask_of(blank(31, 24, "L"))),
    "a mask cut off": ("bad annotation", mask_of(encoded(photo().convert("L"), "PNG")[:-300])),
    "an empty mask": ("empty mask", mask_of(blank(32, 24, "L"))),
    "no polygon": ("empty mask", line_with(mask=[])),
    "a polygon without a pixel": ("empty mask", line_with(mask=[[1.1, 1.1, 1.2, 1.1, 1.2, 1.2]])),
    "polygons of text": ("bad annotation", line_with(mask=[["a", "b"]])),
    "a mask where nothing is named": ("bad annotation", line_with(no_target=True)),
    "an empty sentence": ("empty sentence", line_with(sentences=["left", " "])),
    "a sentence of HTML's space": ("phrase without a word", line_with(sentences=["left", "&nbsp;"])),
    "a sentence that a terminal swallows": ("phrase without a word", line_with(sentences=["\x1b[0m"])),
    "a number for a space": ("phrase without a word", line_with(sentences=["&#160;", "left"])),
    "a mark of the vocabulary": ("phrase without a word", line_with(sentences=["a <END_of_text>"])),
    "a mark in full width": ("phrase without a word", line_with(sentences=["\uff1cend_of_text\uff1e"])),
    "half of a character": ("phrase without a word", line_with(sentences=["left \ud800"])),
    "1001 characters": ("phrase over 1000 characters", line_with(sentences=["the " * 250 + "x"])),
    "the id of another": ("duplicate id", line_with(ref_id=0)),
    "the image id of another": ("image id of two images", lambda root, rows: rows[1].update(image_id="a.jpg")),
}
WITHOUT_THE_RULES_MESSAGE = {
    "a record without sentences": line_with(sentences=[]),
    "a mask that is no file": line_with(mask="nowhere.png"),
    "an image that no system has": line_with(image="x" * 900 + ".jpg"),
}
USABLE: dict[str, Callable[[Path, list[Row]], Any]] = {
    "1 x 1": thin(1, 1),
    "32766 x 1": thin(32766, 1),
    "1 x 32766": thin(1, 32766),
    "32766 x 8, stated": thin(32766, 8, stated=True),
    "8 x 32766, stated": thin(8, 32766, stated=True),
    "CMYK": image_as(encoded(photo().convert("CMYK"), "JPEG")),
    "grey": image_as(encoded(photo().convert("L"), "JPEG")),
    "grey and alpha": image_as(encoded(photo().convert("LA"), "PNG"), "b.png"),
    "RGBA": image_as(encoded(photo().convert("RGBA"), "PNG"), "b.png"),
    "one bit": image_as(encoded(photo().convert("1"), "PNG"), "b.png"),
    "a palette with transparency": image_as(
        encoded(photo().quantize(16), "PNG", transparency=bytes(range(16))), "b.png"
    ),
    "animated": image_as(
        encoded(photo(), "GIF", save_all=True, append_images=[photo(1).resize((32, 24)), photo(2)]), "b.gif"
    ),
    "1000 characters": line_with(sentences=["the " * 249 + "boxy"]),
    "over word_len": line_with(sentences=["the " * 40 + "box"]),
    "other scripts": line_with(sentences=["\u043a\u043e\u0442", "\u732b", "gr\u00f6\u00dfte Uhr", "cats &amp; dogs"]),
    "punctuation": line_with(sentences=["?", "'s", "_"]),
}


def folder(root: Path) -> Callable[[str], AnnotatedDataset]:
    return lambda on_error: open_split("folder", "train", root, on_error=on_error)


@pytest.mark.parametrize("case", UNUSABLE)
def test_check_skip_and_reading_agree_on_what_is_unusable(tmp_path: Path, case: str) -> None:
    problem, change = UNUSABLE[case]
    root = make_folder(tmp_path / "data", change)
    assert_same_answer(folder(root), {problem: [0 if case == "the id of another" else 1]})


@pytest.mark.parametrize("case", WITHOUT_THE_RULES_MESSAGE)
def test_check_and_skip_agree_on_records_that_the_reader_refuses(tmp_path: Path, case: str) -> None:
    open_ = folder(make_folder(tmp_path / "data", WITHOUT_THE_RULES_MESSAGE[case]))
    (problem, cases), *others = check_split(open_("defer"), 0).problems.items()
    assert (others, [ref_id for ref_id, _ in cases]) == ([], [1])
    data = open_("skip")
    assert data.skipped == {problem: [1]}
    walk(data)
    with pytest.raises(DataError, match=r"of 4 references in train: 1 bad"):
        open_("raise")


@pytest.mark.parametrize("case", USABLE)
def test_check_skip_and_reading_agree_on_what_is_usable(tmp_path: Path, case: str) -> None:
    assert_same_answer(folder(make_folder(tmp_path / "data", USABLE[case])), {})


def test_check_names_all_that_is_wrong_with_a_reference(tmp_path: Path) -> None:
    def change(root: Path, rows: list[Row]) -> None:
        rows[1] |= {"sentences": ["&nbsp;"], "mask": [["x"]], "size": [24, 32]}
        rows[2]["image_id"] = "a.jpg"
        image_as(JPEG[:-200], "d.jpg")(root, rows[2:])
        mask_of(blank(32, 24, "L"))(root, rows[2:])

    report = check_split(folder(make_folder(tmp_path / "data", change))("defer"), 0)
    found = {problem: [ref_id for ref_id, _ in cases] for problem, cases in report.problems.items()}
    assert found == {
        "phrase without a word": [1],
        "bad annotation": [1],
        "image id of two images": [2],
        "empty mask": [3],
        "unreadable image": [3],
    }


# what follows from it


def broken_folder(root: Path) -> Path:
    """Six references of which three can be used."""

    def change(root: Path, rows: list[Row]) -> None:
        image_as(JPEG[:-200])(root, rows)
        rows[2]["sentences"] = ["word " * 300]
        rows += [dict(rows[0], ref_id=4), dict(rows[3], ref_id=5, sentences=["&nbsp;", "good"])]

    return make_folder(root, change)


def test_training_and_validation_go_through_what_skip_leaves(tmp_path: Path) -> None:
    root = broken_folder(tmp_path / "data")
    options = {"dataset": "folder", "data_root": str(root), "val_split": "train", "val_sentences": "all"}
    train(train_config(tmp_path / "run", **options, on_error="skip", pictures=0))
    assert [row["step"] for row in log_rows(tmp_path / "run" / "log.csv")][-1] == "2"
    assert cli.main(["data", "check", str(root)]) == 1


def test_a_damaged_image_ends_a_run_that_was_not_told_to_skip_with_both_ways_on(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", image_as(JPEG[:-200]))
    options = {"dataset": "folder", "data_root": str(root), "batch_size": 4, "evaluate": False}
    with pytest.raises(
        DataError, match=r"unreadable image at ref_id 1 .*--resume \(with on_error=skip as a new run\)$"
    ):
        train(train_config(tmp_path / "run", **options))


def test_a_file_that_is_damaged_after_skip_has_looked_is_an_error_that_does_not_recommend_skip(tmp_path: Path) -> None:
    data = folder(broken_folder(tmp_path / "data"))("skip")
    file = tmp_path / "data" / "images" / "d.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(
        DataError, match=r"unreadable image at ref_id 3 .*it was in order when .* on_error='skip'$"
    ) as told:
        walk(data)
    assert "or pass" not in str(told.value)
    assert (len(data), data.skipped["unreadable image"]) == (3, [1])


def test_skip_decodes_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_refer_tree(tmp_path)
    loaded = []
    original = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: loaded.append(image) or original(image))
    assert len(load_dataset("refcoco", "train", tmp_path, on_error="skip")) == 6
    assert len(set(map(id, loaded))) == 2


def test_plain_phrases_need_no_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(sentence: str) -> None:
        raise AssertionError(sentence)

    monkeypatch.setattr("fastris.data.tokens.check_sentence", unwanted)
    root = make_folder(tmp_path / "data", line_with(sentences=["the dog's 2nd bowl (left); on: a > b, #3", "x"]))
    assert len(folder(root)("raise")) == 4


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=255), min_size=1, max_size=12))
def test_phrases_taken_without_a_look_at_the_vocabulary_are_taken_with_it(text: str) -> None:
    from fastris.data.tokens import check_sentence

    if PLAIN.fullmatch(text):
        check_sentence(text)


def test_every_problem_has_a_mend_and_only_messages_of_the_rule_recommend_skip() -> None:
    assert MENDS.items() <= MENDS_OF_CHECK.items()
    sources = [path.read_text(encoding="utf-8") for path in Path(cli.__file__).parents[1].rglob("*.py")]
    assert sum(len(re.findall(r"or pass on_error='skip'", source)) for source in sources) == 1
