"""Runs that several files of this folder start from or compare with, each trained once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import rich.console  # noqa: F401  which draws from Python's generator the first time, and no test is to begin with that
from training_helpers import train_config, train_set, val_set

from fastris.commands.train import train
from fastris.weights.load import load_torch


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs, validated after each. Nothing may be written into it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = train(train_config(folder), train_set(), val_set())
    assert (result.epoch, result.step, result.interrupted) == (2, 8, False)
    return folder


@pytest.fixture(scope="session")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    train(train_config(folder, evaluate=False, max_steps=4), train_set())
    earlier = (folder / "last.pth").read_bytes()
    train(train_config(folder, evaluate=False, max_steps=6, resume=True), train_set())
    (folder / "previous.pth").write_bytes(earlier)
    assert [load_torch(folder / name)["step"] for name in ("last.pth", "previous.pth")] == [6, 4]
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A run that stopped after 6 of its 8 steps, with `last.pth` from there and `previous.pth` from step 4."""
    return shutil.copytree(stopped_once, tmp_path, dirs_exist_ok=True)
