"""What the page takes: how large a picture, how many phrases, and how they are told from one another."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastris.inference.images import encoded_size, read_encoded

MOST_PHRASES = 32
"""Phrases that may be asked about one picture at a time."""

LONGEST = 4000
"""Characters of all phrases together."""


@dataclass(frozen=True)
class Limits:
    """The largest picture that may be uploaded. Raises ValueError for a limit that nothing could meet."""

    megabytes: float = 32.0
    megapixels: float = 50.0

    def __post_init__(self) -> None:
        for option, value in (("upload_mb", self.megabytes), ("upload_megapixels", self.megapixels)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{option}={value:g} must be a finite number above 0")

    @property
    def bytes(self) -> int:
        """The largest file."""
        return max(1, int(self.megabytes * 10**6))


def read_upload(path: Path, name: str, limits: Limits) -> tuple[np.ndarray, tuple[str, ...]]:
    """The picture (H, W, 3) uint8 in an uploaded file, upright, and what there is to say about it.

    Its size is told by the file's first bytes, before anything is decoded. ``name``: what the visitor calls it. Raises
    ValueError for a picture that is too large, or none.
    """
    size = path.stat().st_size
    if size > limits.bytes:
        raise ValueError(
            f"{name} has {size / 1e6:.1f} MB, and this page takes up to {limits.megabytes:g}: shrink it first"
        )
    content = path.read_bytes()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        width, height = encoded_size(content, name)
        if width * height > limits.megapixels * 1e6:
            raise ValueError(
                f"{name} is {width} x {height} pixels, and this page takes up to {limits.megapixels:g} million: "
                "shrink or crop it first"
            )
        rgb = read_encoded(content, name)
    return rgb, tuple(str(each.message) for each in caught if issubclass(each.category, UserWarning))


def phrases_of(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The phrases in a text, one a line, and what there is to say about them.

    A comma belongs to its phrase, as in "the man in red, second from the left". Empty lines are none. Raises
    ValueError for too many phrases, or too long a text.
    """
    if len(text) > LONGEST:
        raise ValueError(f"the phrases have {len(text)} characters together, and this page takes up to {LONGEST}")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    given = [line for line in lines if line]
    phrases = tuple(dict.fromkeys(given))
    if len(phrases) > MOST_PHRASES:
        raise ValueError(f"there are {len(phrases)} phrases, and this page takes up to {MOST_PHRASES} at a time")
    notes = []
    if len(given) > len(phrases):
        notes.append("a phrase that is there twice is asked once")
    if any("," in phrase for phrase in phrases):
        notes.append("a comma belongs to its phrase: to ask for several things, write one a line")
    return phrases, tuple(notes)
