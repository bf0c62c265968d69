"""``fastris data convert``: the same data in files that hold no code."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from format_trees import MAKERS, SPLITS, make_grefs_tree
from refer_tree import make_refer_tree
from test_data_command import break_everything, everything, made, run

from fastris.data import load_dataset
from fastris.data.formats.convert import convert

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


@pytest.mark.parametrize("layout", MAKERS)
@pytest.mark.parametrize("copy", [False, True])
def test_converting_and_loading_gives_the_original(
    tmp_path: Path, layout: str, copy: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = made(layout, tmp_path / "tree"), tmp_path / "out"
    name = MAKERS[layout][0]
    options = [f"dataset={name}", f"out={out}", f"copy_images={copy}"]
    code, printed, errors = run(capsys, "convert", root, *options)
    assert (code, errors) == (0, "")
    assert printed.splitlines()[-1] == f"use it:  dataset={name} data_root={out}"
    for split in SPLITS:
        original, converted = load_dataset(name, split, root), load_dataset(name, split, out)
        assert everything(converted) == everything(original)
        assert (converted.name, converted.split, converted.skipped) == (name, split, {})
    assert (out / "images").is_symlink() == (not copy and layout != "lmdb")


def test_a_converted_data_set_holds_json_and_images_and_nothing_else(tmp_path: Path) -> None:
    convert("refcoco", make_refer_tree(tmp_path / "a"), tmp_path / "b", format="refer", splits=["val"])
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["dataset.json", "images", "val.jsonl"]
    line = json.loads((tmp_path / "b" / "val.jsonl").read_text().splitlines()[0])
    assert line["image"] == "COCO_train2014_000000581002.jpg"
    assert line["mask"]["size"] == [72, 112]
    manifest = json.loads((tmp_path / "b" / "dataset.json").read_text())
    assert manifest["splits"]["val"] == {
        "references": 6,
        "images": 2,
        "sentences": 18,
        "no_target": 0,
        "published": 3811,
        "left_out": {},
    }


def test_a_converted_data_set_knows_its_name_and_its_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b"
    convert("refcoco", make_refer_tree(tmp_path / "a"), out, format="refer", splits=["train", "val"])
    assert f"refcoco (jsonl) in {out}" in run(capsys, "inspect", out)[1]
    with pytest.raises(ValueError, match=r"dataset='refcoco\+', but .*says that it is 'refcoco'"):
        load_dataset("refcoco+", "val", out, format="jsonl")
    lines = (out / "val.jsonl").read_text().splitlines(keepends=True)
    (out / "val.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="counts 6 references in val, but 5 are there"):
        load_dataset("refcoco", "val", out)
    (out / "dataset.json").write_text('{"format": "fastris-data", "version": 2}')
    with pytest.raises(ValueError, match="is of version 2; this fastris reads 1"):
        load_dataset("refcoco", "train", out)


def test_unusable_references_stop_a_conversion_or_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_everything(tmp_path / "a")
    out = tmp_path / "out"
    code, _, errors = run(capsys, "convert", tmp_path / "a", f"out={out}")
    assert code == 2
    assert "empty mask at ref_id 0" in errors
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    code, printed, _ = run(capsys, "convert", tmp_path / "a", f"out={out}", "on_error=skip", "split=train")
    assert code == 0
    assert "3 left out: missing image" in printed
    assert "42402 fewer than the published 42404" in printed
    assert [json.loads(line)["ref_id"] for line in (out / "train.jsonl").open()] == [7, 15]


def test_an_output_folder_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_refer_tree(tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    code, _, errors = run(capsys, "convert", tmp_path / "a", f"out={tmp_path / 'out'}")
    assert code == 2
    assert "exists and is not empty" in errors
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, number: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    make_refer_tree(tmp_path / "a")
    monkeypatch.setattr(os, "fsync", fail)
    code, printed, errors = run(capsys, "convert", tmp_path / "a", f"out={tmp_path / 'out'}")
    assert (code, printed) == (2, "")
    assert f"could not write {tmp_path / 'out'}: {words}" in errors
    assert errors.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_whatever_interrupts_a_conversion_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_grefs_tree(tmp_path / "a")
    calls = []

    def interrupt(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)

    from fastris.data.formats import convert as module

    original = module._place_image
    monkeypatch.setattr(module, "_place_image", interrupt)
    code, printed, errors = run(capsys, "convert", tmp_path / "a", f"out={tmp_path / 'out'}")
    assert (code, printed, errors) == (130, "", "fastris data: stopped\n")
    assert len(calls) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
