"""Runs of the real command in processes of their own, stopped as users and machines stop them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_helpers import rows

from fastris.runtime.runlock import locked
from fastris.weights.load import load_torch

pytestmark = pytest.mark.slow

OPTIONS = ["model=tiny", "dropout=0.1", "dataset=synthetic", "input_size=64", "batch_size=4", "limit_train=40"]
OPTIONS += ["epochs=3", "evaluate=false", "device=cpu", "save_every_steps=4", "print_freq=1"]
STEPS = 30


COMMAND = [sys.executable, "-m", "fastris", "train"]


def start(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(*args: str) -> str:
    out, err = (process := start(*args)).communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    while not (folder / "log.csv").exists() or len(rows(folder / "log.csv")) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(*OPTIONS, "workers=0", f"output_folder={folder}")
    return folder


def assert_same_run(folder: Path, expected: Path) -> None:
    assert rows(folder / "log.csv") == rows(expected / "log.csv")
    assert [row["step"] for row in rows(folder / "log.csv")] == [str(step) for step in range(1, STEPS + 1)]
    ours, theirs = (load_torch(f / "last.pth")["state_dict"] for f in (folder, expected))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.long), 2])
def test_ctrl_c_saves_and_prints_a_command_that_goes_on_exactly(tmp_path, uninterrupted, workers):
    process = start(*OPTIONS, f"workers={workers}", f"output_folder={tmp_path}")
    wait_for_step(process, tmp_path, 13)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the worker processes too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "finishing this step" in err and "Traceback" not in err
    stopped_at = load_torch(tmp_path / "last.pth")["step"]
    assert len(rows(tmp_path / "log.csv")) == stopped_at >= 13
    command = out.splitlines()[-1].split()
    assert command[:2] == ["fastris", "train"]
    finish(*command[2:])
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("attempt", [0, *(pytest.param(again, marks=pytest.mark.long) for again in (1, 2))])
def test_killed_run_leaves_a_checkpoint_from_which_it_goes_on_exactly(tmp_path, uninterrupted, attempt):
    process = start(*OPTIONS, "workers=2", f"output_folder={tmp_path}")
    wait_for_step(process, tmp_path, 1)
    time.sleep(random.Random(attempt).uniform(0.0, 1.5))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert load_torch(tmp_path / "last.pth")["step"] <= len(rows(tmp_path / "log.csv"))
    finish(str(tmp_path / "config.yaml"), "--resume")
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.long
def test_closed_terminal_saves_and_the_run_goes_on_exactly(tmp_path, uninterrupted):
    outside, inside = os.openpty()
    program = f"import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv({sys.executable!r}, "
    arguments = [*COMMAND, *OPTIONS, "workers=2", f"output_folder={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}{arguments!r})"],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(inside)
    os.set_blocking(outside, False)
    while not (tmp_path / "log.csv").exists() or len(rows(tmp_path / "log.csv")) < 6:
        assert process.poll() is None
        with contextlib.suppress(BlockingIOError):
            os.read(outside, 1 << 16)
        time.sleep(0.02)
    os.close(outside)
    assert process.wait(timeout=60) == 130
    stopped_at = load_torch(tmp_path / "last.pth")["step"]
    assert len(rows(tmp_path / "log.csv")) == stopped_at >= 6
    finish(str(tmp_path / "config.yaml"), "--resume")
    assert_same_run(tmp_path, uninterrupted)


def test_of_two_commands_started_at_once_one_runs_and_one_is_told_in_one_line(tmp_path):
    folder = tmp_path / "run"
    options = [*OPTIONS, "epochs=1000", "workers=1", f"output_folder={folder}"]
    both = [start(*options, f"manual_seed={seed}") for seed in range(2)]
    while all(process.poll() is None for process in both):
        time.sleep(0.02)
    refused, running = sorted(both, key=lambda process: process.poll() is None)
    told = refused.communicate()[1]
    assert refused.returncode == 2 and len(told.splitlines()) == 1
    assert f"output_folder: {folder} is in use by another run, process {running.pid} on" in told
    wait_for_step(running, folder, 3)
    os.killpg(running.pid, signal.SIGINT)
    assert running.communicate(timeout=60) and running.returncode == 130
    state, steps = load_torch(folder / "last.pth"), [row["step"] for row in rows(folder / "log.csv")]
    assert state["recipe"]["manual_seed"] == both.index(running)
    assert steps == [str(step) for step in range(1, state["step"] + 1)]
    assert not list(folder.glob(".*")) and not (folder / "run.lock").exists()


@pytest.mark.long
def test_run_goes_on_at_once_where_only_the_main_process_was_killed(tmp_path, uninterrupted):
    process = start(*OPTIONS, "workers=2", f"output_folder={tmp_path}")
    wait_for_step(process, tmp_path, 5)
    process.kill()  # its workers notice within seconds
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with locked(tmp_path, ("output_folder",)) as held:
        assert held
    process.communicate(timeout=60)
    finish(str(tmp_path / "config.yaml"), "--resume")
    assert_same_run(tmp_path, uninterrupted)
