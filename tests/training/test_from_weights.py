"""A run that starts from trained weights takes the model from them, and its batch fits the data."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import model_config, train_config, train_set

from fastris import CRIS
from fastris.commands.assemble import assemble, options_text
from fastris.commands.assemble import model_config as configured
from fastris.commands.eval import EvalConfig
from fastris.commands.train import TrainConfig, train
from fastris.data.base import DataError
from fastris.data.options import DataOptions
from fastris.models import registry
from fastris.options.declare import load_options
from fastris.weights.load import load_model, save_atomic


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind of weights: a folder of save_pretrained, a run's folder, its checkpoint, and an AlignFormer's."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(7)
    model = CRIS(model_config(dropout=0.3))
    model.save_pretrained(root / "folder")
    state = {"config": model.config.to_dict(), "state_dict": model.state_dict()}
    (root / "run").mkdir()
    save_atomic(state, root / "run" / "best.pth")
    save_atomic({"state_dict": {"no": torch.zeros(1)}}, root / "run" / "last.pth")
    registry.create("alignformer_tiny").save_pretrained(root / "alignformer")
    return {name: root / name for name in ("folder", "run", "alignformer")} | {"file": root / "run" / "best.pth"}


def options(*args: str) -> TrainConfig:
    return load_options(TrainConfig, ["dataset=synthetic", "batch_size=4", "workers=0", "device=cpu", *args])


@pytest.mark.parametrize("kind", ["folder", "run", "file"])
@pytest.mark.parametrize("option", ["weight", "model"])
def test_model_words_and_size_come_from_the_weights(folders: dict[str, Path], kind: str, option: str) -> None:
    found = options(f"{option}={folders[kind]}", "dropout=0.0", "input_size=96")
    warnings.simplefilter("error")
    assert configured(found) == model_config(dropout=0.0, input_size=96)
    parts = assemble(found, train_set(), train_set())
    given = load_model(folders[kind]).state_dict()
    assert all(torch.equal(value, given[name]) for name, value in parts.run.model.state_dict().items())


def test_another_system_brings_its_own_recipe(folders: dict[str, Path]) -> None:
    warnings.simplefilter("error")
    found = options(f"weight={folders['alignformer']}")
    assert (found.system, found.optimizer, found.val_rule) == ("alignformer", "adamw", "alignformer")
    assert configured(found) == registry.preset("alignformer_tiny")


def test_saved_options_need_the_weights_no_more(folders: dict[str, Path], tmp_path: Path) -> None:
    first = options(f"weight={folders['folder']}", "input_size=96")
    (tmp_path / "config.yaml").write_text(options_text(first).replace(str(folders["folder"]), "gone"))
    again = load_options(TrainConfig, [str(tmp_path / "config.yaml"), "--resume"])
    assert again.weight == "gone" and configured(again) == configured(first) == model_config(dropout=0.3, input_size=96)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["model=alignformer_tiny"], r"holds a CRIS model, and the options ask for AlignFormer; leave model=alignf"),
        (["num_layers=2"], r"has num_layers=1, and the options ask for num_layers=2; leave the model keys out"),
        (["model=tiny"], r"has .*clip\.\w+=.*, and the options ask for .*; leave model=tiny out, and the model is"),
    ],
)
def test_mismatch_is_one_sentence(folders: dict[str, Path], wrong: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        assemble(options(f"weight={folders['folder']}", *wrong), train_set(), train_set())
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_model_and_weight_may_not_both_name_weights(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="both name weights"):
        options(f"weight={folders['folder']}", f"model={folders['run']}")


def test_preset_where_trained_weights_are_needed_is_told() -> None:
    with pytest.raises(FileNotFoundError, match=r"tiny is a preset, .* train it \(fastris train model=tiny\), or give"):
        load_model("tiny")
    with pytest.raises(ValueError, match="unknown model 'tinny'; choose from"):
        options("model=tinny")


@pytest.mark.parametrize(
    ("changes", "cut"),
    [({}, 12), ({"accumulate": 5}, 10), ({"expressions_per_image": 3}, 12), ({"limit_train": 7}, 7)],
)
def test_batch_is_cut_to_the_data_with_a_notice(tmp_path: Path, changes: dict[str, Any], cut: int) -> None:
    asked = train_config(tmp_path, batch_size=30, evaluate=False, **changes)
    parts = assemble(asked, train_set())
    assert parts.plan.batch_size == parts.run.recipe["batch_size"] == parts.memory.batch_size == cut
    assert parts.batches.sampler.batches_per_epoch == 1 and f"batch_size: {cut}\n" in parts.log.options
    assert parts.notices[0].startswith(f"batch_size=30 is cut to {cut}: there are {7 if cut == 7 else 12} training")
    assert not assemble(train_config(tmp_path, evaluate=False), train_set()).notices


def test_cut_batch_trains_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(train_config(tmp_path, batch_size=64, max_steps=1, evaluate=False), train_set())
    assert "batch_size=64 is cut to 12: there are 12 training references" in capsys.readouterr().err


def test_data_set_is_the_one_that_data_root_holds(tmp_path: Path) -> None:
    assert DataOptions().dataset == DataOptions(data_root=str(tmp_path)).dataset == "refcoco"
    (tmp_path / "train.jsonl").write_text("")
    assert DataOptions(data_root=str(tmp_path)).dataset == "folder"
    (tmp_path / "grefcoco").mkdir()
    (tmp_path / "grefcoco" / "grefs(unc).json").write_text("[]")
    (tmp_path / "grefcoco" / "instances.json").write_text("{}")
    with pytest.raises(DataError, match="holds grefcoco, folder; choose one with dataset="):
        DataOptions(data_root=str(tmp_path))


@pytest.mark.parametrize("kind", [TrainConfig, EvalConfig])
def test_guesses_lead_to_options_and_hide_none(kind: type) -> None:
    names = {field.name for field in dataclasses.fields(kind)}
    assert set(kind.guesses.values()) <= names and not set(kind.guesses) & names
    keys = set(registry.model_keys()) if kind is TrainConfig else set()
    assert not set(kind.guesses) & keys


@pytest.mark.parametrize(
    ("guess", "meant"), [("lr=1", "base_lr"), ("--learning-rate=1", "base_lr"), ("Optim=x", "opt")]
)
def test_wrong_guess_is_answered_by_the_option(guess: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown option .*; did you mean {meant}"):
        load_options(TrainConfig, [guess])


def test_resume_of_a_folder_alone_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(train_config(tmp_path / "runs" / "first", exp_name="x", evaluate=False, max_steps=3), train_set())
    folder = (tmp_path / "runs" / "first" / "x").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    found = load_options(TrainConfig, ["--resume", "moved", "max_steps=5"])
    assert (found.folder, found.resume, found.max_steps, found.model) == (Path("moved"), True, 5, "")
    assert train(found, train_set()).step == 5 and {path.name for path in tmp_path.iterdir()} == {"moved", "runs"}
    checkpoint = load_options(TrainConfig, ["resume=moved/previous.pth"])
    assert (checkpoint.folder, checkpoint.resume, checkpoint.batch_size) == (Path("moved"), "moved/previous.pth", 3)
    for alone in (["--resume", "moved", "output_folder=new"], ["--resume", "gone"], ["--resume"]):
        assert load_options(TrainConfig, alone).batch_size == 64
    assert folder.is_dir()
