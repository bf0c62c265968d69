"""A small world of shapes, and what phrases about it mean.

A `Scene` is a list of shapes; a `Phrase` is the meaning of a referring expression, before it is put into words.
`matches` is the interpreter that says which shapes a phrase fits. The data set in `dataset.py` keeps only
phrases for which `singles_out` holds, so every expression names exactly one shape by construction.

Coordinates are fractions of the image's side: x to the right, y down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

COLOURS = ("red", "yellow", "green", "blue", "purple")
KINDS = ("circle", "square", "triangle")
SIZES = ("small", "big")

Family = Literal["attribute", "place", "relation"]
FAMILIES: tuple[Family, ...] = ("attribute", "place", "relation")

CLEARLY = 0.12  # how far to one side of its anchor a shape must be to count as left of it, above it, ...
BARELY = 0.04  # beyond this distance a listener might already say so
NEXT_BEST = 0.08  # a runner-up within this distance of the most extreme shape makes a superlative unclear


@dataclass(frozen=True)
class Shape:
    """One object: what can be said about it, and how it is drawn.

    Attributes:
        size, colour, kind: its attributes, of `SIZES`, `COLOURS` and `KINDS`.
        x, y: its centre; radius: half its extent; all in fractions of the image's side.
        angle: rotation in radians.
        rgb: its own shade of the colour, each channel in [0, 1].
    """

    size: str
    colour: str
    kind: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """The shapes of one image, in the order in which they are drawn: later ones lie on top."""

    shapes: tuple[Shape, ...]

    @property
    def signature(self) -> tuple[tuple[str, str, str], ...]:
        """The attributes of all shapes, sorted, without their positions."""
        return tuple(sorted((shape.size, shape.colour, shape.kind) for shape in self.shapes))


class Description(NamedTuple):
    """Attributes that a shape may have; None leaves one open."""

    size: str | None = None
    colour: str | None = None
    kind: str | None = None

    def fits(self, shape: Shape) -> bool:
        return (
            self.size in (None, shape.size) and self.colour in (None, shape.colour) and self.kind in (None, shape.kind)
        )


def descriptions_of(shape: Shape) -> list[Description]:
    """All eight descriptions that fit the shape, from none of its attributes to all of them."""
    return [
        Description(size, colour, kind)
        for size in (None, shape.size)
        for colour in (None, shape.colour)
        for kind in (None, shape.kind)
    ]


class Phrase(NamedTuple):
    """What an expression means: "the red circle", "the ... on the far left", "the ... above the blue star".

    Attributes:
        target: the attributes of the shape that is meant.
        place: a key of `EXTREMES` or `REGIONS`, or None.
        relation: a key of `DIRECTIONS`, or "closest to", or None; then `anchor` describes the other shape.
    """

    target: Description
    place: str | None = None
    relation: str | None = None
    anchor: Description | None = None

    @property
    def family(self) -> Family:
        if self.relation is not None:
            return "relation"
        return "attribute" if self.place is None else "place"


# Superlatives: the direction in which the shape must lie further than all others that fit.
EXTREMES = {"leftmost": (-1, 0), "rightmost": (1, 0), "topmost": (0, -1), "bottommost": (0, 1)}
# Regions: the shape must lie within `reach` of the point (x, y), and no other one within `doubt`.
REGIONS = {
    "top left": (0.0, 0.0),
    "top right": (1.0, 0.0),
    "bottom left": (0.0, 1.0),
    "bottom right": (1.0, 1.0),
    "middle": (0.5, 0.5),
}
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CLOSEST = "closest to"


def matches(phrase: Phrase, scene: Scene, *, loose: bool = False) -> tuple[int, ...]:
    """Indices of the shapes that the phrase fits.

    Args:
        phrase: the meaning; a relation whose anchor is not exactly one shape of the scene fits nothing.
        loose: read places and relations generously, as a listener might, instead of strictly.
    """
    found = [index for index, shape in enumerate(scene.shapes) if phrase.target.fits(shape)]
    if phrase.place in EXTREMES:
        found = _extreme(found, scene, EXTREMES[phrase.place], loose)
    elif phrase.place is not None:
        reach = (0.26 if loose else 0.16) if phrase.place == "middle" else (0.46 if loose else 0.36)
        centre_x, centre_y = REGIONS[phrase.place]
        found = [i for i in found if _chebyshev(scene.shapes[i], centre_x, centre_y) <= reach]
    if phrase.relation is not None:
        found = _related(found, scene, phrase, loose)
    return tuple(found)


def singles_out(phrase: Phrase, scene: Scene, index: int) -> bool:
    """Whether the phrase fits shape `index` and no other, read strictly as well as loosely."""
    return matches(phrase, scene) == (index,) and matches(phrase, scene, loose=True) == (index,)


def _chebyshev(shape: Shape, x: float, y: float) -> float:
    return max(abs(shape.x - x), abs(shape.y - y))


def _extreme(found: list[int], scene: Scene, direction: tuple[int, int], loose: bool) -> list[int]:
    """The furthest in `direction`, provided that it lies in that half of the image."""
    reach = {i: scene.shapes[i].x * direction[0] + scene.shapes[i].y * direction[1] for i in found}
    furthest = max(reach.values(), default=0.0)
    half = 0.5 * (direction[0] + direction[1])
    if furthest <= half:
        return []
    return [i for i in found if reach[i] >= furthest - (NEXT_BEST if loose else 0.0)]


def _related(found: list[int], scene: Scene, phrase: Phrase, loose: bool) -> list[int]:
    assert phrase.anchor is not None and phrase.relation is not None
    anchors = [index for index, shape in enumerate(scene.shapes) if phrase.anchor.fits(shape)]
    if len(anchors) != 1:
        return []
    anchor = scene.shapes[anchors[0]]
    others = [i for i in found if i != anchors[0]]
    if phrase.relation == CLOSEST:
        away = {i: math.hypot(scene.shapes[i].x - anchor.x, scene.shapes[i].y - anchor.y) for i in others}
        reach = min(away.values(), default=0.0) + (NEXT_BEST if loose else 0.0)
        return [i for i in others if away[i] <= reach]
    sides = {i: _side(scene.shapes[i], anchor, phrase.relation) for i in others}
    if loose:
        return [i for i, (along, _) in sides.items() if along > BARELY]
    return [i for i, (along, across) in sides.items() if along > max(CLEARLY, across)]


def directions_between(shape: Shape, anchor: Shape) -> list[str]:
    """The directions, at most one, in which the shape clearly lies from the anchor."""
    sides = {relation: _side(shape, anchor, relation) for relation in DIRECTIONS}
    return [relation for relation, (along, across) in sides.items() if along > max(CLEARLY, across)]


def _side(shape: Shape, anchor: Shape, relation: str) -> tuple[float, float]:
    """How far the shape lies from the anchor in the relation's direction, and how far across it."""
    ux, uy = DIRECTIONS[relation]
    dx, dy = shape.x - anchor.x, shape.y - anchor.y
    return dx * ux + dy * uy, abs(dx * uy) + abs(dy * ux)
