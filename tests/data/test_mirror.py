"""What mirroring a picture does to a phrase, by a table written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_helpers import Boxes

from fastris.data.augment import augment, jittered
from fastris.data.base import Reference
from fastris.data.mirror import mirrored, names_colour
from fastris.data.samples import TrainSamples
from fastris.training.expressions import ImageSamples
from fastris.training.feed import count_cut

SWAPPED = {
    "left": "right",
    "the man on the left": "the man on the right",
    "on the right of the dog": "on the left of the dog",
    "left one": "right one",
    "giraffe right": "giraffe left",
    "Left guy": "Right guy",
    "FAR RIGHT": "FAR LEFT",
    "leftmost zebra": "rightmost zebra",
    "left-most zebra": "right-most zebra",
    "the right most car": "the left most car",
    "right-hand side": "left-hand side",
    "lefthand drawer": "righthand drawer",
    "bottom right corner": "bottom left corner",
    "left man looking right": "right man looking left",
    "left of the right man": "right of the left man",
    "2nd from left": "2nd from right",
    "man to the right behind the desk": "man to the left behind the desk",
    "woman on left in front": "woman on right in front",
    "his left arm": "his right arm",
    "right-handed batter": "left-handed batter",
    "just left of the tree": "just right of the tree",
    "the car that is right of the bus": "the car that is left of the bus",
    "t-shirt on the right": "t-shirt on the left",
    "car turning left, near the tree": "car turning right, near the tree",
    "third person from the right": "third person from the left",
}
SAME = ["the tall man", "bright upright piano", "two dogs", "stop sign", "a cat", "first in line", "woman's bag", ""]
UNCLEAR = [
    "right behind the man",
    "man right next to the tree",
    "sitting right in front",
    "standing right there",
    "the right way",
    "right angle",
    "right side up",
    "man, right?",
    "all right",
    "the man who left",
    "bag left on the bench",
    "food that is left",
    "left over pizza",
    "leftover pizza",
    "the last one left",
    "girl left behind",
    "stage left",
    "human rights poster",
    "player number 12 on left",
    "2 people on the left",
    "12",
    "the letter R",
    "bus with l on it",
    "sign that says left lane",
    'shirt reading "right"',
    "the word 'left'",
    "hand at 3 o'clock",
    "dot at nine o'clock",
    "building to the east",
    "driver's side door",
    "rt guy",
    "man on rigth",
    "lefty",
    "左边的人",
    "la chica de la izquierda",
    "señor a la right",
    "right field",
    "man who just left the room",
    "the dog left the house",
    "a page left with no picture",
]
COLOURFUL = ["red car", "the dark-blue one", "Reddish hair", "man in WHITE", "blonde", "colored ball", "голубой шар"]
COLOURLESS = ["tall man", "left one", "the tank", "bored cat", "ready to eat", "creamy? no", "delighted child", ""]


@pytest.mark.parametrize(("phrase", "expected"), [*SWAPPED.items(), *((phrase, phrase) for phrase in SAME)])
def test_left_and_right_change_places(phrase: str, expected: str) -> None:
    assert mirrored(phrase) == expected and mirrored(expected) == phrase


@pytest.mark.parametrize("phrase", UNCLEAR)
def test_unclear_phrases_are_not_mirrored(phrase: str) -> None:
    assert mirrored(phrase) is None


def test_colour_words_are_known() -> None:
    assert [phrase for phrase in COLOURFUL if not names_colour(phrase)] == []
    assert [phrase for phrase in COLOURLESS if names_colour(phrase)] == []


def drawn(phrases: list[str]) -> tuple[set[bool], bool]:
    """Whether pictures with these phrases were mirrored, each time together with masks and phrases; and recoloured."""
    image = np.random.default_rng(0).integers(60, 180, (6, 9, 3), dtype=np.uint8)
    mask, flips, recoloured = image[..., 0] > 120, set(), False
    for seed in range(8):
        found, masks, said = augment(image, [mask], phrases, np.random.default_rng(seed))
        flipped = not np.array_equal(masks[0], mask)
        expected = image[:, ::-1] if flipped else image
        assert np.array_equal(masks[0], mask[:, ::-1] if flipped else mask) and found.dtype == np.uint8
        assert said == ([mirrored(phrase) for phrase in phrases] if flipped else phrases)
        assert np.abs(found.astype(int) - expected).max() < 120
        recoloured |= not np.array_equal(found, expected)
        flips.add(flipped)
    return flips, recoloured


def test_picture_mask_and_phrase_are_mirrored_together_or_not_at_all() -> None:
    assert drawn(["left one", "the man"]) == ({True, False}, True)
    assert drawn(["left one", "right behind"]) == ({False}, True)
    assert drawn(["left one", "red one"]) == ({True, False}, False)


def test_jitter_by_ones_changes_nothing_and_grey_stays_grey() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    assert np.array_equal(jittered(image, 1.0, 1.0, 1.0), image)
    grey = np.full((2, 2, 3), 100, np.uint8)
    assert np.array_equal(jittered(grey, 1.2, 0.8, 1.2), np.full((2, 2, 3), 120, np.uint8))


class Sided(Boxes):
    def reference(self, index: int) -> Reference:
        which = "right" if index % 2 else "left"
        return Reference(index, f"image {index // 2}", (f"{which} one that has many more legs than there is room for",))


@pytest.mark.parametrize("several", [False, True])
def test_training_samples_are_varied_by_seed_epoch_and_index_alone(several: bool) -> None:
    data, changed = Sided(), 0
    make = (lambda **more: ImageSamples(data, 64, 8, expressions=2, **more)) if several else (
        lambda **more: TrainSamples(data, 64, 8, **more))  # fmt: skip
    plain, varied, again = make(), make(augment=True), make(augment=True)
    for epoch in range(3):
        for samples in (plain, varied, again):
            samples.set_epoch(epoch)
        for index in range(len(plain)):
            items = [samples[index] for samples in (plain, varied, again)]
            assert all(bool((items[1][name] == items[2][name]).all()) for name in ("image", "tokens", "mask"))
            same = bool((items[0]["tokens"] == items[1]["tokens"]).all())
            assert same == bool((items[0]["mask"] == items[1]["mask"]).all())
            changed += not same
            batch = {"tokens": items[1]["tokens"][None]}
            batch["index"] = items[1]["index"][None] if several else torch.tensor([index])
            assert count_cut(varied, batch) == (2 if several else 1)
    assert 0 < changed < 3 * len(plain)
