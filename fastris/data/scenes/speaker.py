"""Generate referring expressions: choose meanings that single out a shape, and put them into words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from fastris.data.scenes.scenes import (
    CLOSEST,
    COLOURS,
    EXTREMES,
    KINDS,
    REGIONS,
    Description,
    Family,
    Phrase,
    Scene,
    descriptions_of,
    directions_between,
    singles_out,
)

T = TypeVar("T")

TRIES = 12  # proposals per family before the speaker gives it up

ANY_SHAPE = ("shape", "shape", "thing", "object", "one")
NOUNS = {
    "circle": ("circle", "circle", "circle", "disc"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "cross", "plus sign"),
}
ADJECTIVES = {"small": ("small", "small", "little", "tiny"), "big": ("big", "big", "large", "huge")}

# In these, {} is the described shape without its article.
PLACES = {
    "leftmost": ("{} on the far left", "leftmost {}", "{} furthest to the left"),
    "rightmost": ("{} on the far right", "rightmost {}", "{} furthest to the right"),
    "topmost": ("{} at the very top", "topmost {}", "highest {}"),
    "bottommost": ("{} at the very bottom", "lowest {}", "{} furthest down"),
    "top left": ("{} in the top left corner", "top left {}", "{} in the upper left"),
    "top right": ("{} in the top right corner", "top right {}", "{} in the upper right"),
    "bottom left": ("{} in the bottom left corner", "bottom left {}", "{} in the lower left"),
    "bottom right": ("{} in the bottom right corner", "bottom right {}", "{} in the lower right"),
    "middle": ("{} in the middle", "{} in the centre", "middle {}"),
}
# Here the first {} is the described shape, the second one the other shape, both without article.
RELATIONS = {
    "left of": ("{} left of the {}", "{} to the left of the {}"),
    "right of": ("{} right of the {}", "{} to the right of the {}"),
    "above": ("{} above the {}", "{} over the {}", "{} higher than the {}"),
    "below": ("{} below the {}", "{} under the {}", "{} lower than the {}"),
    "closest to": ("{} closest to the {}", "{} nearest to the {}", "{} next to the {}"),
}


def words_in_use() -> list[str]:
    """All words that a phrase about a scene can have, sorted."""
    nouns = [noun for kind in KINDS for noun in NOUNS[kind]]
    ways = [way.replace("{}", "") for table in (PLACES, RELATIONS) for ways in table.values() for way in ways]
    adjectives = [word for words in ADJECTIVES.values() for word in words]
    return sorted(set(" ".join(["the in", *COLOURS, *ANY_SHAPE, *nouns, *adjectives, *ways]).split()))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options at random; much faster than `rng.choice`."""
    return options[int(rng.random() * len(options))]


class Speaker:
    """Generates expressions for the shapes of one scene."""

    def __init__(self, rng: np.random.Generator, scene: Scene):
        self.rng = rng
        self.scene = scene
        self.ways = [descriptions_of(shape) for shape in scene.shapes]
        self.fits = Counter(description for ways in self.ways for description in ways)

    def phrases(self, index: int, number: int) -> tuple[Phrase, ...]:
        """At most `number` different meanings that single out shape `index`: attributes first, as people do.

        The families come in this order: attribute, place or relation, attribute again, the rest.
        """
        where: tuple[Family, Family] = ("place", "relation") if self.rng.random() < 0.5 else ("relation", "place")
        found: list[Phrase] = []
        for family in ("attribute", where[0], "attribute", *where, *where):
            if len(found) < number and (phrase := self._find(family, index, found)):
                found.append(phrase)
        return tuple(found)

    def say(self, phrase: Phrase) -> str:
        """One of the ways to say it, such as "the small red circle left of the blue square"."""
        words = self._noun_phrase(phrase.target)
        if phrase.place is not None:
            words = pick(self.rng, PLACES[phrase.place]).format(words)
        if phrase.relation is not None and phrase.anchor is not None:
            words = pick(self.rng, RELATIONS[phrase.relation]).format(words, self._noun_phrase(phrase.anchor))
        return f"the {words}" if self.rng.random() < 0.75 else words

    def _find(self, family: Family, index: int, known: list[Phrase]) -> Phrase | None:
        propose = {"attribute": self._by_attributes, "place": self._by_place, "relation": self._by_relation}[family]
        for _ in range(TRIES):
            phrase = propose(index)
            if phrase and phrase not in known and singles_out(phrase, self.scene, index):
                return phrase
        return None

    def _by_attributes(self, index: int) -> Phrase | None:
        alone = [way for way in self.ways[index] if self.fits[way] == 1]
        return Phrase(self._prefer_colour(alone)) if alone else None

    def _by_place(self, index: int) -> Phrase | None:
        """A place that is needed, since the description alone fits several shapes."""
        shared = [way for way in self.ways[index] if self.fits[way] > 1]
        return Phrase(self._prefer_kind(shared), place=pick(self.rng, (*EXTREMES, *REGIONS)))

    def _by_relation(self, index: int) -> Phrase | None:
        """A relation that is needed: the description fits another shape besides the anchor."""
        shapes = self.scene.shapes
        anchor = pick(self.rng, [i for i in range(len(shapes)) if i != index])
        shared = [way for way in self.ways[index] if self.fits[way] - way.fits(shapes[anchor]) > 1]
        alone = [way for way in self.ways[anchor] if self.fits[way] == 1]
        relations = [*directions_between(shapes[index], shapes[anchor]), CLOSEST]
        if not shared or not alone:
            return None
        return Phrase(self._prefer_kind(shared), relation=pick(self.rng, relations), anchor=self._prefer_colour(alone))

    def _prefer_colour(self, ways: list[Description]) -> Description:
        """One of the descriptions; people tend to name a thing's colour even where they need not."""
        with_colour = [way for way in ways if way.colour]
        return self._prefer_kind(with_colour if with_colour and self.rng.random() < 0.85 else ways)

    def _prefer_kind(self, ways: list[Description]) -> Description:
        """One of the descriptions; most people name the kind of thing that they mean."""
        with_kind = [way for way in ways if way.kind]
        return pick(self.rng, with_kind if with_kind and self.rng.random() < 0.7 else ways)

    def _noun_phrase(self, description: Description) -> str:
        words = [pick(self.rng, ADJECTIVES[description.size])] if description.size else []
        noun = pick(self.rng, NOUNS[description.kind] if description.kind else ANY_SHAPE)
        if description.colour and description.kind and self.rng.random() < 0.08:
            return " ".join([*words, noun, "in", description.colour])
        return " ".join([*words, *([description.colour] if description.colour else []), noun])
