"""A folder belongs to one run at a time, for as long as its process lives and no longer."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from process_helpers import run_processes
from training_helpers import rows, train_config, train_set

from fastris.commands.cli import main
from fastris.commands.train import train
from fastris.runtime.runlock import LOCK, locked
from fastris.training import loop as training
from fastris.weights.load import load_torch

OPTIONS = ("output_folder", "exp_name")


def lock(folder: Path, patience: float = 0.0):
    return locked(folder, OPTIONS, patience)


def run(folder: Path, **changes):
    return train(train_config(folder, evaluate=False, **changes), train_set())


def alone(folder: Path) -> str:
    """A run with a seed of its own, in a process of its own; who has the folder waits until the other was refused."""
    refused = folder.with_name("refused")
    step = training.train_step

    def wait_and_step(*args):
        end = time.monotonic() + 60
        while not refused.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return step(*args)

    training.train_step = wait_and_step
    try:
        return f"step {run(folder, manual_seed=int(os.environ['RANK']), max_steps=2).step}"
    finally:
        refused.touch()


def test_of_two_runs_started_at_once_in_one_folder_one_runs_and_one_is_told(tmp_path):
    told = run_processes(alone, 2, tmp_path / "run", WORLD_SIZE="1")
    assert sorted(text[:7] for text in told) == ["ValueEr", "step 2"], told
    refused = max(told, key=len)
    assert f"output_folder: {tmp_path / 'run'} is in use by another run, process " in refused
    assert f" on {socket.gethostname()}, since 2" in refused and "\n" not in refused
    assert load_torch(tmp_path / "run" / "last.pth")["recipe"]["manual_seed"] == told.index("step 2")
    assert [row["step"] for row in rows(tmp_path / "run" / "log.csv")] == ["1", "2"]


def test_held_folder_is_left_as_it_is_whatever_the_second_run_asks_for(tmp_path):
    run(tmp_path, max_steps=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with lock(tmp_path):
        for resume in (None, True, "auto", str(tmp_path / "last.pth")):
            with pytest.raises(ValueError, match=f"in use by another run, process {os.getpid()} on .*let it end or st"):
                run(tmp_path, resume=resume)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert run(tmp_path, resume=True, max_steps=2).step == 2


def test_second_run_is_one_line_and_exit_code_2(tmp_path, capsys):
    args = ["model=tiny", "dataset=synthetic", "limit_train=8", "batch_size=4", "device=cpu", "evaluate=false"]
    with lock(tmp_path):
        assert main(["train", *args, f"output_folder={tmp_path}"]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and told[0].startswith(f"fastris train: output_folder: {tmp_path} is in use by another")
        assert main(["demo", f"out={tmp_path}", "steps=1", "scenes=2", "images=2", "held_out=1"]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and told[0].startswith(f"fastris demo: out: {tmp_path} is in use by another run, process")


def test_runs_one_after_the_other_in_one_process_and_after_an_error_have_the_folder(tmp_path, monkeypatch):
    run(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="already holds a run"):
        run(tmp_path)
    monkeypatch.setattr("fastris.training.loop.train_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, resume=True)
    monkeypatch.undo()
    assert not (tmp_path / LOCK).exists()
    assert run(tmp_path, resume=True, max_steps=2).step == 2
    assert not (tmp_path / LOCK).exists()


def test_run_that_fails_before_it_writes_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="batch_size"):
        run(tmp_path / "a" / "b", batch_size=400, limit_train=1)
    assert not (tmp_path / "a").exists()


HOLDER = """
import os, sys, time
from pathlib import Path
from fastris.runtime.runlock import locked
with locked(Path(sys.argv[1]), ("out",)):
    if not os.fork():
        print(os.getpid(), flush=True)  # by now it has closed its copy of the lock
    time.sleep(60)
"""


def test_lock_ends_at_once_with_a_killed_process_though_its_workers_live(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match=f"process {holder.pid} on"), lock(tmp_path):
            pass
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # is alive
        with lock(tmp_path) as held:
            assert held and json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    finally:
        os.kill(worker, 9)
        holder.stdout.close()


def test_forked_process_that_leaves_the_block_does_not_end_the_lock(tmp_path):
    with lock(tmp_path):
        if not (child := os.fork()):
            code = 1
            try:
                with pytest.raises(ValueError, match="in use"), lock(tmp_path):
                    pass
                raise KeyError  # through the finally clause of the block
            except KeyError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(ValueError, match="in use"), lock(tmp_path):
            pass


def leave_in_child(folder: Path) -> None:
    with lock(folder):
        if not os.fork():
            raise KeyError
        os.wait()
        assert (folder / LOCK).exists()


def test_lock_file_stays_where_a_forked_process_unwinds(tmp_path):
    parent = os.getpid()
    try:
        leave_in_child(tmp_path)
    except KeyError:
        if os.getpid() != parent:
            os._exit(0)
        raise


def test_threads_never_have_it_at_the_same_time(tmp_path):
    inside, most, turns = 0, 0, []

    def take(number: int) -> None:
        nonlocal inside, most
        for _ in range(15):
            with lock(tmp_path / "run", patience=30):
                inside += 1
                most = max(most, inside)
                turns.append(number)
                inside -= 1

    threads = [threading.Thread(target=take, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and len(turns) == 45
    assert not list(tmp_path.glob("run/*"))  # the folder stays where another took the lock before its maker removed it


def test_patience_waits_for_the_lock(tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock(tmp_path):
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(10)
    threading.Timer(0.3, leave.set).start()
    with lock(tmp_path, patience=20):
        assert not holder.is_alive() or leave.is_set()
    holder.join()


def test_file_system_without_locks_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch):
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):

        def refuse(*args, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)
        folder = tmp_path / str(number)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if number == errno.ENOLCK:
                assert run(folder, max_steps=1).step == 1
            else:
                with lock(folder) as held:
                    assert not held
        told = [str(warning.message) for warning in told if "lock" in str(warning.message)]
        assert len(told) == 1 and os.strerror(number) in told[0] and "output_folder" in told[0]
        assert not (folder / LOCK).exists()


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"[" * 900, b'{"process": "\\u001b[2J", "host": 1, "since": 2}'])
def test_what_is_in_a_lock_file_that_was_left_or_tampered_with_means_nothing(tmp_path, content, monkeypatch):
    (tmp_path / LOCK).write_bytes(content)
    with lock(tmp_path) as held:
        assert held
        (tmp_path / LOCK).write_bytes(content)
        ticks = itertools.count()  # of a clock that goes on by 0.1 s whenever it is read
        clock = SimpleNamespace(monotonic=lambda: next(ticks) / 10, sleep=lambda seconds: None)
        monkeypatch.setattr("fastris.runtime.runlock.time", clock)
        told = "in use by another run, a process that did not say which it is; let"
        with pytest.raises(ValueError, match=told), lock(tmp_path):
            pass
        assert clock.monotonic() < 5


def test_lock_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError), lock(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("resume", ["auto", None])
def test_what_killed_runs_left_half_written_is_gone_when_the_next_one_starts(tmp_path, resume):
    names = ("last.pth", "previous.pth", "best.pth", "log.csv", "val.csv", "config.yaml", "README.md")
    for name in names:
        (tmp_path / f".{name}.0123456789ab.tmp").write_bytes(b"half")
    others = (".model.pth.0123456789ab.tmp", ".last.pth", "notes.tmp")
    for name in others:
        (tmp_path / name).write_bytes(b"not of a run")
    run(tmp_path, max_steps=1, resume=resume)
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set(others) - {"notes.tmp"}
