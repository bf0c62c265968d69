from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from format_trees import LIBRARIES, MAKERS, SPLITS, make_folder_tree, pixels
from PIL import Image
from refer_tree import IMAGE_FOLDER, make_refer_tree

from fastris.commands import cli
from fastris.data import ReferringDataset
from fastris.data.formats import published
from fastris.data.formats.annotated import AnnotatedDataset

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    code = cli.main(["data", *map(str, args)])
    return code, *capsys.readouterr()


def made(layout: str, root: Path) -> Path:
    if layout in LIBRARIES:
        pytest.importorskip(LIBRARIES[layout])
    return MAKERS[layout][1](root)


def everything(data: ReferringDataset) -> list[Any]:
    return [(data.reference(index), *pixels(data, index)) for index in range(len(data))]


# inspect


@pytest.mark.parametrize("layout", MAKERS)
def test_inspect_counts_every_split_of_every_format(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = made(layout, tmp_path / "tree")
    code, printed, errors = run(capsys, "inspect", root)
    assert (code, errors) == (0, "")
    for split in SPLITS:
        without = "2 without a target; " if layout == "grefs" else ""
        counted = "2 images, 2 without a target" if without else "2 images"
        assert f"{split:<6} 6 references, 18 sentences, {counted}; " in printed


def test_inspect_compares_with_the_published_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_refer_tree(tmp_path)
    monkeypatch.setitem(published.REFERENCES["refcoco"], "val", 6)
    _, printed, _ = run(capsys, "inspect", tmp_path)
    assert "42398 fewer than the published 42404" in printed
    assert printed.count("equals the published count") == 1


def test_the_published_counts_are_the_papers() -> None:
    assert published.REFERENCES == {
        "refcoco": {"train": 42404, "val": 3811, "testA": 1975, "testB": 1810},
        "refcoco+": {"train": 42278, "val": 3805, "testA": 1975, "testB": 1798},
        "refcocog_u": {"train": 42226, "val": 2573, "test": 5023},
        "refcocog_g": {"train": 44822, "val": 5000},
        "refcoco-m": {"val": 2080},
    }


def test_inspect_counts_references_without_their_images_and_fails_on_files_that_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_refer_tree(tmp_path)
    for file in (tmp_path / IMAGE_FOLDER).iterdir():
        file.unlink()
    code, printed, _ = run(capsys, "inspect", tmp_path, "split=val")
    assert code == 0
    assert "val    6 references, 0 sentences, 0 images; 3805 fewer" in printed
    assert "6 x missing image" in printed
    (tmp_path / "refcoco" / "instances.json").write_text("{")
    assert run(capsys, "inspect", tmp_path, "split=val")[0] == 1


def test_a_folder_with_several_data_sets_shows_all_and_convert_asks_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("refcoco", "refcoco+", "refcocog_u", "refcocog_g"):
        make_refer_tree(tmp_path, name)
    code, printed, _ = run(capsys, "inspect", tmp_path)
    assert code == 0
    for name in ("refcoco ", "refcoco+ ", "refcocog_u ", "refcocog_g "):
        assert f"\n{name}(refer)" in "\n" + printed
    code, _, errors = run(capsys, "convert", tmp_path, f"out={tmp_path / 'out'}")
    assert code == 2
    assert "refcoco (refer), refcoco+ (refer)" in errors
    assert "choose one with dataset=" in errors


# check


@pytest.mark.parametrize("layout", MAKERS)
def test_a_whole_data_set_has_no_problems(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "check", made(layout, tmp_path), f"dataset={MAKERS[layout][0]}")
    assert (code, printed.splitlines()[-1]) == (0, "no problems")


def break_everything(root: Path) -> dict[str, list[Any]]:
    """A REFER tree with one of each problem, and what `check` must say about split train."""

    def change(instances: dict[str, Any]) -> None:
        instances["annotations"][0]["segmentation"] = []
        instances["annotations"][1]["segmentation"] = [[1, 2, 3]]
        instances["annotations"][6]["segmentation"] = [[1.1, 1.1, 1.2, 1.1, 1.2, 1.2]]

    def change_refs(refs: list[dict[str, Any]]) -> None:
        refs[2]["sentences"][0]["sent"] = " "
        refs[15]["sentences"][1]["sent"] = "the " * 40 + "block"
        refs[16]["ref_id"] = 15
        refs[17]["sentences"][0]["sent"] = "<start_of_text>"
        refs[8]["ann_id"] = 9999

    make_refer_tree(root, images_per_split=6, change_instances=change, change_refs=change_refs)
    images = sorted((root / IMAGE_FOLDER).iterdir())
    images[1].unlink()
    images[3].write_bytes(images[3].read_bytes()[:-700])
    Image.new("RGB", (5, 5)).save(images[4])
    return {
        "empty mask": [0, 6],
        "bad annotation": [1],
        "empty sentence": [2],
        "missing image": [3, 4, 5],
        "bad record": [8],
        "unreadable image": [9, 10, 11],
        "size mismatch": [12, 13, 14],
        "over-long phrase": [15],
        "duplicate id": [15],
        "phrase without a word": [17],
    }


def test_check_names_every_reference_of_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = break_everything(tmp_path)
    report = tmp_path / "report.json"
    code, printed, _ = run(capsys, "check", tmp_path, "split=train", f"json={report}")
    problems = json.loads(report.read_text())["datasets"][0]["splits"]["train"]["problems"]
    assert {name: [case["ref_id"] for case in entry["references"]] for name, entry in problems.items()} == expected
    assert all(entry["count"] == len(expected[name]) and entry["mend"] for name, entry in problems.items())
    assert code == 1
    assert "3 x missing image: ref_id 3, 4, 5\n" in printed
    assert printed.splitlines()[-1] == f"{sum(map(len, expected.values()))} problems"


def test_check_decodes_each_image_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_refer_tree(tmp_path)
    decoded = []
    original = AnnotatedDataset.image
    monkeypatch.setattr(AnnotatedDataset, "image", lambda data, i: decoded.append(i) or original(data, i))
    assert run(capsys, "check", tmp_path, "split=train", "word_len=0")[0] == 0
    assert decoded == [0, 3]


def test_check_prints_nothing_but_json_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, errors = run(capsys, "check", make_refer_tree(tmp_path), "--json")
    assert (code, errors) == (0, "no problems\n")
    assert json.loads(printed)["datasets"][0]["splits"]["val"]["references"] == 6


def test_check_finds_problems_in_lmdb_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lmdb")
    from format_trees import make_lmdb_tree

    breaks = {0: {"img": b"no image"}, 1: {"seg_id": 2}, 3: {"cat": {1, 2}}, 4: {"mask": b"no mask"}}
    make_lmdb_tree(tmp_path, change=lambda record: record.update(breaks.get(record["seg_id"], {})))
    code, printed, _ = run(capsys, "check", tmp_path, "dataset=refcoco", "split=train", "format=lmdb")
    assert code == 1
    for line in ("unreadable image: ref_id 0", "duplicate id: ref_id 2", "record: ref_id record 3", "annotation: ref_"):
        assert f"1 x {'bad ' if line[0] in 'ra' else ''}{line}" in printed


def test_a_file_that_cannot_be_read_at_all_is_a_problem_and_the_other_splits_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder_tree(tmp_path)
    (tmp_path / "val.jsonl").write_bytes(b'{"image": ' + b"9" * 100)
    code, printed, _ = run(capsys, "check", tmp_path)
    assert code == 1
    assert "train  6 references" in printed
    assert "1 x bad record: ref_id line 1" in printed
    make_refer_tree(tmp_path / "refer")
    (tmp_path / "refer" / "refcoco" / "instances.json").write_text("{")
    code, printed, _ = run(capsys, "check", tmp_path / "refer")
    assert (code, printed.count("unreadable annotation file")) == (1, 4)


def test_phrases_are_measured_against_the_published_length_or_the_one_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder_tree(tmp_path, lambda row: row.update(sentences=["one two three four five"]))
    assert run(capsys, "check", tmp_path, "word_len=7")[0] == 0
    code, printed, _ = run(capsys, "check", tmp_path, "word_len=6")
    assert code == 1
    assert "6 x over-long phrase" in printed
    assert run(capsys, "check", tmp_path, "word_len=0")[0] == 0


CHECK_THAT_WAITS = """
import signal, sys, time
from pathlib import Path
from fastris.commands import cli
from fastris.data.formats.annotated import AnnotatedDataset

def look(*_):
    Path(sys.argv[2]).touch()
    time.sleep(20)

AnnotatedDataset.problems = look
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
sys.exit(cli.main(["data", "check", sys.argv[1]]))
"""


@pytest.mark.slow
def test_ctrl_c_stops_a_check_in_one_line(tmp_path: Path) -> None:
    make_refer_tree(tmp_path / "tree")
    started = tmp_path / "started"
    command = [sys.executable, "-c", CHECK_THAT_WAITS, str(tmp_path / "tree"), str(started)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        end = time.monotonic() + 30
        while not started.exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            printed, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, printed, errors) == (130, "", "fastris data: stopped\n")


# mistakes


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["look", "."], ["action must be inspect|check|convert, got 'look'"]),
        ([], ["ACTION is missing"]),
        (["inspect"], ["ROOT is missing"]),
        (["inspect", "nowhere"], ["does not exist", "jsonl:", "refer:", "lmdb:", "parquet:"]),
        (["inspect", ".", "dataset=coco"], ["dataset='coco' is unknown", "refcocog_u", "grefcoco", "folder"]),
        (
            ["inspect", ".", "format=csv"],
            ["format must be auto|jsonl|refer|lmdb|parquet|coco|labelme|cvat|hub, got 'csv'"],
        ),
        (["inspect", ".", "dataset=refcoco"], ["refcoco/refs(unc).p (MISSING)", "lmdb:"]),
        (["convert", "."], ["convert needs out="]),
        (["check", ".", "out=x"], ["check writes no out="]),
        (["check", ".", "word_len=2"], ["word_len=2 must lie in 3..77"]),
    ],
)
def test_mistakes_are_one_line_that_lists_what_is_right(
    tmp_path: Path, args: list[str], parts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, errors = run(capsys, *args)
    assert (code, printed) == (2, "")
    assert errors.count("\n") == 1
    for part in parts:
        assert part in errors


def test_a_wrong_split_lists_the_right_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("inspect", "check", "convert"):
        out = [f"out={tmp_path / 'out'}"] if action == "convert" else []
        code, _, errors = run(capsys, action, make_refer_tree(tmp_path / "a"), "split=dev", *out)
        assert (code, errors) == (2, "fastris data: split='dev' is unknown; refcoco has train, val, testA, testB\n")


@pytest.mark.parametrize("layout", LIBRARIES)
def test_a_missing_library_is_one_line_with_its_extra(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = made(layout, tmp_path / "tree")
    monkeypatch.setitem(sys.modules, LIBRARIES[layout], None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for action in ("inspect", "check", "convert"):
        out = [f"out={tmp_path / 'out'}"] if action == "convert" else []
        code, printed, errors = run(capsys, action, root, "dataset=refcoco", *out)
        assert (code, printed) == (2, "")
        assert errors.startswith(f"fastris data: {LIBRARIES[layout]} is needed to read")
        assert errors.endswith(f"and is not installed: pip install 'fastris[{layout}]'\n")


def test_help_tells_what_each_action_does(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "--help")
    assert code == 0
    assert "usage: fastris data ACTION ROOT" in printed
    assert all(f"\n{action}" in printed for action in ("inspect:", "check:", "convert:"))
