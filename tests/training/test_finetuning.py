"""preset=finetune: frozen stages, warm-up and cosine, averaged weights, an end when nothing gets better."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_same_run
from training_helpers import parts_of, rows, train_config, train_set, val_set

from fastris.commands.presets import PRESETS
from fastris.commands.train import TrainConfig, train
from fastris.evaluation.evaluate import evaluate
from fastris.models import registry
from fastris.training import loop
from fastris.training.averaging import AveragedWeights
from fastris.training.loop import TrainResult
from fastris.training.optim import CosineSchedule
from fastris.weights.load import load_model, load_torch


def finetune(folder: Path, **changes: Any) -> TrainResult:
    given = {"preset": "finetune", "milestones": (35,), "base_lr": 1e-3} | changes
    return train(train_config(folder, **given), train_set(), val_set())


def test_preset_gives_what_the_user_does_not() -> None:
    options = TrainConfig(preset="finetune", ema=0.5)
    found = {name: getattr(options, name) for name in PRESETS["finetune"]}
    assert found == {**PRESETS["finetune"], "ema": 0.5, "freeze": "stem,layer1"}
    assert TrainConfig(preset="finetune", schedule="poly", evaluate=False).warmup == 0
    plain = TrainConfig()
    assert (plain.freeze, plain.warmup, plain.ema, plain.patience, plain.max_norm) == ("", 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"preset": "fine"}, "preset='fine' is unknown; choose from finetune"),
        (
            {"freeze": "layer9"},
            "layer9 is no stage of CRIS, which has stem, layer1, layer2, layer3, layer4, text; give",
        ),
        ({"freeze": "7"}, "7 is no stage of CRIS"),
        ({"warmup": 0.1}, r"warmup=0.1 must be a share .* with schedule=cosine \(schedule=steps\)"),
        ({"ema": 1.0}, "ema=1.0 must be a decay below 1"),
        ({"patience": 3, "evaluate": False}, "patience=3 needs validations"),
    ],
)
def test_wrong_settings_are_told(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig(**wrong)


@pytest.mark.parametrize("preset", ["tiny", "alignformer_tiny", "magnet_tiny"])
def test_stages_are_the_whole_of_both_encoders_in_order(preset: str) -> None:
    config = registry.preset(preset)
    names = [name for name, _ in registry.create(config).named_parameters()]
    found = [[name for name in names if name.startswith(prefixes)] for prefixes in config.stages.values()]
    assert list(config.stages) == ["stem", "layer1", "layer2", "layer3", "layer4", "text"] and all(found)
    listed = [name for each in found for name in each]
    assert len(set(listed)) == len(listed) < len(names)
    first = [names.index(each[0]) for each in found[:5]]
    assert first == sorted(first)
    for prefixes in config.stages.values():
        assert all(any(f"{name}.".startswith(f"{prefix}.") for name in names) for prefix in prefixes)


def test_frozen_stages_stay_bit_for_bit_and_all_else_is_trained(tmp_path: Path) -> None:
    config = train_config(tmp_path, freeze="text,2", max_steps=3, evaluate=False)
    before = {name: value.clone() for name, value in parts_of(config).run.model.state_dict().items()}
    model = train(config, train_set()).model
    stages = [model.config.stages[name] for name in ("stem", "layer1", "text")]
    for name, value in model.state_dict().items():
        frozen = any(name.startswith(tuple(f"{each}." for each in stage)) or name in stage for stage in stages)
        unused = name.startswith(("backbone.logit_scale", "backbone.visual.attnpool.positional", "proj.vis.0"))
        same = torch.equal(value, before[name])
        assert same or not frozen, name
        assert not same or frozen or unused or value.ndim == 0 or not value.is_floating_point(), name


def test_cosine_schedule_rises_falls_and_goes_on_exactly() -> None:
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1.0, 0.1)])
    schedule, rates = CosineSchedule(optimizer, steps=20, warmup=4), []
    for step in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1 * rates[-1])
        schedule.step()
        if step == 9:
            state, middle = (schedule.state_dict(), optimizer.state_dict()), len(rates)
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 0.5 * (1 + math.cos(math.pi * 4 / 21))])
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.01
    again = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1.0, 0.1)])
    resumed = CosineSchedule(again, steps=20, warmup=4)
    again.load_state_dict(state[1])
    resumed.load_state_dict(state[0])
    assert again.param_groups[0]["lr"] == rates[middle]


def test_average_is_validated_kept_and_resumed_exactly(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    common = {"batch_size": 3, "epochs": 2, "patience": 0}
    result = finetune(whole, **common)
    finetune(halves, **common, max_steps=5)
    finetune(halves, **common, resume=True)
    assert_same_run(whole, halves)
    states = [load_torch(folder / "last.pth") for folder in (whole, halves)]
    assert all(torch.equal(value, states[1]["average"][name]) for name, value in states[0]["average"].items())
    assert not torch.equal(states[0]["average"]["proj.txt.weight"], states[0]["state_dict"]["proj.txt.weight"])
    best = evaluate(load_model(whole / "best.pth"), val_set(), sentences="first", rule="cris")
    assert best.scores.mIoU == pytest.approx(result.best_iou, abs=1e-6)
    if result.best_iou == float(rows(whole / "val.csv")[-1]["mIoU"]):
        assert torch.equal(load_torch(whole / "best.pth")["state_dict"]["proj.txt.weight"],
                           states[0]["average"]["proj.txt.weight"])  # fmt: skip


def test_average_is_timms_formula(tmp_path: Path) -> None:
    model = parts_of(train_config(tmp_path)).run.model
    average, expected = AveragedWeights(model, 0.6), None
    for step in range(1, 6):
        with torch.no_grad():
            model.proj.txt.bias.add_(step)
        average.update(model, step)
        now, decay = model.proj.txt.bias.detach().clone(), min(0.6, 1 - step ** (-2 / 3))
        expected = now if expected is None else decay * expected + (1 - decay) * now
    torch.testing.assert_close(average.model.proj.txt.bias, expected)


def test_run_ends_when_nothing_gets_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored, validate = iter([0.3, 0.5, 0.4, 0.5, 0.6, 0.7]), loop.validate

    def pretended(run: Any, validation: Any) -> Any:
        scores = validate(run, validation)
        object.__setattr__(scores, "mIoU", next(scored))
        return scores

    monkeypatch.setattr(loop, "validate", pretended)
    result = finetune(tmp_path, batch_size=12, epochs=6, patience=2)
    assert (result.epoch, result.best_iou, result.interrupted) == (4, 0.5, False)
    assert "ends early: the last 2 validations were no better (patience)" in capsys.readouterr().err
    assert load_torch(tmp_path / "last.pth")["stale"] == 2
    assert finetune(tmp_path, batch_size=12, epochs=6, patience=2, resume=True).epoch == 4
