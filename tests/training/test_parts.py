"""Options become parts in one place, and training knows parts alone."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from training_helpers import model_config, train_config, train_set, val_set

from fastris import CRIS
from fastris.commands.assemble import assemble, options_text
from fastris.data.samples import EpochSampler, TrainSamples
from fastris.runtime.device import Precision
from fastris.training import loop
from fastris.training.gpu_settings import MemoryUse
from fastris.training.log import LogSettings
from fastris.training.notices import stop_signal
from fastris.training.optim import build_optimizer, build_scheduler
from fastris.training.parts import Batches, Parts, Plan
from fastris.training.run import Run

ROOM = Path(loop.__file__).parent


@pytest.mark.parametrize("file", sorted(ROOM.glob("*.py")), ids=lambda file: file.name)
def test_training_imports_neither_commands_nor_options(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [name for name in names if name.startswith(("fastris.commands", "fastris.options"))], node.lineno


def test_every_option_reaches_its_part(tmp_path: Path) -> None:
    changes = {"epochs": 7, "batch_size": 4, "accumulate": 2, "max_norm": 0.5, "max_skipped": 3, "max_steps": 9,
               "patience": 4,
               "save_every_steps": 11, "val_rule": "gres", "val_sentences": "all", "pictures": 5, "batch_size_val": 6,
               "workers_val": 2, "workers": 1, "print_freq": 13, "progress": False, "wandb": "mine",
               "recompute": "none", "weight_decay": 0.25}  # fmt: skip
    options = train_config(tmp_path, **changes)
    data, held_out = train_set(), val_set()
    parts = assemble(options, data, held_out)
    for field in fields(Plan):
        assert getattr(parts.plan, field.name) == changes[field.name], field.name
    validation = parts.validation
    assert validation is not None and validation.dataset is held_out and parts.batches.samples.dataset is data
    found = (validation.rule, validation.sentences, validation.pictures, validation.batch_size, validation.workers)
    assert found == ("gres", "all", 5, 6, 2) and not validation.progress and parts.batches.workers == 1
    assert parts.log == LogSettings(options_text(options), 13, tensorboard=False, wandb="mine", progress=False)
    assert parts.memory == MemoryUse(4, 2, "none") and parts.memory.at_once == 2
    assert [group["weight_decay"] for group in parts.run.optimizer.param_groups] == [0.25, 0.25]
    assert parts.is_new and assemble(train_config(tmp_path, evaluate=False), data, held_out).validation is None
    assert not list(tmp_path.iterdir())  # assembling writes nothing


def test_loop_trains_on_parts_made_by_hand_without_any_options(tmp_path: Path) -> None:
    data, model, precision = train_set(), CRIS(model_config()), Precision("off", torch.device("cpu"))
    before = model.proj.txt.weight.clone()
    optimizer = build_optimizer({"head": list(model.parameters())}, {"head": 1e-3})
    run = Run(
        folder=tmp_path / "run",
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, (1,), 0.1),
        scaler=precision.scaler(),
        precision=precision,
        layout=torch.contiguous_format,
        recipe={"dataset": "mine", "train_split": "train", "references": len(data), "manual_seed": 0},
    )
    batches = Batches(TrainSamples(data, 64, 12), EpochSampler(len(data), 0, 3))
    plan = Plan(epochs=2, batch_size=3, max_steps=2)
    result = loop.train(Parts(plan, run, batches, None, LogSettings(), MemoryUse(3), stop_signal()))
    assert (result.epoch, result.step, result.scores, result.interrupted) == (0, 2, None, False)
    assert {path.name for path in result.folder.iterdir()} == {
        "last.pth",
        "previous.pth",
        "log.csv",
        "val.csv",
        "curves.html",
    }
    assert torch.isfinite(model.proj.txt.weight).all() and not torch.equal(model.proj.txt.weight, before)
