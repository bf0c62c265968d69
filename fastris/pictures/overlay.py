"""Paint masks over their picture, with captions, for people to look at."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastris.pictures.fonts import fitted
from fastris.runtime.plain import printable

if TYPE_CHECKING:
    from PIL import Image

# Hues far from one another, starting with those that are rare in photos.
COLOURS = ((230, 0, 126), (0, 158, 255), (255, 176, 0), (0, 200, 120), (155, 89, 255), (240, 95, 30), (0, 215, 215))
SMALLEST_VIEW, LARGEST_VIEW = 320, 1600
"""Range of the longer side of a captioned view, in pixels."""
LONGEST_CAPTION = 1000  # characters; what follows would not fit in its three lines


def colour_of(number: int) -> tuple[int, int, int]:
    """The colour of phrase ``number``, counted from 0."""
    return COLOURS[number % len(COLOURS)]


def paint(rgb: np.ndarray, masks: Sequence[tuple[int, np.ndarray]], alpha: float = 0.5) -> np.ndarray:
    """The picture (H, W, 3) uint8 with each mask (H, W) bool tinted, and outlined in its colour and white.

    ``masks``: (number, mask) pairs; the number chooses the colour. ``alpha``: strength of the tint from 0 to 1.
    """
    import cv2

    painted = rgb.copy()
    width = max(1, round(max(rgb.shape[:2]) / 300))
    for number, mask in masks:
        colour = np.array(colour_of(number), np.float32)
        tinted = np.rint((1 - alpha) * np.arange(256)[:, None] + alpha * colour).astype(np.uint8)  # of each level
        if mask.any():
            painted[mask] = cv2.LUT(painted[mask][None], tinted[None])[0]
        contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(painted, contours, -1, (255, 255, 255), 3 * width)
        cv2.drawContours(painted, contours, -1, colour_of(number), width)
    return painted


def resize_for_view(rgb: np.ndarray, masks: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Resize picture and masks for viewing: tiny ones are enlarged by a whole factor, large ones shrunk."""
    import cv2

    height, width = rgb.shape[:2]
    longer = max(height, width)
    if longer < SMALLEST_VIEW:
        factor = -(-SMALLEST_VIEW // longer)
        size, mode = (width * factor, height * factor), cv2.INTER_NEAREST
    elif longer > LARGEST_VIEW:
        size = (max(1, width * LARGEST_VIEW // longer), max(1, height * LARGEST_VIEW // longer))
        mode = cv2.INTER_AREA
    else:
        return rgb, list(masks)
    shrunk = [cv2.resize(mask.view(np.uint8) * np.uint8(255), size, interpolation=mode) >= 128 for mask in masks]
    return cv2.resize(rgb, size, interpolation=mode), shrunk


def view(rgb: np.ndarray, found: Sequence[tuple[int, str, np.ndarray]], alpha: float = 0.5) -> Image.Image:
    """Draw a captioned view: each (number, phrase, mask) in its colour, the phrases below, at a readable size."""
    rgb, masks = resize_for_view(rgb, [mask for _, _, mask in found])
    numbers = [number for number, _, _ in found]
    painted = paint(rgb, list(zip(numbers, masks, strict=True)), alpha)
    return add_caption(painted, [(number, phrase) for number, phrase, _ in found])


def add_caption(rgb: np.ndarray, phrases: Sequence[tuple[int, str]]) -> Image.Image:
    """The picture above one line per (number, phrase), each with its colour; long phrases are wrapped."""
    from PIL import Image, ImageDraw

    height, width = rgb.shape[:2]
    page_width = max(width, SMALLEST_VIEW)
    text_size = max(14, page_width // 36)
    margin, line_height = text_size // 2, round(1.4 * text_size)
    rows: list[tuple[int | None, str, Any]] = []
    for number, phrase in phrases:
        font, text = fitted(printable(" ".join(phrase.split()))[:LONGEST_CAPTION], text_size)
        lines = _wrapped(text, font, page_width - line_height - 2 * margin)
        rows += [(number if first else None, line, font) for first, line in lines]
    page = Image.new("RGB", (page_width, height + 2 * margin + len(rows) * line_height), "white")
    page.paste(Image.fromarray(rgb), ((page_width - width) // 2, 0))
    draw = ImageDraw.Draw(page)
    for row, (marked, line, font) in enumerate(rows):
        top = height + margin + row * line_height
        if marked is not None:
            draw.rectangle((margin, top + 2, margin + text_size, top + 2 + text_size), fill=colour_of(marked))
        draw.text((margin + line_height, top), line, fill="black", font=font)
    return page


def _wrapped(text: str, font: Any, width: int, most: int = 3) -> list[tuple[bool, str]]:
    """Wrap ``text`` into lines of at most ``width`` pixels: (is it the first line, line), at most ``most`` of them."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
        while len(lines) <= most and (fits := _fitting(lines[-1], font, width)) < len(lines[-1]):
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]  # some scripts have no spaces
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    return [(row == 0, line) for row, line in enumerate(lines)]


def _fitting(text: str, font: Any, width: int) -> int:
    """How many characters of a text, at least one, have room in ``width`` pixels."""
    if font.getlength(text) <= width:
        return len(text)
    return max(1, bisect.bisect_right(range(1, len(text)), width, key=lambda count: font.getlength(text[:count])))
