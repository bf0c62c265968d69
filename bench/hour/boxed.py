"""One process in its time box: ended with all its children when the box is full, or when nothing moves any more."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL = 0.1  # seconds


@dataclass(frozen=True)
class Ended:
    """How a process ended. ``how``: "exit", "time box" or "hang"; ``code`` as subprocess gives it."""

    how: str
    code: int

    def text(self) -> str:
        """For people."""
        if self.how != "exit":
            return self.how
        if self.code >= 0:
            return f"exit code {self.code}"
        try:
            return f"signal {signal.Signals(-self.code).name}"
        except ValueError:
            return f"signal {-self.code}"


def run_boxed(
    command: Sequence[str],
    log: Path,
    seconds: float,
    hangs: Callable[[], bool] = lambda: False,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run ``command``, its output appended to ``log``, for at most ``seconds``, or until ``hangs()`` says yes.

    The process and everything that it has started are gone when this returns, or is left by an exception (Ctrl-C).
    """
    end = time.monotonic() + seconds
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the step
        )
    try:
        while process.poll() is None:
            if time.monotonic() > end:
                return _ended(process, "time box")
            if hangs():
                return _ended(process, "hang")
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
        return Ended("exit", process.returncode)
    finally:
        _ended(process, "")


def _ended(process: subprocess.Popen[bytes], how: str) -> Ended:
    """End the process with its session and its descendants, those in sessions of their own included."""
    family = descendants(process.pid) if process.poll() is None else []
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    for pid in family:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return Ended(how, process.wait())


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` has started and that still run, and theirs, as Linux lists them; [] elsewhere."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parent = int(entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found, waiting = [], [pid]
    while waiting:
        started = children.get(waiting.pop(), [])
        found += started
        waiting += started
    return found
