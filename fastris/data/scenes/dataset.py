"""The built-in synthetic data set: scenes of shapes, and phrases that each name exactly one of them.

A scene depends on (seed, split, number of the scene) alone, so any process can make any sample, in any order. The set
of shapes decides the split: no validation scene holds the same set of shapes as a training scene, whatever the seeds.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastris.data.base import DataError, Reference, ReferringDataset
from fastris.data.scenes.drawing import draw
from fastris.data.scenes.scenes import (
    COLOURS,
    KINDS,
    SIZES,
    Description,
    Phrase,
    Scene,
    Shape,
)
from fastris.data.scenes.speaker import Speaker, pick

REFERENCES = 3  # referred objects per scene
SENTENCES = 3  # per object: where it can be done, one by attributes, one by place, one by relation


class Split(NamedTuple):
    """A split's number, how many scenes it has by default, and which tenths of all sets of shapes belong to it."""

    number: int
    scenes: int
    tenths: range


SPLITS = {
    "train": Split(0, 20_000, range(0, 8)),
    "val": Split(1, 500, range(8, 9)),
    "test": Split(2, 500, range(9, 10)),
}
RADII = {"small": (0.125, 0.145), "big": (0.205, 0.235)}
RGB = {
    "red": (0.84, 0.15, 0.16),
    "yellow": (0.96, 0.86, 0.20),
    "green": (0.20, 0.62, 0.27),
    "blue": (0.16, 0.38, 0.80),
    "purple": (0.55, 0.24, 0.66),
}


class Referred(NamedTuple):
    """One referred shape of a scene: its index, and the meanings and wordings of its phrases, in the same order."""

    shape: int
    phrases: tuple[Phrase, ...]
    sentences: tuple[str, ...]


class SyntheticExpressions(ReferringDataset):
    """Scenes of 4 or 5 shapes, three of them referred to by three sentences each.

    A sentence names its shape by attributes ("the small red circle"), by place ("the circle on the far left") or by
    its relation to another one ("the small red circle left of the blue square"). Places and relations are needed:
    without them the description fits more shapes than one.

    Args:
        split: "train", "val" or "test".
        seed: another seed, other scenes; the splits stay disjoint across seeds.
        scenes: number of scenes; None for the split's own (20000, 500 and 500).
        size: side of the square images in pixels, at least 32.

    Raises:
        DataError: unknown split, or `scenes`, `seed` or `size` too small.
    """

    name = "synthetic"

    def __init__(self, split: str, *, seed: int = 0, scenes: int | None = None, size: int = 128):
        if split not in SPLITS:
            raise DataError(f"split={split!r} is unknown in 'synthetic'; choose one of {', '.join(SPLITS)}")
        for argument, value, least in (("seed", seed, 0), ("scenes", scenes, 1), ("size", size, 32)):
            if value is not None and value < least:
                raise DataError(f"{argument}={value} must be at least {least}")
        self.split = split
        self.seed = seed
        self.size = size
        self.scenes = SPLITS[split].scenes if scenes is None else scenes
        self.skipped = {}

    def __len__(self) -> int:
        return self.scenes * REFERENCES

    def reference(self, index: int) -> Reference:
        number, referred = self._referred(index)
        return Reference(REFERENCES * number + index % REFERENCES, number, referred.sentences)

    def image(self, index: int) -> np.ndarray:
        return self._drawn(self._referred(index)[0])[0].copy()

    def mask(self, index: int) -> np.ndarray:
        number, referred = self._referred(index)
        return self._drawn(number)[1] == referred.shape

    def by_image(self) -> list[list[int]]:
        return [list(range(first, first + REFERENCES)) for first in range(0, len(self), REFERENCES)]

    def phrases(self, index: int) -> tuple[Phrase, ...]:
        """The meanings of the sentences of reference `index`, in the same order."""
        return self._referred(index)[1].phrases

    def scene(self, index: int) -> Scene:
        """The scene of reference `index`, as `fastris.data.scenes.scenes.matches` takes it."""
        return _scene_and_referred(self.seed, self.split, self._referred(index)[0])[0]

    def _referred(self, index: int) -> tuple[int, Referred]:
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} is outside of the {len(self)} references of this data set")
        number, which = divmod(index, REFERENCES)
        return number, _scene_and_referred(self.seed, self.split, number)[1][which]

    def _drawn(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return _picture(self.seed, self.split, number, self.size)


def _generator(seed: int, split: str, number: int, stream: int) -> np.random.Generator:
    return np.random.default_rng((seed, SPLITS[split].number, number, stream))


@lru_cache(maxsize=256)
def _scene_and_referred(seed: int, split: str, number: int) -> tuple[Scene, tuple[Referred, ...]]:
    """The scene of that number, and its referred shapes."""
    rng = _generator(seed, split, number, 0)
    while True:
        scene = _place_shapes(rng, _choose_attributes(rng, SPLITS[split].tenths))
        speaker = Speaker(rng, scene)
        referred: list[Referred] = []
        for index in rng.permutation(len(scene.shapes)).tolist():
            phrases = speaker.phrases(index, SENTENCES)
            if len(phrases) == SENTENCES:
                referred.append(Referred(index, phrases, tuple(speaker.say(phrase) for phrase in phrases)))
            if len(referred) == REFERENCES:
                return scene, tuple(referred)


@lru_cache(maxsize=64)
def _picture(seed: int, split: str, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    scene = _scene_and_referred(seed, split, number)[0]
    return draw(scene, size, _generator(seed, split, number, 1))


def _choose_attributes(rng: np.random.Generator, tenths: range) -> list[Description]:
    """Sizes, colours and kinds of 4 or 5 shapes, few enough of each that most words alone fit several shapes."""
    while True:
        colours = rng.permutation(COLOURS)[:4].tolist()
        kinds = rng.permutation(KINDS)[:3].tolist()
        shapes = [
            Description(pick(rng, SIZES), pick(rng, colours), pick(rng, kinds)) for _ in range(rng.integers(3, 5))
        ]
        signature = sorted((shape.size, shape.colour, shape.kind) for shape in shapes)
        if zlib.crc32(repr(signature).encode()) % 10 in tenths and sum(s.size == "big" for s in shapes) <= 3:
            return shapes


def _place_shapes(rng: np.random.Generator, wanted: list[Description]) -> Scene:
    """Put the shapes where they hardly overlap; big ones first, while there is room."""
    wanted = sorted(wanted, key=lambda shape: shape.size != "big")
    while True:
        radii = [rng.uniform(*RADII[shape.size or ""]) for shape in wanted]
        centres = np.empty((0, 2))
        for radius, reached in zip(radii, range(len(wanted)), strict=True):
            tries = rng.uniform(1.15 * radius + 0.01, 0.99 - 1.15 * radius, (24, 2))
            distances = np.hypot(*(tries[:, None] - centres).transpose(2, 0, 1))
            free = (distances > radius + np.array(radii[:reached])).all(1)
            if not free.any():
                break
            centres = np.vstack([centres, tries[free.argmax()]])
        else:
            shapes = [_shape(rng, *it) for it in zip(wanted, centres.tolist(), radii, strict=True)]
            return Scene(tuple(shapes[i] for i in rng.permutation(len(shapes))))


def _shape(rng: np.random.Generator, wanted: Description, centre: list[float], radius: float) -> Shape:
    assert wanted.size and wanted.colour and wanted.kind
    shade = np.clip(RGB[wanted.colour] + rng.normal(0, 0.018, 3), 0, 1) * rng.uniform(0.9, 1.04)
    rgb = (float(shade[0]), float(shade[1]), float(shade[2]))
    angle = float(rng.uniform(-0.25, 0.25))
    return Shape(wanted.size, wanted.colour, wanted.kind, centre[0], centre[1], radius, angle, rgb)
