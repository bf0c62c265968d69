"""Synthetic expressions: every phrase names exactly one object, and nothing depends on who asks or in which order."""

from __future__ import annotations

import numpy as np
import pytest

from fastris.data import DataError, load_dataset
from fastris.data.scenes.dataset import REFERENCES, SENTENCES, SyntheticExpressions
from fastris.data.scenes.drawing import NO_SHAPE
from fastris.data.scenes.scenes import Description, Phrase, Scene, Shape, matches, singles_out


def make_shape(size: str, colour: str, kind: str, x: float, y: float) -> Shape:
    return Shape(size, colour, kind, x, y, 0.1, 0.0, (1.0, 0.0, 0.0))


SCENE = Scene(
    (
        make_shape("small", "red", "circle", 0.2, 0.5),
        make_shape("small", "red", "circle", 0.8, 0.5),
        make_shape("big", "blue", "square", 0.5, 0.5),
    )
)


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        (Phrase(Description(colour="red")), (0, 1)),
        (Phrase(Description(kind="square")), (2,)),
        (Phrase(Description(kind="circle"), place="leftmost"), (0,)),
        (Phrase(Description(kind="circle"), relation="left of", anchor=Description(colour="blue")), (0,)),
        (Phrase(Description(kind="circle"), relation="right of", anchor=Description(kind="square")), (1,)),
        (Phrase(Description(kind="square"), relation="left of", anchor=Description(kind="circle")), ()),
        (Phrase(Description(kind="star")), ()),
    ],
)
def test_interpreter_finds_the_shapes_that_a_phrase_fits(phrase, expected):
    assert matches(phrase, SCENE) == expected


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_phrase_singles_out_its_object_and_every_object_is_seen(split):
    data = SyntheticExpressions(split, scenes=60, size=64)
    for index in range(len(data)):
        scene, mask = data.scene(index), data.mask(index)
        owner = [i for i in range(len(scene.shapes)) if all(singles_out(p, scene, i) for p in data.phrases(index))]
        assert len(owner) == 1
        shape = scene.shapes[owner[0]]
        rows, columns = np.nonzero(mask)
        assert abs(columns.mean() / 64 - shape.x) < 0.1 and abs(rows.mean() / 64 - shape.y) < 0.1
        assert len(set(data.reference(index).sentences)) == SENTENCES


def test_masks_of_a_scene_do_not_overlap():
    data = SyntheticExpressions("train", scenes=20)
    for scene in data.by_image():
        assert np.sum([data.mask(index) for index in scene], axis=0).max() == 1
    assert NO_SHAPE not in range(10)


def test_same_seed_gives_the_same_data_in_any_order_and_another_seed_does_not():
    first, second = SyntheticExpressions("val", seed=3, scenes=5), SyntheticExpressions("val", seed=3, scenes=9)
    for index in reversed(range(len(first))):
        assert first.reference(index) == second.reference(index)
        assert np.array_equal(first.image(index), second.image(index))
        assert np.array_equal(first.mask(index), second.mask(index))
    other = SyntheticExpressions("val", seed=4, scenes=5)
    assert not np.array_equal(first.image(0), other.image(0))


def test_no_validation_scene_holds_the_shapes_of_a_training_scene():
    kinds = {
        split: {SyntheticExpressions(split, seed=seed, scenes=150, size=32).scene(3 * i).signature for i in range(150)}
        for split, seed in (("train", 0), ("val", 0), ("test", 1))
    }
    assert not kinds["train"] & kinds["val"] and not kinds["train"] & kinds["test"] and not kinds["val"] & kinds["test"]


def test_all_families_of_phrases_occur():
    data = SyntheticExpressions("train", scenes=40, size=32)
    families = [phrase.family for index in range(len(data)) for phrase in data.phrases(index)]
    assert {"attribute", "place", "relation"} == set(families)
    assert families.count("relation") > 0.1 * len(families)


def test_data_set_stands_behind_the_common_interface():
    data = load_dataset("synthetic", "val", seed=1, scenes=4)
    assert len(data) == 4 * REFERENCES and len(data.by_image()) == 4
    image = data.image(0)
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    image[:] = 0
    assert data.image(0).any(), "a caller may write into what it was given"


@pytest.mark.parametrize("wrong", [{"split": "vall"}, {"scenes": 0}, {"seed": -1}, {"size": 8}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        SyntheticExpressions(**{"split": "val", **wrong})
