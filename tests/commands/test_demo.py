"""The demo runs to its end, leaves what it promises, and its second evaluation really asks for another object."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastris import Segmenter
from fastris.commands.cli import main
from fastris.commands.demo import DemoConfig, run
from fastris.data.scenes.dataset import SyntheticExpressions
from fastris.data.scenes.other_phrases import OtherPhrases
from fastris.models.registry import create, preset
from fastris.training.from_scratch import guess_hidden_words

SHORT = {"steps": 3, "images": 2, "scenes": 4, "held_out": 2, "threads": 1, "progress": False}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """What a demo leaves, and ``printed``, what it told."""
    folder = tmp_path_factory.mktemp("demo")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert run(DemoConfig(out=str(folder), **SHORT)) == 0
    (folder / "printed").write_text(told.getvalue())
    return folder


def test_demo_leaves_model_metrics_gallery_and_scenes(demo):
    metrics = json.loads((demo / "metrics.json").read_text())
    for part in ("right_phrase", "other_objects_phrase"):
        assert {"mIoU", "oIoU", "Pr@50", "Pr@90", "rule"} <= metrics[part].keys()
    assert metrics["steps"] == 3
    assert Image.open(demo / "gallery.png").width > 800
    card = (demo / "model" / "README.md").read_text()
    assert "library_name: fastris" in card and "| cris | synthetic | val | all sentences |" in card
    segmenter = Segmenter.from_pretrained(demo / "model", device="cpu")
    assert segmenter.predict(demo / "scene_0.png", "the red circle").masks.shape == (1, 96, 96)
    assert "another object's phrase" in (demo / "printed").read_text()


@pytest.mark.parametrize("system", ["alignformer", "magnet"])
def test_any_preset_that_learns_in_minutes_has_a_demo_in_its_own_rule(tmp_path, system):
    run(DemoConfig(out=str(tmp_path), model=f"{system}_tiny", **SHORT))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["model"], metrics["right_phrase"]["rule"]) == (f"{system}_tiny", system)
    segmenter = Segmenter.from_pretrained(tmp_path / "model", device="cpu")
    assert segmenter.threshold == 0.5
    assert segmenter.predict(tmp_path / "scene_0.png", "the red circle").masks.shape == (1, 64, 64)
    assert (tmp_path / "gallery.png").is_file()
    words = metrics.get("hidden_words", {})
    assert ("masked_accuracy" in words) == (system == "magnet")  # its demo trains the paper's further losses
    assert all(0 <= words[name] <= 1 for name in words if name != "grounding_loss" and name != "alignment_loss")


def test_demo_repeats_itself_under_a_seed(demo, tmp_path):
    run(DemoConfig(out=str(tmp_path), **SHORT))
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (demo, tmp_path))
    assert first["last_loss"] == second["last_loss"]


def test_guessing_hidden_words_leaves_the_model_as_it_was():
    model = create(preset("tiny").to_dict() | {"mask_grounding": 1.0})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    words = guess_hidden_words(model, SyntheticExpressions("val", scenes=2, size=96), images=2, seed=0)
    assert words.keys() >= {"masked_accuracy", "most_frequent_share"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_phrases_keep_the_mask_and_name_another_object_of_the_scene():
    data = SyntheticExpressions("val", scenes=3, size=64)
    other = OtherPhrases(data)
    assert len(other) == len(data) and other.by_image() == data.by_image()
    for index in range(len(data)):
        assert np.array_equal(other.mask(index), data.mask(index))
        assert other.reference(index).image_id == data.reference(index).image_id
        assert not set(other.reference(index).sentences) & set(data.reference(index).sentences)


@pytest.mark.parametrize("wrong", ["steps=0", "images=1", "scenes=1", "stepz=5", "model=cris_r50"])
def test_wrong_options_are_one_line(wrong, capsys):
    assert main(["demo", wrong]) == 2
    error = capsys.readouterr().err
    assert wrong.split("=")[0] in error and len(error.strip().splitlines()) <= 2
