"""One picture that shows what a model makes of phrases: image, what is meant, what it found, and both together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

INK, QUIET, PAGE, CARD, LINE = "#1f2430", "#6b7280", "#f3f4f6", "#ffffff", "#e2e4e9"
AGREE, MISSED, EXTRA = (34, 178, 115), (58, 123, 240), (238, 51, 108)
LEGEND = ((AGREE, "found and meant"), (MISSED, "meant but missed"), (EXTRA, "found but not meant"))
HEADINGS = ("what is meant", "prediction", "both")

TILE = 168  # pixels, as all of these
GAP, PADDING, MARGIN = 10, 16, 28
CAPTION, HEADING = 30, 22
SMALLEST_TEXT = 11


@dataclass(frozen=True, eq=False)
class GalleryRow:
    """One phrase about one image.

    Attributes:
        image: (H, W, 3) uint8 RGB. Neighbouring rows with equal images share one card.
        phrase: the expression.
        truth: (H, W) bool, the object that the phrase means.
        prediction: (H, W) bool, or float probabilities in [0, 1].
        iou: written beside the phrase; None for nothing.
    """

    image: np.ndarray
    phrase: str
    truth: np.ndarray
    prediction: np.ndarray
    iou: float | None = None

    def __post_init__(self) -> None:
        size = self.image.shape[:2]
        if self.image.shape != (*size, 3) or self.image.dtype != np.uint8 or 0 in size:
            raise ValueError(f"image must be (H, W, 3) uint8 RGB, got {self.image.dtype} {self.image.shape}")
        for name, array in (("truth", self.truth), ("prediction", self.prediction)):
            if array.shape != size:
                raise ValueError(f"{name} is {array.shape}, but must have its image's height and width {size}")
        if self.truth.dtype != np.bool_:
            raise ValueError(f"truth must be bool, got {self.truth.dtype}")


def save_gallery(
    path: str | Path,
    rows: Sequence[GalleryRow],
    title: str = "",
    subtitle: str = "",
    *,
    columns: int = 2,
    threshold: float = 0.35,
) -> Path:
    """Draw the rows as cards, one per image, and write them as one PNG.

    Args:
        path: of the file; missing folders are made, an existing file is replaced.
        rows: what to show, in order.
        title, subtitle: printed above the cards.
        columns: cards beside each other.
        threshold: a pixel counts as found where its probability is above this.

    Raises:
        ValueError: no rows.
    """
    from fastris.checkpoint import replacing

    if not rows:
        raise ValueError("rows is empty: there is nothing to show")
    cards = [_card(list(group), threshold) for _, group in groupby(rows, key=lambda row: row.image.tobytes())]
    page = _page(cards, title, subtitle, min(columns, len(cards)))
    with replacing(Path(path)) as unfinished:
        page.save(unfinished, format="PNG", optimize=True)
    return Path(path)


def _page(cards: list[Image.Image], title: str, subtitle: str, columns: int) -> Image.Image:
    """The cards below the title and the legend, filled in row by row."""
    from PIL import Image, ImageDraw

    lines = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    width = 2 * MARGIN + max(sum(card.width for card in line) + PADDING * (len(line) - 1) for line in lines)
    top = MARGIN + 42 * bool(title) + 28 * bool(subtitle) + 40
    height = top + sum(max(card.height for card in line) + PADDING for line in lines) - PADDING + MARGIN
    page = Image.new("RGB", (width, height), PAGE)
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for text, size, colour, step in ((title, 28, INK, 42), (subtitle, 17, QUIET, 28)):
        if text:
            _text(draw, (MARGIN, y), text, size, colour, width - 2 * MARGIN)
            y += step
    _legend(draw, MARGIN, y)
    y = top
    for line in lines:
        x = MARGIN
        for card in line:
            page.paste(card, (x, y))
            x += card.width + PADDING
        y += max(card.height for card in line) + PADDING
    return page


def _card(rows: list[GalleryRow], threshold: float) -> Image.Image:
    """One image, large, and for each phrase about it the phrase above three tiles."""
    from PIL import Image, ImageDraw

    row_height = CAPTION + TILE + GAP
    body = len(rows) * row_height - GAP
    large = min(body, 2 * TILE + CAPTION + GAP)
    width = PADDING + large + PADDING + 3 * TILE + 2 * GAP + PADDING
    card = Image.new("RGB", (width, PADDING + HEADING + body + PADDING), CARD)
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, card.width - 1, card.height - 1), outline=LINE)
    top, left = PADDING + HEADING, 2 * PADDING + large
    _text(draw, (PADDING, PADDING - 4), "image", 14, QUIET)
    for number, heading in enumerate(HEADINGS):
        _text(draw, (left + number * (TILE + GAP), PADDING - 4), heading, 14, QUIET)
    _paste(card, _enlarged(rows[0].image, large), (PADDING, top), large)
    for number, row in enumerate(rows):
        y = top + number * row_height
        score = "" if row.iou is None else f"IoU {row.iou:.2f}"
        room = 3 * TILE + 2 * GAP
        score_width = round(_font(15).getlength(score))
        _text(draw, (left, y + 3), f"\N{LEFT DOUBLE QUOTATION MARK}{row.phrase}\N{RIGHT DOUBLE QUOTATION MARK}", 18, INK, room - score_width - GAP)
        _text(draw, (left + room - score_width, y + 5), score, 15, QUIET)
        for place, tile in enumerate(_tiles(row, threshold)):
            _paste(card, tile, (left + place * (TILE + GAP), y + CAPTION), TILE)
    return card


def _tiles(row: GalleryRow, threshold: float) -> Iterator[np.ndarray]:
    """The truth, the prediction and their comparison, each fitted to a tile."""
    import cv2

    image = _enlarged(row.image, TILE)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    pale = np.rint(0.45 * grey + 0.55 * 250).astype(np.uint8)
    probability = _resized(row.prediction.astype(np.float32), image.shape[:2]).clip(0, 1)
    truth = _resized(row.truth.astype(np.float32), image.shape[:2]) > 0.5
    found = probability > (0.5 if row.prediction.dtype == np.bool_ else threshold)

    meant = np.where(truth[..., None], image, pale)
    yield _outlined(meant, truth, (31, 36, 48))
    heat = cv2.applyColorMap(np.rint(255 * probability).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    yield _outlined(np.rint(0.85 * heat + 0.15 * grey).astype(np.uint8), found, (255, 255, 255))
    both = pale.astype(np.float32)
    for area, colour in ((truth & found, AGREE), (truth & ~found, MISSED), (found & ~truth, EXTRA)):
        both[area] = 0.25 * grey[area] + 0.75 * np.array(colour)
    yield np.rint(both).astype(np.uint8)


def _outlined(tile: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    import cv2

    tile = np.ascontiguousarray(tile)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(tile, contours, -1, colour, 1, cv2.LINE_AA)
    return tile


def _enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """The image with its longer side `side`."""
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    return _resized(image, (height, width))


def _resized(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import cv2

    shrinks = size[0] < array.shape[0]
    return cv2.resize(array, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _paste(card: Image.Image, tile: np.ndarray, place: tuple[int, int], side: int) -> None:
    """Centre a tile in its square."""
    from PIL import Image

    height, width = tile.shape[:2]
    card.paste(Image.fromarray(tile), (place[0] + (side - width) // 2, place[1] + (side - height) // 2))


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    for colour, text in LEGEND:
        draw.rounded_rectangle((x, y + 3, x + 16, y + 19), radius=3, fill=colour)
        _text(draw, (x + 24, y + 1), text, 16, INK)
        x += 24 + round(_font(16).getlength(text)) + 28


def _text(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: str, width: int = 10**6
) -> None:
    """Write a line of at most `width` pixels: smaller where it must be, and cut only where even that is too long."""
    while size > SMALLEST_TEXT and _font(size).getlength(text) > width:
        size -= 1
    if _font(size).getlength(text) > width:
        while text and _font(size).getlength(text + " ...") > width:
            text = text[:-1]
        text += " ..."
    draw.text(place, text, fill=colour, font=_font(size))


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)
