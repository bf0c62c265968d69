"""Draw a gallery of predictions: images with their phrase, truth, prediction, and both overlaid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastris.pictures.fonts import fitted
from fastris.pictures.overlay import LONGEST_CAPTION
from fastris.runtime.plain import printable
from fastris.runtime.storage import replacing

CELL = 208  # pixels of a picture's side
GAP, MARGIN, HEADER, CAPTION = 10, 24, 122, 46
BACKGROUND, INK, FAINT = (250, 250, 248), (30, 32, 36), (110, 114, 120)
AGREE, MISSED, EXTRA = (46, 160, 92), (52, 110, 220), (220, 70, 60)
COLUMNS = ("image", "truth", "prediction", "both")


class GalleryRow(NamedTuple):
    """One row: ``image`` (H, W, 3) uint8, ``phrase``, ``truth`` and ``prediction`` (H, W) bool, ``iou`` in [0, 1]."""

    image: np.ndarray
    phrase: str
    truth: np.ndarray
    prediction: np.ndarray
    iou: float


def save_gallery(path: str | Path, rows: Sequence[GalleryRow], title: str, subtitle: str = "", across: int = 2) -> Path:
    """Write a PNG with ``across`` rows side by side; returns its path.

    Each row shows the image, the truth, the prediction and both overlaid (green where they agree, blue for missed
    pixels, red for pixels too many), above its phrase and IoU. Raises ValueError when there are no rows.
    """
    if not rows:
        raise ValueError("rows is empty; a gallery needs at least one row")
    width = len(COLUMNS) * CELL + (len(COLUMNS) - 1) * GAP
    lines = -(-len(rows) // across)
    size = (
        across * width + (across + 1) * MARGIN,
        HEADER + lines * (CELL + CAPTION) + MARGIN,
    )
    page = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(page)
    _write_header(draw, title, subtitle, size[0])
    for number, row in enumerate(rows):
        left = MARGIN + (number % across) * (width + MARGIN)
        top = HEADER + (number // across) * (CELL + CAPTION)
        if number < across:
            _write_column_names(draw, left, top - 26)
        for column, picture in enumerate(_pictures(row)):
            page.paste(picture, (left + column * (CELL + GAP), top))
        _write_caption(draw, row, left, top + CELL + 7, width)
    path = Path(path)
    with replacing(path) as temporary:
        page.save(temporary, format="PNG", optimize=True)
    return path


def _write_header(draw: ImageDraw.ImageDraw, title: str, subtitle: str, width: int) -> None:
    draw.text((MARGIN, 18), title, INK, _font(26))
    draw.text((MARGIN, 56), subtitle, FAINT, _font(16))
    right = width - MARGIN
    for name, colour in (("too much", EXTRA), ("missed", MISSED), ("agree", AGREE)):
        right -= int(draw.textlength(name, _font(16)))
        draw.text((right, 56), name, INK, _font(16))
        right -= 22
        draw.rectangle((right, 58, right + 14, 72), fill=colour)
        right -= 18


def _write_column_names(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    for column, name in enumerate(COLUMNS):
        draw.text((left + column * (CELL + GAP), top), name, FAINT, _font(16))


def _write_caption(draw: ImageDraw.ImageDraw, row: GalleryRow, left: int, top: int, width: int) -> None:
    score = f"IoU {100 * row.iou:.0f} %"
    room = width - draw.textlength(score, _font(17)) - 16
    font, phrase = fitted(printable(row.phrase)[:LONGEST_CAPTION], 17)
    while draw.textlength(phrase, font) > room:
        phrase = phrase[:-2].rstrip() + "\u2026"
    draw.text((left, top), phrase, INK, font)
    draw.text(
        (left + width - draw.textlength(score, _font(17)), top), score, AGREE if row.iou > 0.5 else EXTRA, _font(17)
    )


def _pictures(row: GalleryRow) -> list[Image.Image]:
    grey = row.image.mean(axis=-1, keepdims=True).repeat(3, axis=-1) * 0.35 + 150
    truth, prediction = row.truth, row.prediction
    cut_out = [np.where(mask[..., None], row.image, grey * 0.6) for mask in (truth, prediction)]
    both = grey.copy()
    for mask, colour in ((truth & prediction, AGREE), (truth & ~prediction, MISSED), (prediction & ~truth, EXTRA)):
        both[mask] = 0.25 * grey[mask] + 0.75 * np.array(colour)
    return [_enlarge(picture) for picture in (row.image, *cut_out, both)]


def _enlarge(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    cell = Image.new("RGB", (CELL, CELL), BACKGROUND)
    cell.paste(image.resize(size, Image.Resampling.LANCZOS), ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
