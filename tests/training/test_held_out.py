"""A share of the training images is held out, remembered, and scored by the command that training suggests."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from training_helpers import drawn_folder, model_config, train_set

from fastris import CRIS
from fastris.commands import cli
from fastris.commands.eval import EvalConfig
from fastris.commands.eval import _open as open_for_eval
from fastris.commands.fitting import open_data
from fastris.commands.train_options import TrainConfig
from fastris.data.base import DataError
from fastris.data.held_out import Part, hold_out, record_of


def images_of(data: Part) -> set[str]:
    return {str(data.reference(index).image_id) for index in range(len(data))}


def test_whole_images_are_held_out_whatever_the_order() -> None:
    whole = train_set()
    rest, held = hold_out(whole, 0.4)
    assert len(rest) + len(held) == len(whole) and len(images_of(held)) == 2 and not images_of(rest) & images_of(held)
    assert (rest.split, held.split, held.name) == ("train", "held_out", whole.name)
    backwards = Part(whole, range(len(whole) - 1, -1, -1), "train")
    assert images_of(hold_out(backwards, 0.4)[1]) == images_of(held)
    assert [len(images_of(hold_out(whole, share)[1])) for share in (0.001, 0.999)] == [1, 3]
    with pytest.raises(DataError, match=r"split=0.4 needs two images or more, and synthetic train has 1; add some"):
        hold_out(Part(whole, [0, 1], "train"), 0.4)


def test_validation_split_is_taken_where_there_is_one(tmp_path: Path) -> None:
    root = str(drawn_folder(tmp_path, pictures=3))
    with pytest.raises(DataError, match=r"split='val' is unknown.*; to validate on a fifth .* give split=0.2"):
        open_data(TrainConfig(data_root=root), None, None)
    rest, held = open_data(TrainConfig(data_root=root, split=0.2), None, None)
    assert isinstance(held, Part) and (len(rest), len(held)) == (6, 3)
    assert open_data(TrainConfig(data_root=root, evaluate=False), None, None)[1] is None
    (tmp_path / "val.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    rest, val = open_data(TrainConfig(data_root=root, split=0.2), None, None)
    assert val is not None and (len(rest), len(val), val.split) == (9, 9, "val")


def test_record_of_other_data_and_no_record_are_told(tmp_path: Path) -> None:
    data, model = drawn_folder(tmp_path / "data", pictures=3), tmp_path / "run"
    model.mkdir()

    def opened() -> object:
        return open_for_eval(EvalConfig(model=str(model), data_root=str(data), split="held_out"))

    with pytest.raises(DataError, match=r"split=held_out: beside model=.*run lies no held_out.json"):
        opened()
    (model / "held_out.json").write_text("[]")
    with pytest.raises(DataError, match=r"held_out.json is not what a training run"):
        opened()
    record = record_of(hold_out(open_data(TrainConfig(data_root=str(data), evaluate=False), None, None)[0], 0.4)[1])
    (model / "held_out.json").write_text(record)
    assert images_of(opened()) == set(json.loads(record)["images"])  # type: ignore[arg-type]
    (model / "held_out.json").write_text(record.replace('"references": 3', '"references": 4'))
    with pytest.raises(DataError, match=r"is of 4 references of 'folder', and folder train has 3 of them; give"):
        opened()


def test_printed_score_is_that_of_the_printed_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    CRIS(model_config()).save_pretrained("start")
    drawn_folder(tmp_path / "my data", pictures=5)
    line = ["weight=start", "data_root=my data", "preset=finetune", "device=cpu", "workers=0", "workers_val=0"]
    assert cli.main(["train", *line, "output_folder=run", "epochs=2", "base_lr=1e-3", "val_rule=gres"]) == 0
    printed = capsys.readouterr()
    assert "12 references of folder train, 1 batches of 8" in printed.err
    assert "3 references of other images are held out" in printed.err
    command = shlex.split(next(row for row in printed.out.splitlines() if row.startswith("evaluate:")))[1:]
    assert command == ["fastris", "eval", "model=run/best.pth", "dataset=folder", "data_root=my data",
                       "split=held_out", "sentences=first", "rule=gres"]  # fmt: skip
    assert cli.main([*command[1:], "device=cpu", "workers=0"]) == 0
    scores = json.loads(next((tmp_path / "runs" / "eval").glob("*/metrics.json")).read_text())
    best = next(row for row in printed.out.splitlines() if row.startswith("done:"))
    assert (
        scores["gIoU"] > 0
        and best.endswith(f"best validation gIoU {100 * scores['gIoU']:.2f} %")
        and scores["expressions"] == 3
    )
