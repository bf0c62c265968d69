"""The real command under `torchrun`, with processes that are killed, stopped and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from training_helpers import rows

from fastris.weights.load import load_torch

pytestmark = pytest.mark.slow

OPTIONS = ["model=tiny", "dropout=0.1", "dataset=synthetic", "input_size=64", "batch_size=4", "limit_train=16"]
OPTIONS += ["epochs=3", "evaluate=false", "device=cpu", "save_every_steps=2", "print_freq=1", "workers=1"]
STEPS = 12


ONE_MACHINE = ("--standalone", "--nproc-per-node", "2")


def start(folder: Path, *options: str, restarts: int = 0, nodes: Sequence[str] = ONE_MACHINE) -> subprocess.Popen[str]:
    launch = ["-m", "torch.distributed.run", *nodes, f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "fastris", "train", *OPTIONS, f"output_folder={folder}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def processes_of(launcher: int) -> list[int]:
    """The two processes of the run, which are children of `torchrun`, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [entry for entry in environment if entry.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0][5:])] = int(child)
    return [found[rank] for rank in sorted(found)]


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    while not (folder / "log.csv").exists() or len(rows(folder / "log.csv")) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def finish(process: subprocess.Popen[str], timeout: float = 120) -> str:
    printed = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, printed
    return printed


def assert_same_run(folder: Path, expected: Path) -> None:
    assert rows(folder / "log.csv") == rows(expected / "log.csv")
    assert [row["step"] for row in rows(folder / "log.csv")] == [str(step) for step in range(1, STEPS + 1)]
    ours, theirs = (load_torch(f / "last.pth")["state_dict"] for f in (folder, expected))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    printed = finish(start(folder))
    assert printed.count("done: 3 epochs, 12 steps") == 1 and printed.count("2 processes (cpu)") == 1
    return folder


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.long)])
def test_process_that_is_killed_is_started_again_and_the_run_goes_on_exactly(tmp_path, uninterrupted, rank):
    process = start(tmp_path, restarts=1)
    wait_for_step(process, tmp_path, 5)
    os.kill(processes_of(process.pid)[rank], signal.SIGKILL)
    printed = finish(process)
    assert "going on after step 4" in printed or "going on after step 6" in printed
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.long
def test_process_that_is_killed_ends_the_run_with_a_reason_and_auto_goes_on(tmp_path, uninterrupted):
    process = start(tmp_path)
    wait_for_step(process, tmp_path, 5)
    os.kill(processes_of(process.pid)[1], signal.SIGKILL)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "lost contact with another process of the run" in printed and "last.pth is from step" in printed
    assert "Signal 9 (SIGKILL)" in printed  # torchrun's report
    finish(start(tmp_path, "--resume", "auto"))
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.long
def test_signal_to_torchrun_saves_and_the_run_goes_on_exactly(tmp_path, uninterrupted):
    process = start(tmp_path)
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert printed.count("SIGTERM: finishing this step, then saving") == 1
    assert load_torch(tmp_path / "last.pth")["step"] == len(rows(tmp_path / "log.csv")) >= 3
    finish(start(tmp_path, "resume=auto"))
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.long
def test_two_machines_start_again_together_when_a_process_of_one_is_killed(tmp_path, uninterrupted):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"localhost:{free.getsockname()[1]}"
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", meet]
    first, second = (start(tmp_path, restarts=2, nodes=[*nodes, "--local-addr", "localhost"]) for _ in range(2))
    wait_for_step(first, tmp_path, 5)
    os.kill(processes_of(second.pid)[0], signal.SIGKILL)
    printed = finish(first) + finish(second)
    assert "going on after step" in printed and printed.count("done: 3 epochs, 12 steps") == 1
    assert_same_run(tmp_path, uninterrupted)


def test_wrong_option_is_told_once(tmp_path):
    process = start(tmp_path / "run", "batch_size=5")
    printed = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    told = [line for line in printed.splitlines() if line.startswith("fastris train")]
    assert len(told) == 1 and "batch_size=5 must be a multiple of 2" in told[0]
    assert not (tmp_path / "run").exists()
