"""What a run writes about its validations: pictures, trackers, model cards."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from training_helpers import Boxes, model_config, rows, train_config, train_set, val_set

from fastris import CRIS
from fastris.commands.assemble import identity
from fastris.commands.convert import ConvertConfig, run_convert
from fastris.commands.train import train
from fastris.evaluation.evaluate import evaluate
from fastris.evaluation.metrics import score
from fastris.pictures.gallery import AGREE
from fastris.training import loop as training
from fastris.training.card import training_card
from fastris.training.loop import TrainResult
from fastris.training.run import Position
from fastris.training.trackers import open_trackers, picture_path
from fastris.training.validation import draw_predictions, pictured
from fastris.weights.load import load_model, load_torch, save_atomic


class FakeWandb(SimpleNamespace):
    """Takes the place of the package and notes what it is told."""

    def __init__(self) -> None:
        super().__init__(inits=[], logged=[], finished=0)

    def init(self, **options: Any) -> FakeWandb:
        self.inits.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    def Image(self, path: str) -> Path:
        return Path(path)


@pytest.fixture(scope="module")
def wandb() -> FakeWandb:
    return FakeWandb()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, wandb: FakeWandb) -> TrainResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        folder = tmp_path_factory.mktemp("runs") / "tiny"
        return train(train_config(folder, wandb="my-project", pictures=4), train_set(), val_set())


def test_predictions_are_drawn_after_every_epoch(finished: TrainResult) -> None:
    names = sorted(path.name for path in (finished.folder / "predictions").iterdir())
    assert names == ["epoch_001.png", "epoch_002.png"]
    with Image.open(picture_path(finished.folder, 2)) as picture:
        assert picture.width > 1500 and picture.height > 500  # two rows of two expressions, four pictures each


def test_pictured_expressions_are_spread_over_the_data_and_always_the_same() -> None:
    chosen = pictured(Boxes(), 4, "all")
    assert [index for index, _ in chosen] == [0, 1, 3, 4] and chosen == pictured(Boxes(), 4, "all")
    assert all(number < len(Boxes().reference(index).sentences) for index, number in chosen)
    assert pictured(Boxes(), 100, "first") == [(index, 0) for index in range(6)]
    assert pictured(Boxes(), 0, "all") == []


@pytest.mark.parametrize("rule", ["cris", "lavt"])
def test_a_picture_shows_the_scored_mask_at_the_size_of_the_image(tmp_path: Path, rule: str) -> None:
    data = Boxes()
    result = evaluate(CRIS(model_config()), data, rule=rule, keep=[(0, 0)])
    truth = data.mask(0)
    scored = truth if rule == "cris" else np.asarray(Image.fromarray(truth).resize((480, 480)))
    result.masks[0, 0] = scored  # as if the prediction were perfect
    path = draw_predictions(tmp_path / "grid.png", data, result, "title")
    assert path is not None
    colours = np.asarray(Image.open(path).convert("RGB")).astype(int)
    agreed = (np.abs(colours - AGREE).sum(axis=-1) < 150)[122:330, -232:].sum()  # the cell that overlays both
    assert 0.5 < agreed / (truth.mean() * 208 * 208 * 50 / 90) < 1.6
    result.masks.clear()
    assert draw_predictions(tmp_path / "none.png", data, result, "title") is None


def test_wandb_gets_every_step_every_validation_and_the_pictures(finished: TrainResult, wandb: FakeWandb) -> None:
    (options,) = wandb.inits
    assert (options["project"], options["name"], options["resume"]) == ("my-project", "tiny", "allow")
    assert options["config"]["batch_size"] == 3 and options["config"]["manual_seed"] == 0
    told = {(step, name) for step, values in wandb.logged for name in values}
    assert {(step, "train/loss") for step in range(1, 9)} <= told
    assert {(4, "val/mIoU"), (8, "val/mIoU"), (4, "val/predictions"), (8, "val/predictions")} <= told
    assert [step for step, _ in wandb.logged] == sorted(step for step, _ in wandb.logged)
    assert wandb.finished == 1


def test_resumed_run_goes_on_in_its_own_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for last_step in (0, 5, 0):
        trackers = open_trackers(tmp_path, last_step, wandb="project")
        assert trackers is not None
        trackers.add_picture("val/predictions", tmp_path / "none.png", 1)  # no picture was drawn: nothing is told
    first, resumed, new = (options["id"] for options in fake.inits)
    assert first == resumed != new and fake.logged == []


def test_trackers_are_never_on_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert open_trackers(tmp_path, 0) is None
    train(train_config(tmp_path / "run", max_steps=1, evaluate=False), train_set())
    with pytest.raises(RuntimeError, match=r"wandb=mine needs the package wandb.*pip install 'fastris\[wandb\]'"):
        train(train_config(tmp_path / "other", wandb="mine"), train_set(), val_set())
    assert not (tmp_path / "other").exists()


def head_and_body(card: str) -> tuple[dict[str, Any], str]:
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_card_stands_beside_the_best_weights_and_says_what_they_are(finished: TrainResult) -> None:
    card = (finished.folder / "README.md").read_text()
    best = load_torch(finished.folder / "best.pth")
    assert best["card"] == card
    head, body = head_and_body(card)
    assert (head["library_name"], head["pipeline_tag"], head["datasets"]) == (
        "fastris",
        "image-segmentation",
        ["synthetic"],
    )
    (result,) = head["model-index"][0]["results"]
    assert result["dataset"] == {"name": "synthetic", "type": "synthetic", "split": "val"}
    found = {metric["type"]: metric for metric in result["metrics"]}
    assert found["mIoU"]["value"] == round(100 * best["scores"]["mIoU"], 2)
    assert found["Pr@90"]["name"] == "Pr@90, % (rule cris, first sentences)"
    for line in (
        "| training data | synthetic, split train, 12 references |",
        "| seed | 0 |",
        f"| epochs | {best['step'] // 4} |",
        f"| optimizer steps | {best['step']} |",
        "| trained on | CPU |",
        "| batch_size | 3 |",
        "| rule | data | split | sentences |",
        "| cris | synthetic | val | the first sentence of each object |",
        f"torch {torch.__version__}",
        "inverse letterbox warp (cubic)",
    ):
        assert line in body


def test_card_of_the_generalised_task_has_its_metrics() -> None:
    scores = score([0, 9, 0], [0, 10, 9], rule="gres", dataset="grefcoco", split="testA", sentences="all",
                   no_target=[True, False, True], rejected=[True, False, False])  # fmt: skip
    recipe = identity(train_config(Path("run")), model_config(), dataset="grefcoco", train_split="train", references=9)
    card = training_card(
        model_config(), recipe, epoch=1, step=2, scores=scores, device="NVIDIA L4", versions={"torch": "2"}
    )
    head, body = head_and_body(card)
    assert {m["type"]: m["value"] for m in head["model-index"][0]["results"][0]["metrics"]}["N-acc"] == 50.0
    assert "2 of them without a target" in body and "| trained on | NVIDIA L4 |" in body


@pytest.mark.parametrize(
    ("target", "card"), [("model", "model/README.md"), ("m.pth", "m.md"), ("m.safetensors", "m.md")]
)
def test_card_goes_with_the_weights_through_every_conversion(
    finished: TrainResult, tmp_path: Path, target: str, card: str
) -> None:
    original = (finished.folder / "README.md").read_text()
    run_convert(ConvertConfig(str(finished.folder / "best.pth"), str(tmp_path / target)))
    assert (tmp_path / card).read_text() == original
    run_convert(ConvertConfig(str(tmp_path / target), str(tmp_path / "again")))
    assert (tmp_path / "again" / "README.md").read_text() == original
    assert load_model(tmp_path / "again").config == model_config()


def test_last_state_of_a_run_carries_a_card_too(finished: TrainResult, tmp_path: Path) -> None:
    run_convert(ConvertConfig(str(finished.folder / "last.pth"), str(tmp_path / "model")))
    head, body = head_and_body((tmp_path / "model" / "README.md").read_text())
    assert "model-index" not in head and "| optimizer steps | 8 |" in body and "| epochs | 2 |" in body


def test_weights_that_say_nothing_get_a_card_that_says_so(tmp_path: Path) -> None:
    model = CRIS(model_config())
    save_atomic({"config": model.config.to_dict(), "state_dict": model.state_dict()}, tmp_path / "old.pth")
    run_convert(ConvertConfig(str(tmp_path / "old.pth"), str(tmp_path / "new")))
    head, body = head_and_body((tmp_path / "new" / "README.md").read_text())
    assert "model-index" not in head and "datasets" not in head
    assert "old.pth`, which does not say how it was trained" in body and "No validation of these weights" in body


def test_conversion_overwrites_no_card(tmp_path: Path) -> None:
    model = CRIS(model_config())
    save_atomic({"config": model.config.to_dict(), "state_dict": model.state_dict()}, tmp_path / "old.pth")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"README.md exists; choose another target"):
        run_convert(ConvertConfig(str(tmp_path / "old.pth"), str(tmp_path / "new")))
    assert (tmp_path / "new" / "README.md").read_text() == "mine"


def test_validation_follows_its_rule_and_keeps_the_best_by_it(tmp_path: Path) -> None:
    result = train(train_config(tmp_path, val_rule="gres", epochs=1, pictures=0), train_set(), val_set())
    scores = load_torch(tmp_path / "best.pth")["scores"]
    (row,) = rows(tmp_path / "val.csv")
    assert (row["rule"], float(row["gIoU"]), row["N-acc"]) == ("gres", scores["gIoU"], "-")
    assert scores["rule"] == "gres" and result.best_iou == scores["gIoU"]
    assert not (tmp_path / "predictions").exists()
    with pytest.raises(ValueError, match="rule='lavvt' is unknown"):
        train_config(tmp_path, val_rule="lavvt")


def test_best_weights_of_the_generalised_task_are_those_with_the_best_giou(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[float] = []
    run = SimpleNamespace(position=Position(), save_best=lambda scores, card: saved.append(scores["gIoU"]))
    log = SimpleNamespace(validation=lambda *args: None)
    monkeypatch.setattr(training, "card_of", lambda *args: "")
    names = {"rule": "gres", "dataset": "grefcoco", "split": "val", "sentences": "all", "no_target": [False, True]}
    training._keep_if_best(run, score([50, 0], [100, 0], rejected=[False, True], **names), log)  # gIoU 0.75, mIoU 0.5
    training._keep_if_best(run, score([90, 0], [100, 80], rejected=[False, False], **names), log)  # 0.45, mIoU 0.9
    assert saved == [0.75] and run.position.best_iou == 0.75
