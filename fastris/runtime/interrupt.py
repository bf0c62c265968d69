"""Handle Ctrl-C, SIGTERM and a closed terminal so that the current step can be finished first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


class StopSignal:
    """A context in which the first SIGINT or SIGTERM requests a stop, and the second raises KeyboardInterrupt.

    SIGHUP, which a closed terminal sends, requests a stop too, however often it comes (the system, the shell and
    `torchrun` may all send it); later output to that terminal is dropped. Under `nohup`, which ignores SIGHUP, it stays
    ignored.

    `requested` says whether to stop after the current step. Inside :meth:`at_once` even the first signal raises, for
    work that need not be finished. Outside Python's main thread, where signals cannot be caught, it does nothing.
    `message` is printed after the first signal, unless it is empty.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, message: str):
        self.requested = False
        self._message = message
        self._at_once = False
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
            ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            numbers = [number for number in self.SIGNALS if not (ignored and number == signal.SIGHUP)]
            self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this block a signal raises KeyboardInterrupt where it arrives."""
        self._at_once = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a worker process that has just been forked
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if number == signal.SIGHUP:
            self._leave_closed_terminals()
        if self._at_once or (self.requested and number != signal.SIGHUP):
            self.requested = True
            raise KeyboardInterrupt
        first, self.requested = not self.requested, True
        if self._message and first:
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{signal.Signals(number).name}: {self._message}\n".encode())  # print() is not reentrant

    def _leave_closed_terminals(self) -> None:
        """Redirect the descriptors of a closed terminal to /dev/null: writing to it would raise an error."""
        for descriptor in self._terminals:
            if not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


GRACE = 20  # seconds; torchrun and Slurm wait longer before they kill


def leave_signals_to_parent() -> None:
    """For worker processes: ignore the signals that ask the main process to stop.

    Ctrl-C, a closed terminal and `torchrun`'s SIGTERM reach workers too. After the first SIGTERM a worker lives for
    `GRACE` seconds more, so that the main process can finish its step; the second ends it at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(GRACE)
