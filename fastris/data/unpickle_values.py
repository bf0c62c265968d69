"""What is written in a pickle, to Python's values."""

from __future__ import annotations

import codecs

MAX_NUMBER = 64  # bytes of one written number


class Malformed(ValueError):
    """The bytes are not a pickle, or a damaged one."""


def text(raw: bytes) -> str:
    """A string of Python 2: UTF-8, or else one character a byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def line_int(line: bytes) -> int | bool:
    """A number of protocol 0, which also spells booleans."""
    return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line)


def quoted(line: bytes) -> str:
    """A string of protocol 0."""
    whole = line.strip()
    body = whole[1:-1]
    if len(whole) < 2 or whole[0] not in b"'\"" or whole[-1] != whole[0]:
        raise Malformed("a string without quotes")
    return text(codecs.escape_decode(body)[0] if b"\\" in body else body)  # type: ignore[attr-defined]


def long(raw: bytes) -> int:
    """A number of any length up to `MAX_NUMBER`."""
    if len(raw) > MAX_NUMBER:
        raise Malformed(f"an integer of {len(raw)} bytes")
    return int.from_bytes(raw, "little", signed=True)
