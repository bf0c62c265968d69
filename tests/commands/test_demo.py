"""The demo runs to its end, leaves what it promises, and its second evaluation really asks for another object."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fastris import Segmenter
from fastris.commands.cli import main
from fastris.commands.demo import DemoConfig, run
from fastris.data.scenes.dataset import SyntheticExpressions
from fastris.data.scenes.other_phrases import OtherPhrases

SHORT = {"steps": 3, "images": 2, "scenes": 4, "held_out": 2, "threads": 1, "progress": False}


def test_demo_leaves_model_metrics_gallery_and_scenes(tmp_path, capsys):
    assert run(DemoConfig(out=str(tmp_path), **SHORT)) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for part in ("right_phrase", "other_objects_phrase"):
        assert {"mIoU", "oIoU", "Pr@50", "Pr@90", "rule"} <= metrics[part].keys()
    assert metrics["steps"] == 3
    assert Image.open(tmp_path / "gallery.png").width > 800
    card = (tmp_path / "model" / "README.md").read_text()
    assert "library_name: fastris" in card and "| cris | synthetic | val | all sentences |" in card
    segmenter = Segmenter.from_pretrained(tmp_path / "model", device="cpu")
    assert segmenter.predict(tmp_path / "scene_0.png", "the red circle").masks.shape == (1, 96, 96)
    assert "another object's phrase" in capsys.readouterr().out


def test_demo_repeats_itself_under_a_seed(tmp_path):
    losses = []
    for name in "ab":
        run(DemoConfig(out=str(tmp_path / name), **SHORT))
        losses.append(json.loads((tmp_path / name / "metrics.json").read_text())["last_loss"])
    assert losses[0] == losses[1]


def test_other_phrases_keep_the_mask_and_name_another_object_of_the_scene():
    data = SyntheticExpressions("val", scenes=3, size=64)
    other = OtherPhrases(data)
    assert len(other) == len(data) and other.by_image() == data.by_image()
    for index in range(len(data)):
        assert np.array_equal(other.mask(index), data.mask(index))
        assert other.reference(index).image_id == data.reference(index).image_id
        assert not set(other.reference(index).sentences) & set(data.reference(index).sentences)


@pytest.mark.parametrize("wrong", ["steps=0", "images=1", "scenes=1", "stepz=5"])
def test_wrong_options_are_one_line(wrong, capsys):
    assert main(["demo", wrong]) == 2
    error = capsys.readouterr().err
    assert wrong.split("=")[0] in error and len(error.strip().splitlines()) <= 2
