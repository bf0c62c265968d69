"""The picture with its masks, and the lines beside it, for a browser."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from fastris.app.visit import Seen
from fastris.pictures.overlay import colour_of, paint, resize_for_view
from fastris.runtime.plain import printable


class Row(NamedTuple):
    """What the page says of one phrase; ``number`` chooses its colour, ``share`` is the mask's part of the picture."""

    number: int
    phrase: str
    found: bool
    presence: float
    score: float
    share: float
    seconds: float


def drawn(seen: Seen, phrases: Sequence[str], threshold: float, opacity: float) -> tuple[np.ndarray, list[Row]]:
    """The picture (H, W, 3) uint8 at a size for viewing, with the masks, and a row for each phrase that was taken.

    Every phrase keeps the colour of its place among ``phrases``. ``threshold`` and ``opacity`` lie in 0..1; 0 leaves
    the outlines alone. No model is asked.
    """
    for name, value in (("threshold", threshold), ("opacity", opacity)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in 0..1, got {value}")
    rows, masks, numbers = [], [], seen.answered(phrases)
    if numbers:
        prediction = seen.prediction([phrases[number] for number in numbers], threshold)
        for number, segment, found, presence in zip(
            numbers, prediction, prediction.found, prediction.presence, strict=True
        ):
            masks.append(segment.mask)
            share, seconds = segment.area / segment.mask.size, seen.answers[segment.phrase].seconds
            rows.append(Row(number, segment.phrase, bool(found), float(presence), segment.score, share, seconds))
    rgb, masks = resize_for_view(seen.look.image, masks)
    return paint(rgb, list(zip(numbers, masks, strict=True)), opacity), rows


def table(rows: Sequence[Row]) -> str:
    """The rows as HTML: colour, phrase, presence, score, share and time."""
    if not rows:
        return ""
    heads = ("", "phrase", "presence", "score", "area", "time")
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    for row in rows:
        red, green, blue = colour_of(row.number)
        swatch = f'<span class="swatch" style="background:rgb({red},{green},{blue})"></span>'
        phrase = escape(printable(row.phrase)) + ("" if row.found else " <em>not found</em>")
        numbers = (f"{row.presence:.2f}", f"{row.score:.2f}", f"{row.share:.1%}", milliseconds(row.seconds))
        cells = "".join(f"<td>{each}</td>" for each in (swatch, phrase, *numbers))
        lines.append(cells if row.found else cells.replace("<td>", '<td class="missing">'))
    return '<table class="found">' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def times(seen: Seen, rows: Sequence[Row]) -> str:
    """What the picture took, and what each phrase takes then, as HTML."""
    each = sum(row.seconds for row in rows) / len(rows) if rows else 0.0
    if not seen.model.shares:
        took = f", {milliseconds(each)} each" if rows else ""
        return f"{escape(seen.model.title)} reads the picture again for every phrase{took}; nothing can be kept"
    further = f"; each phrase then took <b>{milliseconds(each)}</b>" if rows else ""
    return f"picture encoded once: <b>{milliseconds(seen.seconds)}</b>{further}"


def milliseconds(seconds: float) -> str:
    """A time for people to read."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def message(lines: Sequence[str], mistake: bool = False) -> str:
    """Lines for the visitor as HTML; ``mistake``: they say why there is no answer."""
    kind = "mistake" if mistake else "note"
    return "".join(f'<div class="{kind}">{escape(printable(line))}</div>' for line in lines)
