"""What strangers named is printed in one line that does nothing to a terminal, and read only where it is a file."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from fastris.runtime.plain import check_file, json_text, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a cup", "a cup"),
        ("the caf\u00e9 \u65e5\u672c\u3000\u8a9e", "the caf\u00e9 \u65e5\u672c\u3000\u8a9e"),
        ("a\x1b[2Jb\x07\r\n\t", r"a\x1b[2Jb\x07\r\n\t"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("exe.\u202egnp", r"exe.\u202egnp"),
        ("a\u2028b", r"a\u2028b"),
        (os.fsdecode(b"odd\xff.png"), r"odd\udcff.png"),
        (Path("a\nb"), r"a\nb"),
    ],
)
def test_text_is_printed_without_control_characters_or_surrogates(text: object, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode("utf-8")


def test_json_holds_odd_names_in_utf8_and_gives_them_back() -> None:
    names = [os.fsdecode(b"odd\xff.png"), "caf\u00e9", "\\ud800"]
    assert json.loads(json_text(names).encode("utf-8")) == names


def test_what_is_no_readable_file_is_called_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    for path, why in {
        tmp_path: "is a folder",
        tmp_path / "pipe": "is a pipe",
        tmp_path / "socket": "is a socket",
        Path("/dev/null"): "is a device",
        tmp_path / "none": "does not exist",
        tmp_path / "null\0": "is no name that a file can have",
    }.items():
        with pytest.raises(FileNotFoundError, match=f"^image {why}.*; give another$"):
            check_file("image", path, "give another")
    (tmp_path / "locked").touch()
    check_file("image", tmp_path / "locked", "give another")

    def refuse(self: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"^image cannot be read: Permission denied; give another$"):
        check_file("image", tmp_path / "locked", "give another")
