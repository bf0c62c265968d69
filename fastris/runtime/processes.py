"""Which of a run's processes this one is, as `torchrun` says it; and which of them tells an error. Knows no torch.

What the processes say to each other is :mod:`fastris.runtime.distributed`'s.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType


class StoppedElsewhere(RuntimeError):
    """Another process of the run has ended it, and says why."""


class LostProcess(RuntimeError):
    """Another process of the run has gone, or has not answered in time."""


def has_group() -> bool:
    """Whether the processes can talk to each other; false as long as nobody has imported PyTorch."""
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
    """Whether `torchrun` has started this process again (`--max-restarts`) after one on its machine had died."""
    return world_size() > 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def report(command: str, text: str, error: BaseException) -> None:
    """Tell the user, once for all processes, why a command failed; and tell `torchrun`, whose report names the cause.

    Before the processes have met, the main one speaks for all: an option that is wrong is wrong in each.
    """
    if isinstance(error, StoppedElsewhere):
        return
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and world_size() > 1 and not isinstance(error, LostProcess):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    if is_main() or has_group():
        who = f" (process {rank()} of {world_size()})" if not is_main() else ""
        print(f"fastris {command}{who}: {text}", file=sys.stderr, flush=True)


def _started_by_launcher() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _group() -> ModuleType | None:
    """`torch.distributed` where a group of processes has been made; that takes the module, so it is not imported."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None
