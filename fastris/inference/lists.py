"""Lists of pictures and phrases: JSON lines, or a table with the columns image and phrase."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, TypeAlias

from fastris.inference.fetch import is_url
from fastris.inference.phrases import check_phrases

LISTS = (".jsonl", ".ndjson", ".csv", ".tsv")
"""Suffixes of lists."""

_MANY, _ONE = ("phrases", "sentences"), ("phrase", "sentence")
_MEND = 'write {"image": "a.jpg", "phrases": ["the cat"]} on each line'

Rows: TypeAlias = list[tuple[str, tuple[str, ...]]]
"""(picture, its phrases), none of them where the list has none."""


def read_list(path: Path) -> Rows:
    """Read a list. A relative name is looked for beside the list, and in the folder images there.

    JSON lines have ``image`` and ``phrases`` (or ``sentences``, as data sets of the format folder have, or one
    ``phrase``); other keys are passed over. Tables have a first row with ``image`` and, unless the phrases are given
    elsewhere, ``phrase``. Raises ValueError, naming the line, for anything else.
    """
    if path.suffix.lower() in (".csv", ".tsv"):
        return _table(_text(path.read_bytes(), str(path)), path)
    return rows_of_text(path.read_bytes(), str(path), path.parent)


def rows_of_text(content: bytes, name: str, folder: Path) -> Rows:
    """Rows of JSON lines, or of one picture's name a line."""
    rows: Rows = []
    for number, line in enumerate(_text(content, name).splitlines(), 1):
        if line.strip():
            where = f"{name}, line {number}"
            rows.append(_of_json(line, where, folder) if line.lstrip().startswith("{") else (line.strip(), ()))
            if name != "stdin" and not line.lstrip().startswith("{"):
                raise ValueError(f"{where} is no JSON object; {_MEND}")
    return _some(rows, name)


def _of_json(line: str, where: str, folder: Path) -> tuple[str, tuple[str, ...]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is no valid JSON; {_MEND}") from None
    image = row.get("image")
    if not isinstance(image, str) or not image:
        raise ValueError(f"{where} names no image; {_MEND}")
    found: Any = next((row[key] for key in _MANY if key in row), None)
    if found is None:
        found = [row[key] for key in _ONE if key in row][:1]
    if not isinstance(found, list):
        raise ValueError(f"{where}: phrases must be a list of text; {_MEND}")
    return _beside(image, folder), _checked(found, where)


def _table(text: str, path: Path) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    columns = reader.fieldnames or ()
    if "image" not in columns:
        raise ValueError(f"{path}: the first row must name the columns image and phrase; it has {', '.join(columns)}")
    column = next((name for name in (*_ONE, *_MANY) if name in columns), "")
    rows: Rows = []
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not row["image"] or None in row:
                raise ValueError(f"{where} has {'no image' if not row['image'] else 'too many cells'}; quote commas")
            phrases = _checked([row[column] or ""], where) if column else ()
            rows.append((_beside(row["image"], path.parent), phrases))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; save the table as CSV again") from None
    return _some(rows, str(path))


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _checked(phrases: list[Any], where: str) -> tuple[str, ...]:
    try:
        return check_phrases(phrases) if phrases else ()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _beside(image: str, folder: Path) -> str:
    if is_url(image) or Path(image).is_absolute():
        return image
    below = folder / "images" / image
    return str(below if below.is_file() and not (folder / image).exists() else folder / image)


def _some(rows: Rows, name: str) -> Rows:
    if not rows:
        raise ValueError(f"{name} holds no picture; {_MEND}")
    return rows
