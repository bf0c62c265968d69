"""Helpers of the annotation readers: fields of a checked type, ids, JSON files of a limited size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from fastris.data.base import DataError, shown
from fastris.data.formats.budget import Budget, of_json, of_texts
from fastris.data.paths import content

ID = (int, str)
IDS = range(-(1 << 63), 1 << 64)  # larger numbers can be chosen to have one hash, which makes sets quadratic
MAX_ID = 1000  # characters of an id that is text
MAX_JSON_BYTES = 2 << 30  # COCO's instances_train2014.json, which gRefCOCO comes with, takes 0.3 GB


def field(record: Any, key: str, kinds: tuple[type, ...], where: str, layout: str = "the REFER layout") -> Any:
    """Return `record[key]`. Raises DataError, naming record and key, unless it exists and has one of the types."""
    if type(record) is not dict:
        raise DataError(f"{where} is {type(record).__name__}, but must be a dict")
    if key not in record:
        raise DataError(f"{where} lacks the key {key!r}; is this file in {layout}?")
    if type(record[key]) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{where} has {key!r} of type {type(record[key]).__name__}, but it must be {wanted}")
    if kinds is ID and not is_id(record[key]):
        raise DataError(f"{where} has {key!r} {shown(record[key])}; {ID_RULE}")
    return record[key]


ID_RULE = f"an id must be a number of 64 bits or a text of at most {MAX_ID} characters"


def is_id(value: Any) -> TypeGuard[int | str]:
    """Whether a value is a valid id; `ID_RULE` says which are."""
    return (type(value) is int and value in IDS) or (type(value) is str and len(value) <= MAX_ID)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: the file cannot be read, is larger than `max_bytes`, would take more memory than its `Budget`, or is
            not valid JSON or nested too deep.
    """
    data = content(path, max_bytes)
    return parse_json(data, str(path), Budget(path, len(data)))


def parse_json(data: bytes | str, where: str, budget: Budget) -> Any:
    """`read_json` for text in memory; errors name it `where`, and `budget` limits the memory of the result."""
    budget.spend(of_json(data))
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}); download it again or correct it") from error


def by_id(records: list[Any], wanted: Iterable[int | str], where: str) -> dict[int | str, dict[str, Any]]:
    """The records whose id is wanted, by id."""
    wanted = set(wanted)
    found = {}
    for number, record in enumerate(records):
        record_id = field(record, "id", ID, f"{where} number {number}")
        if record_id in wanted:
            found[record_id] = record
    return found


def sentences_of(record: dict[str, Any], where: str, budget: Budget) -> tuple[str, ...]:
    """The expressions of a reference in REFER's form, a list of `{"sent": text}`, stripped."""
    sentences = field(record, "sentences", (list, tuple), where)
    if not sentences:
        raise DataError(f"{where} has no sentences; leave the reference out of the file, or add one")
    texts = [
        field(sentence, "sent", (str,), f"{where} sentence number {number},")
        for number, sentence in enumerate(sentences)
    ]
    return stripped(texts, budget)


def stripped(texts: Sequence[str], budget: Budget) -> tuple[str, ...]:
    """Strip texts. Each copy counts against the budget: in the file all may have been one text."""
    budget.spend(of_texts(texts))
    return tuple(text.strip() for text in texts)
