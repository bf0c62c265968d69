"""Shapes that tools for labelling draw, as segmentations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from fastris.data.base import DataError
from fastris.data.formats.annotation import Several
from fastris.data.formats.pictures import Labelled

CORNERS = 120  # of the polygon that stands for an ellipse; off by 0.04 % of its radius


def polygon(points: Iterable[Iterable[float]], where: str) -> list[list[float]]:
    """The segmentation of a polygon. Raises DataError for less than three points; the message begins with `where`."""
    flat = [value for point in points for value in point]
    if len(flat) < 6:
        raise DataError(f"{where} is a polygon of {len(flat) // 2} points, which encloses nothing; draw it again")
    return [flat]


def ellipse(x: float, y: float, across: float, down: float, where: str, turned: float = 0.0) -> list[list[float]]:
    """The segmentation of an ellipse around (x, y) with these radii, turned clockwise by an angle in radians."""
    cosine, sine = math.cos(turned), math.sin(turned)
    points = []
    for number in range(CORNERS):
        angle = 2 * math.pi * number / CORNERS
        along, beside = across * math.cos(angle), down * math.sin(angle)
        points.append((x + along * cosine - beside * sine, y + along * sine + beside * cosine))
    return polygon(points, where)


def united(parts: list[Labelled]) -> Labelled:
    """One object of parts that a tool groups."""
    if len(parts) == 1:
        return parts[0]
    phrases = tuple(dict.fromkeys(phrase for part in parts for phrase in part.phrases))
    return replace(parts[0], phrases=phrases, segmentation=Several(tuple(part.segmentation for part in parts)))
