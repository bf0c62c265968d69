"""Ctrl-C, and a terminal that is closed, that finish what is being done."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


class StopSignal:
    """A context in which the first SIGINT or SIGTERM asks to stop, and the second stops at once (KeyboardInterrupt).

    SIGHUP, which a terminal sends when it is closed, asks to stop as well, however often it comes (the system, the
    shell and `torchrun` may all send it); what is still to be printed to that terminal goes nowhere. Under `nohup`,
    where it is ignored, it stays so.

    `requested` says whether to stop after the current step. Inside :meth:`at_once` already the first signal raises, for
    work that need not be finished. Outside Python's main thread, where signals cannot be caught, it does nothing.
    `message` says what happens after the first signal; nothing is printed for an empty one.
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
            with suppress(OSError):  # nobody may read it any more
                os.write(2, f"\n{signal.Signals(number).name}: {self._message}\n".encode())  # print() may be under way

    def _leave_closed_terminals(self) -> None:
        """Point the descriptors of a terminal that is no more to nowhere: writing to it would be an error."""
        for descriptor in self._terminals:
            if not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


GRACE = 20  # seconds, fewer than torchrun and Slurm wait before they kill


def leave_signals_to_parent() -> None:
    """For worker processes: when to stop is the main process's decision.

    Ctrl-C in a terminal, its end, and `torchrun`'s SIGTERM reach them too. The first SIGTERM leaves the main process
    time to finish its step with their help; the second ends a worker at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(GRACE)
