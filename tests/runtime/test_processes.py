"""What the processes of one command print when it fails before they have met."""

from __future__ import annotations

import pytest

from fastris.runtime import processes


@pytest.fixture
def waited(monkeypatch):
    seconds: list[float] = []
    monkeypatch.setattr(processes.time, "sleep", seconds.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    return seconds


def test_main_process_prints_at_once(waited, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    processes.report("train", "no such folder", ValueError())
    assert capsys.readouterr().err == "fastris train: no such folder\n" and waited == []


def test_another_process_leaves_the_main_one_time_to_print_and_then_tells_its_own_reason(waited, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    processes.report("train", "no such folder", ValueError())
    assert waited == [(processes.MAIN_TELLS_WITHIN, "")]  # nothing is printed before
    assert capsys.readouterr().err == "fastris train (process 1 of 2): no such folder\n"


def test_process_that_another_one_stopped_says_nothing(waited, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    processes.report("train", "", processes.StoppedElsewhere())
    assert capsys.readouterr().err == "" and waited == []
