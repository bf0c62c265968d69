"""No name in a data set's files leads out of its folder, and nothing that never ends is opened."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_trees import make_folder_tree, make_grefs_tree, make_parquet_tree, save_mask
from PIL import Image
from refer_tree import make_refer_tree

from fastris.commands import cli
from fastris.data import DataError, load_dataset, paths
from fastris.data.base import printable, shown
from fastris.data.formats.annotated import UnusableReference
from fastris.data.formats.jsonl import FolderDataset
from fastris.data.paths import GONE, IRREGULAR, OUT, Look, regular, stays
from fastris.runtime.plain import check_file


def folder(root: Path, **changes: Any) -> Path:
    """A folder of one's own data beside a secret picture: one reference, with some of its fields changed."""
    Image.new("RGB", (6, 4)).save(root / "secret.png")
    for name in ("images", "masks"):
        (root / "tree" / name).mkdir(parents=True)
        save_mask(np.ones((4, 6), bool), root / "tree" / name / "a.png")
    row = {"image": "a.png", "mask": "a.png", "sentences": ["it"]} | changes
    (root / "tree" / "train.jsonl").write_text(json.dumps(row))
    return root / "tree"


NAMES = [
    "{0}",
    "images/{0}",
    "images//{0}",
    "masks/{0}",
    "masks//{0}",
    "images/images/{0}",
    "images/images//{0}",
    "./images/{0}",
    "./masks//{0}",
    "images/./{0}",
    "images/../../secret.png",
    "masks/../../secret.png",
    "../secret.png",
    "images/\\..\\..\\secret.png",
    "images/C:\\secret.png",
    "images/\\secret.png",
    "images/a.png\0",
    "images/",
    "masks/",
    ".",
    "images/\ud800.png",
    "images/" + "a" * 256,
    "images/" + "é" * 128,
    "images/%2e%2e/%2e%2e/secret.png",
    "images/\u2025/secret.png",
    "images\uff0f..\uff0fsecret.png",
]


@pytest.mark.parametrize("key", ["image", "mask"])
@pytest.mark.parametrize("name", NAMES)
def test_no_spelling_of_a_name_leaves_its_folder(tmp_path: Path, name: str, key: str) -> None:
    root = folder(tmp_path, **{key: name.replace("{0}", str(tmp_path / "secret.png"))})
    with pytest.raises(DataError):
        load_dataset("folder", "train", root)
    data = FolderDataset("folder", "train", root, on_error="defer")
    with pytest.raises(UnusableReference):
        data.reference(0)


@pytest.mark.parametrize("key", ["image", "mask"])
def test_check_and_convert_refuse_a_name_that_is_absolute_without_its_prefix(
    tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path, **{key: f"{key}s/{tmp_path}/secret.png"})
    assert cli.main(["data", "check", str(root)]) == 1
    assert "1 x bad record" in capsys.readouterr().out
    assert cli.main(["data", "convert", str(root), f"out={tmp_path / 'out'}"]) == 2
    assert f"which leaves the folder of {key}s" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def links(root: Path) -> dict[str, tuple[str, str]]:
    """Names in a folder, and what `Look` must find: what they are by their own, not by their spelling."""
    inside, outside = root / "in", root / "out"
    for place in (inside / "sub", outside):
        place.mkdir(parents=True)
        (place / "a.png").write_bytes(b"x")
    (inside / "file out").symlink_to(outside / "a.png")
    (inside / "climbs").symlink_to("../out/a.png")
    (inside / "folder out").symlink_to(outside)
    (inside / "sub" / "folder out").symlink_to("../../out")
    (inside / "folder in").symlink_to("sub")
    (inside / "file in").symlink_to(inside / "sub" / "a.png")
    (inside / "chain").symlink_to("file out")
    (inside / "device").symlink_to("/dev/zero")
    (inside / "nothing").symlink_to("gone")
    (inside / "round").symlink_to("round")
    os.mkfifo(inside / "fifo")
    (inside / "fifo link").symlink_to("fifo")
    return {
        "sub/a.png": ("", ""),
        "folder in/a.png": ("", ""),
        "file in": ("", ""),
        "./sub//a.png": ("", ""),
        "file out": (OUT, ""),
        "climbs": (OUT, ""),
        "chain": (OUT, ""),
        "folder out/a.png": (OUT, ""),
        "sub/folder out/a.png": (OUT, ""),
        "folder in/folder out/a.png": (OUT, ""),
        "device": (OUT, ""),
        "fifo": (IRREGULAR, ""),
        "fifo link": (IRREGULAR, ""),
        "sub": (IRREGULAR, ""),
        "nothing": (GONE, ""),
        "round": (GONE, ""),
        "gone/a.png": (GONE, ""),
        "../out/a.png": (OUT, ""),
        str(outside / "a.png"): (OUT, ""),
    }


@pytest.mark.parametrize("how", ["plain", "through a link", "relative", "here"])
def test_links_are_followed_to_where_they_end(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, root = links(tmp_path), tmp_path / "in"
    if how == "through a link":
        (tmp_path / "link").symlink_to(root)
        root = tmp_path / "link"
    elif how != "plain":
        monkeypatch.chdir(tmp_path if how == "relative" else root)
        root = Path("in" if how == "relative" else ".")
    look = Look()
    assert {name: look(root, name) for name in expected} == {name: found for name, (found, _) in expected.items()}
    assert {name: look(root, name) for name in expected} == {name: found for name, (found, _) in expected.items()}


def test_each_name_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").touch()
    looked: list[str] = []
    real = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path: looked.append(os.fspath(path)) or real(path))
    look = Look()
    assert [look(tmp_path, "sub/a.png") for _ in range(5)] == [""] * 5
    assert looked.count(str(tmp_path / "sub" / "a.png")) == 1


@pytest.mark.parametrize(
    "name", ["a.png", "sub/a b.png", "ä/画像.jpg", ".hidden", "a..b", "...", "COCO (1)/x,y+z@2=3.jpg"]
)
def test_usual_names_stay(name: str) -> None:
    assert stays(name)


def replace(path: Path, by: str) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path) if by == "fifo" else path.symlink_to("/dev/zero")


TREES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "manifest": (make_folder_tree, "folder", "dataset.json"),
    "lines": (make_folder_tree, "folder", "train.jsonl"),
    "image": (make_folder_tree, "folder", "images/COCO_train2014_000000581000.jpg"),
    "mask": (make_folder_tree, "folder", "masks/0.png"),
    "pickle": (make_refer_tree, "refcoco", "refcoco/refs(unc).p"),
    "instances": (make_refer_tree, "refcoco", "refcoco/instances.json"),
    "grefs": (make_grefs_tree, "grefcoco", "grefcoco/grefs(unc).json"),
    "parquet": (make_parquet_tree, "refcoco", "data/train-00000-of-00001.parquet"),
    "lmdb": (lambda root: (root / "lmdb" / "refcoco").mkdir(parents=True), "refcoco", "lmdb/refcoco/train.lmdb"),
}


def refusal_of(dataset: str, root: Path, seconds: int = 20) -> str:
    """What loading says, in a forked process that an alarm ends where it waits, or reads without end."""
    read, write = os.pipe()
    if not (child := os.fork()):
        code = 1
        try:
            signal.alarm(seconds)
            load_dataset(dataset, "train", root)
        except DataError as error:
            os.write(write, str(error).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as told:
        said = told.read()
    assert os.waitpid(child, 0)[1] == 0, "it was read, or took too long"
    return said


@pytest.mark.parametrize("by", ["fifo", "device"])
@pytest.mark.parametrize("what", TREES)
def test_a_fifo_or_a_device_in_place_of_any_file_is_one_line_and_no_wait(tmp_path: Path, what: str, by: str) -> None:
    make, dataset, file = TREES[what]
    if what in ("parquet", "lmdb"):
        pytest.importorskip({"parquet": "pyarrow", "lmdb": "lmdb"}[what])
    make(tmp_path)
    replace(tmp_path / file, by)
    refusal = refusal_of(dataset, tmp_path)
    assert len(refusal.splitlines()) == 1
    said = ("is a pipe and no file" if by == "fifo" else "is a device", IRREGULAR, OUT, "leads out of")
    assert any(words in refusal for words in said), refusal


def test_what_is_no_file_is_called_the_same_in_a_data_set_as_on_the_command_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(FileNotFoundError) as asked:
            check_file(str(path), path, "put a regular file there")
        with pytest.raises(DataError) as read:
            regular(path)
        assert str(read.value) == str(asked.value)


@pytest.mark.parametrize("dataset", ["folder", "refcoco", "grefcoco", "parquet"])
def test_a_file_that_may_not_be_read_is_not_called_missing_or_damaged(
    tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = {"folder": make_folder_tree, "refcoco": make_refer_tree, "grefcoco": make_grefs_tree}
    if dataset == "parquet":
        pytest.importorskip("pyarrow")
    make.get(dataset, make_parquet_tree)(tmp_path)
    real = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.suffix in (".jsonl", ".p", ".json", ".parquet"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    if dataset == "parquet":
        from pyarrow import parquet

        def parquet_file(path: Path, **options: Any) -> Any:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(parquet, "ParquetFile", parquet_file)
    with pytest.raises(
        DataError, match=r"cannot be read \(Permission denied\); give this account the right to read it"
    ):
        load_dataset("refcoco" if dataset == "parquet" else dataset, "train", tmp_path)


@pytest.mark.parametrize("call", ["lstat", "stat"])
def test_a_folder_that_may_not_be_entered_is_not_called_missing(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_refer_tree(tmp_path)
    real = getattr(os, call)

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if "refs(unc)" in os.fspath(path) or "instances" in os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        load_dataset("refcoco", "train", root, format="refer")


def test_an_image_that_may_not_be_looked_at_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path)
    real = os.lstat

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if os.fspath(path).endswith("images/a.png"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(DataError, match=r"unreadable image at ref_id .*Permission denied"):
        load_dataset("folder", "train", root)


def test_a_root_that_may_not_be_read_is_not_called_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); give this account the right"):
        load_dataset("folder", "train", tmp_path)


def test_an_unreadable_file_is_a_problem_of_its_split_in_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder_tree(tmp_path)
    (root / "dataset.json").unlink(missing_ok=True)
    real = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "train.jsonl":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(paths.Path, "open", refuse)
    assert cli.main(["data", "check", str(root), "split=val"]) in (0, 1, 2)
    assert cli.main(["data", "check", str(root)]) == 1
    assert "1 x unreadable annotation file" in capsys.readouterr().out


# What a stranger wrote does not steer the terminal

ESCAPE = "\x1b[2J\x07\u202e\ud800\nfastris: all is well"


@pytest.mark.parametrize("format", ["folder", "refer"])
def test_no_control_character_of_a_data_set_reaches_the_terminal(
    tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    escape = ESCAPE if format == "folder" else ESCAPE.replace("\ud800", "")  # pickles with halves are refused
    if format == "folder":
        root = folder(tmp_path, ref_id=ESCAPE, mask="gone" + ESCAPE, split=ESCAPE)
        manifest = {"format": "fastris-data", "version": 1, "name": ESCAPE, "splits": {ESCAPE: {"references": 1}}}
        (root / "dataset.json").write_text(json.dumps(manifest))
    else:
        root = make_refer_tree(tmp_path / "tree")
        file = root / "refcoco" / "refs(unc).p"
        refs = pickle.loads(file.read_bytes())
        for number, ref in enumerate(refs):
            ref.update(ref_id=f"{escape}{number}", split=escape, sentences=[{"sent": escape}])
        refs[0].update(image_id=escape)
        refs[1]["sentences"] = [{"sent": escape}, {"sent": ""}]
        file.write_bytes(pickle.dumps(refs, 2))
    assert cli.main(["data", "check", str(root), "word_len=0", f"json={tmp_path / 'report.json'}"]) == 1
    printed = "".join(capsys.readouterr())
    assert "\\x1b[2J" in printed
    assert not set(printed) & {"\x1b", "\x07", "\u202e", "\ud800"}
    assert not any(line.startswith("fastris: all is well") for line in printed.splitlines())
    report = json.loads((tmp_path / "report.json").read_text())
    (problems,) = (split["problems"] for entry in report["datasets"] for split in entry["splits"].values())
    ids = [case["ref_id"] for problem in problems.values() for case in problem["references"]]
    kept = escape.encode("utf-8", "backslashreplace").decode()  # half of a character is what no file can hold
    assert all(ref_id.startswith(kept) for ref_id in ids) and ids, "the report keeps ids as they are"


def test_conversion_keeps_ids_and_sentences_exactly_and_escapes_them(tmp_path: Path) -> None:
    said = f"it {ESCAPE}.".replace("\ud800", "")  # with half of a character it is no phrase
    root = folder(tmp_path, ref_id=ESCAPE, sentences=[said])
    assert cli.main(["data", "convert", str(root), f"out={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "train.jsonl").read_bytes().isascii()
    reference = load_dataset("folder", "train", tmp_path / "out").reference(0)
    assert (reference.ref_id, reference.sentences) == (ESCAPE, (said,))


@pytest.mark.parametrize("split", ["../x", "a/b", "x\x1b[2J", "\ud800", "x" * 300, "", ".x", "a\nb", "a\0b"])
def test_a_split_that_can_name_no_file_is_one_line(tmp_path: Path, split: str) -> None:
    root = folder(tmp_path, split=split)
    from fastris.data.formats.convert import convert

    with pytest.raises(DataError, match="cannot be the name of a file") as error:
        convert("folder", root, tmp_path / "out", format="jsonl", splits=[split])
    assert str(error.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_values_are_shown_briefly_whatever_their_size() -> None:
    assert len(shown("x" * 10**6)) < 300
    assert len(shown(["x" * 10**6] * 10**6)) < 500
    assert len(printable("x" * 10**6)) < 5000
    assert printable("a\x1bb\u202ec\ud800 é画") == "a\\x1bb\\u202ec\\ud800 é画"
    assert str(DataError("a\nb\x1b")) == "a\\nb\\x1b"
    assert str(DataError("a\nb\x1b", lines=True)) == "a\nb\\x1b"
