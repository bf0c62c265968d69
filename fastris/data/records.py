"""What readers of annotation files share: fields of a checked type, files of a bounded size, records that are bad."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastris.data.base import DataError

ID = (int, str)
MAX_JSON_BYTES = 2 << 30  # COCO's instances_train2014.json, which gRefCOCO comes with, takes 0.3 GB


def field(record: Any, key: str, kinds: tuple[type, ...], where: str, layout: str = "the REFER layout") -> Any:
    """`record[key]`, if `record` is a dict that has it, of one of the types; else a DataError that names both."""
    if type(record) is not dict:
        raise DataError(f"{where} is {type(record).__name__}, but must be a dict")
    if key not in record:
        raise DataError(f"{where} lacks the key {key!r}; is this file in {layout}?")
    if type(record[key]) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{where} has {key!r} of type {type(record[key]).__name__}, but it must be {wanted}")
    return record[key]


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: not valid JSON, nested too deep, or larger than `max_bytes`, in which case it is not read.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise DataError(f"{path} has {size} bytes and was not read; the limit is {max_bytes}")
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes | str, where: str) -> Any:
    """`read_json` for text in memory; `where` is how the error names it."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}); download it again or correct it") from error


def by_id(records: list[Any], wanted: Iterable[int | str], where: str) -> dict[int | str, dict[str, Any]]:
    """Those of the records whose id is wanted."""
    wanted = set(wanted)
    found = {}
    for number, record in enumerate(records):
        record_id = field(record, "id", ID, f"{where} number {number}")
        if record_id in wanted:
            found[record_id] = record
    return found


def sentences_of(record: dict[str, Any], where: str) -> tuple[str, ...]:
    """The expressions of a reference in REFER's form, a list of `{"sent": text}`, stripped."""
    sentences = field(record, "sentences", (list, tuple), where)
    if not sentences:
        raise DataError(f"{where} has no sentences; leave the reference out of the file, or add one")
    return tuple(
        field(sentence, "sent", (str,), f"{where} sentence number {number},").strip()
        for number, sentence in enumerate(sentences)
    )
