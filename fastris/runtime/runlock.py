"""Lock a folder, so that only one run writes into it at a time.

The lock is `flock` on `run.lock` in the folder, which also names its holder. The system releases it when the process
ends, however it ends, so a `run.lock` that a killed process left behind has no effect. A forked process (such as a
worker that outlives a killed run by seconds) would keep the lock, so each one first closes what it has inherited.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOCK = "run.lock"
POLL = 0.1  # seconds between two tries

_held: set[int] = set()  # descriptors of the locks of this process


def _close_inherited() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def locked(folder: Path, options: Sequence[str], patience: float = 0.0) -> Iterator[bool]:
    """Lock `folder` for this block against other processes and threads; it is created if it is missing.

    Afterwards `run.lock` is removed, and so are the folders that were created, if nothing was written into them and no
    other run has locked them by then.

    Args:
        folder: the folder that the block writes into.
        options: the options that set the folder, for messages; the first one begins the message.
        patience: seconds to wait for another holder.

    Yields:
        whether it is locked; False, with a warning, on a file system without locks.

    Raises:
        ValueError: another process holds the lock; the message says which one, and since when.
        OSError: the lock file cannot be created.
    """
    folder, pid, made = folder.absolute(), os.getpid(), list[Path]()
    try:
        descriptor = _acquire(folder, options, patience, made)
        try:
            yield descriptor is not None
        finally:
            if os.getpid() == pid:  # a forked process that leaves this block has closed its copy
                _release(folder / LOCK, descriptor)
    finally:
        for place in reversed(made):
            with suppress(OSError):
                place.rmdir()


def _acquire(folder: Path, options: Sequence[str], patience: float, made: list[Path]) -> int | None:
    """The descriptor that holds the lock; None where there are no locks. Folders that are created go to `made`."""
    path, end = folder / LOCK, time.monotonic() + patience
    while True:
        descriptor = _open(path, made)
        try:
            reason = _try_lock(descriptor)
            if reason is None and _is_still_at(descriptor, path):
                _held.add(descriptor)
                _write_holder(descriptor)
                return descriptor
        except BaseException:
            _held.discard(descriptor)
            os.close(descriptor)
            raise
        os.close(descriptor)
        if isinstance(reason, str):
            warnings.warn(
                f"{options[0]}: files in {folder} cannot be locked ({reason}), so nothing keeps a second run out; "
                "make sure that there is none",
                stacklevel=5,
            )
            return None
        if reason is not None and time.monotonic() >= end:
            raise ValueError(
                f"{options[0]}: {folder} is in use by another run, {_holder(path)}; let it end or stop it first, or "
                f"choose another {' or '.join(options)}"
            )
        if reason is not None:
            time.sleep(POLL)


def _open(path: Path, made: list[Path], attempts: int = 100) -> int:
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    for attempt in range(1, attempts + 1):
        try:
            for place in reversed([place for place in path.parents if not place.exists()]):
                with suppress(FileExistsError):
                    place.mkdir()
                    made.append(place)
            return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except FileNotFoundError:  # another run has just ended, and removed its empty folder
            if attempt == attempts:
                raise
        except PermissionError:  # another user's file: reading is enough to see whether it is locked
            return os.open(path, os.O_RDONLY | flags)
    raise AssertionError


def _try_lock(descriptor: int) -> str | bool | None:
    """Try to lock: None if that succeeded, True if another process holds it, else why locks do not work here."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except (ImportError, OSError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def _is_still_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still at `path`: its last holder removes it, and another run may make a new one."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _release(path: Path, descriptor: int | None) -> None:
    if descriptor is None:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return
    if _is_still_at(descriptor, path):
        with suppress(OSError):
            path.unlink()  # while it is locked, so that no other run can own it
    _held.discard(descriptor)
    os.close(descriptor)


def _write_holder(descriptor: int) -> None:
    """Write into the lock file who holds it; a full disk is ignored, as the lock itself needs no space."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    line = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
    with suppress(OSError):
        os.pwrite(descriptor, line.encode(), 0)
        os.ftruncate(descriptor, len(line))


def _holder(path: Path) -> str:
    """The lock's holder, in words; waits up to 1 s for a holder that has not written it yet."""
    end = time.monotonic() + 1
    while (told := _read_holder(path)) is None and time.monotonic() < end:
        time.sleep(POLL / 4)
    return told or "a process that did not say which it is"


def _read_holder(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8") as file:
            told: Any = json.loads(file.readline(1000))
        process, host, since = (told[name] for name in ("process", "host", "since"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(process, int) or not re.fullmatch(r"[\w.-]{1,253}", str(host)):
        return None
    if not re.fullmatch(r"[\d :+-]{1,30}", str(since)):
        return None
    return f"process {process} on {host}, since {since}"
