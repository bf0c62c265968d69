"""Runs with Mask Grounding and the alignment loss: what they log, what they save, and that they go on exactly."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from training_helpers import MODEL, rows, train_config, train_set, val_set

from fastris.commands import convert
from fastris.commands.train import train
from fastris.training.log import STEP_COLUMNS
from fastris.weights.load import load_model, load_torch

EXTRA = {name: value for name, value in MODEL.items() if name not in ("input_size", "word_len")} | {
    "mask_grounding": 1.0,
    "predictor_layers": 1,
    "alignment_loss": 0.5,
}
METRICS = ("grounding_loss", "masked_accuracy", "most_frequent_share", "alignment_loss")


def run(folder, **changes):
    changes = {"evaluate": False, "epochs": 1, "extra": EXTRA} | changes
    return train(train_config(folder, **changes), train_set(), val_set() if changes["evaluate"] else None)


def test_run_goes_on_exactly_with_its_words_counts_and_generators(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole)
    run(stopped, max_steps=2)
    run(stopped, resume=True)
    assert rows(stopped / "log.csv") == rows(whole / "log.csv")
    ours, theirs = (load_torch(folder / "last.pth") for folder in (stopped, whole))
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())
    assert torch.equal(ours["metrics"]["seen"], theirs["metrics"]["seen"]) and theirs["metrics"]["seen"].sum() >= 12
    assert torch.equal(ours["rng"]["torch"], theirs["rng"]["torch"])
    with pytest.raises(ValueError, match=r"mask_rate=.not set., now 0.3. These settings change the run"):
        run(stopped, resume=True, epochs=2, extra=EXTRA | {"mask_rate": 0.3})


@pytest.mark.slow
def test_a_magnet_goes_on_exactly_too(tmp_path):
    pytest.importorskip("transformers", reason="MagNet's text encoder is BERT")
    sizes = {"depths": (1, 1, 1, 1), "query_layers": 1, "pixel_layers": 1, "predictor_layers": 1}
    magnet = {"model": "magnet_tiny", "extra": sizes | {"mask_grounding": 1.0, "alignment_loss": 0.5}, "word_len": None}
    run(tmp_path / "whole", max_steps=3, **magnet)
    run(tmp_path / "stopped", max_steps=1, **magnet)
    run(tmp_path / "stopped", max_steps=3, resume=True, **magnet)
    told = rows(tmp_path / "whole" / "log.csv")
    assert told == rows(tmp_path / "stopped" / "log.csv") and len({row["grounding_loss"] for row in told}) == 3
    ours, theirs = (load_torch(tmp_path / folder / "last.pth") for folder in ("stopped", "whole"))
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())
    assert torch.equal(ours["metrics"]["seen"], theirs["metrics"]["seen"]) and theirs["metrics"]["seen"].any()


def test_steps_are_logged_with_the_words_that_were_guessed(tmp_path, capfd):
    run(tmp_path, max_steps=2, print_freq=1)
    with (tmp_path / "log.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader)
    assert reader.fieldnames == [*STEP_COLUMNS[:-1], *METRICS, "time"]
    assert all(math.isfinite(float(row[name])) for row in found for name in METRICS)
    share = [float(row["most_frequent_share"]) for row in found]
    assert 0 < share[0] <= 1 and 7 < float(found[0]["grounding_loss"]) < 14  # of 49,408 words, about their logarithm
    assert "masked_accuracy 0" in capfd.readouterr().err


def test_best_weights_are_for_others_and_the_last_ones_to_go_on(tmp_path, capsys):
    trained = run(tmp_path, evaluate=True).model
    last, best = (load_torch(tmp_path / name) for name in ("last.pth", "best.pth"))
    new = {name for name in last["state_dict"] if name.startswith(("grounding.", "cal."))}
    assert new and best["state_dict"].keys() == last["state_dict"].keys() - new and "metrics" not in best
    assert last["config"]["mask_grounding"] == 1.0 and "mask_grounding" not in best["config"]
    images, tokens = torch.randn(1, 3, 64, 64), torch.tensor([[49406, 320, 49407]])
    convert.run_convert(convert.ConvertConfig(str(tmp_path / "last.pth"), str(tmp_path / "written.safetensors")))
    assert "mask_grounding" not in capsys.readouterr().out
    assert load_model(tmp_path / "written.safetensors").state_dict().keys() == best["state_dict"].keys()
    answers = [load_model(tmp_path / name)(images, tokens) for name in ("last.pth", "best.pth")]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], trained.eval()(images, tokens))


def test_parts_of_a_batch_and_several_phrases_an_image_are_trained_on(tmp_path):
    run(tmp_path, batch_size=8, accumulate=2, expressions_per_image=2, max_steps=1, recompute="stages")
    (row,) = rows(tmp_path / "log.csv")
    assert all(math.isfinite(float(row[name])) for name in METRICS)
