"""Convert the values in a pickle to Python's, and refuse the ones that could exhaust memory or time."""

from __future__ import annotations

import codecs
from typing import Any

MAX_NUMBER = 64  # bytes of one written number

MAX_DEPTH = 32  # the REFER layout nests five deep
MAX_NUMBER_KEYS = 256  # largest dict with keys that are no texts: equal hashes make adding keys quadratic

_SCALARS = frozenset({str, int, float, bool, type(None)})
_LEAVES = _SCALARS | {bytes}
_TEXT = frozenset({str})
_BAD_KEY = "a dict key that is neither a string nor a number"


class Malformed(ValueError):
    """The bytes are not a pickle, or a damaged one."""


def text(raw: bytes) -> str:
    """A string of Python 2: UTF-8 or, where that fails, Latin-1."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def line_int(line: bytes) -> int | bool:
    """An integer of protocol 0, which also writes booleans in this way."""
    return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line)


def quoted(line: bytes) -> str:
    """A string of protocol 0, in quotes and with escapes."""
    whole = line.strip()
    body = whole[1:-1]
    if len(whole) < 2 or whole[0] not in b"'\"" or whole[-1] != whole[0]:
        raise Malformed("a string without quotes")
    return text(codecs.escape_decode(body)[0] if b"\\" in body else body)  # type: ignore[attr-defined]


def long(raw: bytes) -> int:
    """A little-endian signed integer of up to `MAX_NUMBER` bytes."""
    if len(raw) > MAX_NUMBER:
        raise Malformed(f"an integer of {len(raw)} bytes")
    return int.from_bytes(raw, "little", signed=True)


def check_tree(value: Any, budget: list[int], depth: int = 0) -> None:
    """Raise Malformed for cycles, deep nesting, and shared parts that make far more values than the file has bytes.

    `budget` holds the number of values that are still allowed.
    """
    kind = type(value)
    if kind in _LEAVES:
        return
    if kind not in (list, tuple, dict):
        raise Malformed("a name that is not used")
    budget[0] -= len(value) + 1
    if depth > MAX_DEPTH or budget[0] < 0:
        raise Malformed("the values contain themselves, nest too deep or repeat without end")
    for item in value.values() if kind is dict else value:
        check_tree(item, budget, depth + 1)


def pairs(items: list[Any], before: int = 0) -> dict[Any, Any]:
    """A dict from alternating keys and values; `before` counts the keys of the dict that it will be added to."""
    keys, values = items[::2], items[1::2]
    if len(keys) != len(values):
        raise Malformed("a key without a value")
    if not _TEXT.issuperset(map(type, keys)):
        check_keys(keys, before)
    return dict(zip(keys, values))  # noqa: B905 -- strict=True costs time, and the lengths are equal


def check_keys(keys: list[Any], before: int) -> None:
    """Raise Malformed for keys that are no scalars, and for too many that are no texts."""
    if not _SCALARS.issuperset(map(type, keys)):
        raise Malformed(_BAD_KEY)
    if before + len(keys) > MAX_NUMBER_KEYS:
        raise Malformed(f"a dict of over {MAX_NUMBER_KEYS} keys that are not all texts")
