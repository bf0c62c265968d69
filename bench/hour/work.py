"""The process of a step: ``python -m bench.hour.work STEP FOLDER DEVICE UNTIL``. The runner starts it.

The module of the step's name beside this one has ``items(place)``, which gives (name, work) one by one; work returns
what it measured. Each item is on disk, in now.json, before the next one begins. Items that an earlier start has
measured are passed over, unless they were cut. Where ``items`` raises :class:`~bench.hour.problems.Skip` the whole step
is skipped, where an item does, that one.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from fastris.runtime.device import choose_device

from . import record
from .plan import POISONED
from .problems import Place, Skip


class Page:
    """now.json: the step's items so far, and the one under way."""

    def __init__(self, folder: Path):
        self.path = folder / record.NOW
        self.content: dict[str, Any] = record.read_json(self.path)
        self.items: dict[str, Any] = self.content["items"]

    def begin(self, key: str) -> None:
        self.content |= {"item": key, "since": time.time()}
        record.write_json(self.path, self.content)

    def end(self, key: str, entry: dict[str, Any]) -> None:
        self.items[key] = {**entry, "seconds": round(time.time() - self.content["since"], 2)}
        self.content |= {"item": None, "since": None}
        record.write_json(self.path, self.content)

    def leave_out(self, key: str) -> None:
        self.content["left_out"].append(key)
        record.write_json(self.path, self.content)

    def skip(self, why: str) -> None:
        self.content["skipped"] = why
        record.write_json(self.path, self.content)


def run(step: str, folder: Path, device: torch.device, seconds: float) -> int:
    """Do the items of ``step`` that are not on its page yet; those that would begin after ``seconds`` are left out."""
    page, end = Page(folder), time.monotonic() + seconds
    place = Place(device, folder, end, page.items)
    try:
        for key, work in importlib.import_module(f".{step}", __package__).items(place):
            if page.items.get(key, {"status": "cut"})["status"] != "cut":
                continue
            if time.monotonic() > end:
                page.leave_out(key)
                continue
            page.begin(key)
            print(f"--- {step}: {key}", flush=True)
            try:
                entry = {"status": "ok", **(work() or {})}
            except Skip as reason:
                entry = {"status": "skipped", "why": str(reason)}
            except Exception as error:
                traceback.print_exc(file=sys.stdout)
                entry = {"status": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
            page.end(key, entry)
            if is_poisoned(device):
                print("the CUDA context is unusable now: another process goes on", flush=True)
                return POISONED
    except Skip as reason:
        page.skip(str(reason))
    return 0


def is_poisoned(device: torch.device) -> bool:
    """Whether an earlier error (an illegal memory access, say) lets nothing more run in this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def follow(parent: int) -> None:
    """End this process, and what it started, as soon as its ``parent`` has gone: nobody would stop it any more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(step: str, folder: str, device: str, until: str) -> int:
    """``until``: seconds since the epoch from which no item begins."""
    if os.getsid(0) == os.getpid():
        follow(os.getppid())
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return run(step, Path(folder), chosen, float(until) - time.time())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
