"""This process's rank in a distributed run, as `torchrun` sets it, and the reporting of errors. Imports no torch.

Communication between the processes is in :mod:`fastris.runtime.distributed`.
"""

from __future__ import annotations

import os
import sys
import time
from types import ModuleType

MAIN_TELLS_WITHIN = 20.0  # seconds: what the processes of one command may be apart before they have met


class StoppedElsewhere(RuntimeError):
    """Another process has ended the run; that process reports the reason."""


class LostProcess(RuntimeError):
    """Another process of the run has ended, or has not responded in time."""


def has_group() -> bool:
    """Whether a process group exists, through which the processes communicate."""
    return _group() is not None


def rank() -> int:
    """This process's number in the run, from 0; 0 if it runs alone."""
    group = _group()
    return group.get_rank() if group else int(os.environ["RANK"]) if _started_by_launcher() else 0


def world_size() -> int:
    """Number of processes of the run, over all machines."""
    group = _group()
    return group.get_world_size() if group else int(os.environ["WORLD_SIZE"]) if _started_by_launcher() else 1


def is_main() -> bool:
    """Whether this is the process that writes files, logs and prints."""
    return rank() == 0


def local_rank() -> int:
    """This process's number on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def local_world_size() -> int:
    """Number of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


def restarted() -> bool:
    """Whether `torchrun` has restarted this process (`--max-restarts`) after one on its machine had died."""
    return world_size() > 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def report(command: str, text: str, error: BaseException) -> None:
    """Print why a command failed, once for all processes, and record it for `torchrun`'s own report.

    Before the process group exists the main process prints: a wrong option fails in every process alike. The others
    wait for it, because `torchrun` ends all processes as soon as one has failed, also one that has not printed yet.
    One that is still there after `MAIN_TELLS_WITHIN` seconds has a reason of its own, and prints it.
    """
    if isinstance(error, StoppedElsewhere):
        return
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and world_size() > 1 and not isinstance(error, LostProcess):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    if not is_main() and not has_group():
        time.sleep(MAIN_TELLS_WITHIN)
    who = f" (process {rank()} of {world_size()})" if not is_main() else ""
    print(f"fastris {command}{who}: {text}", file=sys.stderr, flush=True)


def _started_by_launcher() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _group() -> ModuleType | None:
    """`torch.distributed` if a process group exists, else None. It is not imported: without it there is no group."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None
