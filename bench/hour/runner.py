"""Does the steps, each as a process of its own in a time box, and keeps what they found on disk as it grows."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from . import record, summary
from .boxed import Ended, run_boxed
from .plan import POISONED, STEPS, Step

TAIL = 6000
"""Characters of a step's output that results.json keeps; log.txt keeps up to :data:`LOG_BYTES` of each step."""

LOG_BYTES = 2**20
START = 10.0
"""Seconds of each box that are there for starting PyTorch, before the rest is shared out."""

MOST_STARTS = 8
"""A step whose process dies is started again to go on behind the item that killed it, so often at most."""

FINISHED = ("ok", "failed", "skipped")
"""A step of another status is gone on with at the next start."""


def run(out: Path, minutes: float, device: str, only: Sequence[str], again: Sequence[str]) -> int:
    """Do the steps that are not finished. Returns the exit code. Raises ValueError or OSError for what cannot begin."""
    with _termination_as_interrupt():
        try:
            hour = _begun(out, minutes, device, only, again)
        except KeyboardInterrupt:
            print("\nstopped before the first step", flush=True)
            return 130
        try:
            hour.take_up(again)
            hour.do([step for step in STEPS if not only or step.name in only], 60 * minutes)
            print("\n" + hour.save())
        except KeyboardInterrupt:
            hour.interrupted()
            return 130
    return int(any(entry["status"] == "failed" for entry in hour.content["steps"].values()))


def _begun(out: Path, minutes: float, device: str, only: Sequence[str], again: Sequence[str]) -> _Hour:
    """The folder as it is, with this start written down."""
    out.mkdir(parents=True, exist_ok=True)
    old = record.load(out)
    mark = record.fingerprint(record.probe(device))
    content = _content(out, old, mark)
    content["starts"].append({"date": record.now(), "minutes": minutes, "steps": list(only), "again": list(again)})
    for name in again:
        content["steps"].pop(name, None)
    hour = _Hour(out, content, mark, device)
    hour.save()  # a folder that cannot be written is better known now
    return hour


def _content(out: Path, old: dict[str, Any] | None, mark: dict[str, Any]) -> dict[str, Any]:
    """What results.json held as far as it is current; what is not goes to results.old.json."""
    if old is None:
        return record.new_content(mark)
    current = {name: entry for name, entry in old["steps"].items() if record.is_current(name, entry, mark)}
    stale = [name for name in old["steps"] if name not in current]
    if stale:
        record.write_json(out / record.OLD, old)
        print(f"code, versions or device changed: {', '.join(stale)} anew; what was there is in {record.OLD}")
    return {**old, "fingerprint": mark, "steps": current}


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM, as a machine that takes its time back sends it, ends the run as Ctrl-C does.

    Afterwards both signals mean what they meant before.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Hour:
    """A folder in which steps are done."""

    def __init__(self, out: Path, content: dict[str, Any], mark: dict[str, Any], device: str):
        self.out, self.content, self.mark, self.device = out, content, mark, device
        self.now = out / record.NOW
        self.log = out / record.LOG

    def save(self) -> str:
        """Write results and summary. Returns the summary."""
        self.content["updated"] = record.now()
        text = summary.markdown(self.content)
        record.write_json(self.out / record.RESULTS, self.content)
        record.write_text(self.out / record.SUMMARY, text)
        return text

    def take_up(self, again: Sequence[str]) -> None:
        """Keep what a step had when the start before was ended without a chance to write it down, but those ``again``.

        Here and below the page goes when results.json has it: whatever ends this process, one of them holds it.
        """
        left = record.read_json(self.now)
        if left and left["step"] not in again and record.is_current(left["step"], left, self.mark):
            self._keep(left["step"], left, "cut", "the start before was ended in the middle of it", 0.0)
            self.save()
        self.now.unlink(missing_ok=True)

    def do(self, steps: Sequence[Step], seconds: float) -> None:
        """Do what is not finished in ``seconds``: what a step leaves of its box goes to those after it."""
        end = time.monotonic() + seconds
        entries = self.content["steps"]
        waiting = [step for step in steps if entries.get(step.name, {}).get("status") not in FINISHED]
        for step in steps:
            if step not in waiting:
                print(f"{_number(step)} {step.title}: finished before ({entries[step.name]['status']})", flush=True)
        while waiting:
            left = end - time.monotonic()
            start = min(START, left / 2 / len(waiting))
            spare = left - start * len(waiting)
            box = start + spare * waiting[0].share / sum(step.share for step in waiting)
            self._do(waiting.pop(0), box)

    def interrupted(self) -> None:
        """Keep what the step under way has; Ctrl-C is heard no more."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        left = record.read_json(self.now)
        if left and self.content["steps"].get(left["step"], {}).get("status") not in FINISHED:
            self._keep(left["step"], left, "cut", "Ctrl-C", 0.0)
        self.save()
        self.now.unlink(missing_ok=True)
        print(f"\nstopped; {self.out / record.SUMMARY} has what was done. The same command goes on from there.")

    def _do(self, step: Step, box: float) -> None:
        print(f"{_number(step)} {step.title}: up to {box / 60:.1f} min ...", flush=True)
        before = self.content["steps"].get(step.name, {})
        page = {"step": step.name, "fingerprint": self.mark, "items": before.get("items", {}), "left_out": []}
        record.write_json(self.now, {**page, "item": None, "since": None, "skipped": ""})
        begin, printed = time.monotonic(), self.log.stat().st_size if self.log.exists() else 0
        ended = self._run(step, begin + box)
        seconds = time.monotonic() - begin
        left = record.read_json(self.now)
        status, why = _verdict(left, ended)
        self._keep(step.name, left, status, why, before.get("seconds", 0.0) + seconds, box)
        self.content["steps"][step.name]["tail"] = _shortened(self.log, printed)
        self.save()
        self.now.unlink(missing_ok=True)
        print(f"      {status} after {seconds:.0f} s" + (f": {why}" if why else ""), flush=True)

    def _run(self, step: Step, end: float) -> Ended:
        """Run the step's process; start it again behind an item that killed it or that hung."""
        ended = Ended("time box", 0)
        for _ in range(MOST_STARTS):
            left = end - time.monotonic()
            if left <= 0:
                return Ended("time box", 0)
            until = time.time() + left - max(1.0, 0.05 * left)  # the rest is there to write things down
            cache = self.out if step.tuned else self.out / "untuned"  # nobody writes there; nor is the user's read
            environment = record.environment(FASTRIS_CACHE_DIR=str(cache.absolute()), **step.environment)
            hangs = _Watch(self.now, step)
            ended = run_boxed(worker(step, self.out, self.device, until), self.log, left, hangs, environment)
            if ended.how == "time box" or ended == Ended("exit", 0) or not self._blame(ended):
                return ended
        return ended

    def _blame(self, ended: Ended) -> bool:
        """Write down that the item under way ended its process; False where there was none to blame."""
        page = record.read_json(self.now)
        if ended == Ended("exit", POISONED):  # the item has said so itself
            return True
        if not page["item"]:
            return False
        what = "hung, and was ended" if ended.how == "hang" else f"ended its process ({ended.text()})"
        entry = {"status": "failed", "why": what, "seconds": time.time() - page["since"]}
        page["items"][page["item"]] = entry
        record.write_json(self.now, {**page, "item": None, "since": None})
        return True

    def _keep(
        self, name: str, page: dict[str, Any], status: str, why: str, seconds: float, box: float | None = None
    ) -> None:
        left_out = [*([page["item"]] if page["item"] else []), *page["left_out"]]
        self.content["steps"][name] = {
            "status": status,
            "why": why,
            "date": record.now(),
            "seconds": round(seconds, 1),
            "box_seconds": None if box is None else round(box, 1),
            "fingerprint": page["fingerprint"],
            "items": page["items"],
            "left_out": left_out,
        }


def worker(step: Step, out: Path, device: str, until: float) -> list[str]:
    """The command of a step's process: see work.py."""
    return [sys.executable, "-m", f"{record.PACKAGE}.work", step.name, str(out), device, f"{until:.1f}"]


class _Watch:
    """Says when the item under way has taken longer than its patience."""

    def __init__(self, page: Path, step: Step):
        self.page, self.step, self.looked = page, step, 0.0

    def __call__(self) -> bool:
        if time.monotonic() - self.looked < 1.0:
            return False
        self.looked = time.monotonic()
        page = record.read_json(self.page)
        if not page or not page["item"]:
            return False
        return time.time() - page["since"] > self.step.patience_for(page["item"])


def _verdict(page: dict[str, Any], ended: Ended) -> tuple[str, str]:
    """(status, why) of a step."""
    items = page["items"].values()
    failed = [key for key, item in page["items"].items() if item["status"] == "failed"]
    cut = any(item["status"] == "cut" for item in items)
    if ended.how == "time box" or page["left_out"] or cut:
        under_way = f"; under way: {page['item']}" if page["item"] else ""
        return "cut", f"its time box was full with {len(items)} of its measurements on disk{under_way}"
    if ended != Ended("exit", 0):
        return "failed", f"its process ended with {ended.text()}; see the end of what it printed"
    if page["skipped"]:
        return "skipped", page["skipped"]
    if failed:
        return "failed", f"{len(failed)} of {len(items)}: {', '.join(failed[:3])}{', ...' if len(failed) > 3 else ''}"
    skipped = [key for key, item in page["items"].items() if item["status"] == "skipped"]
    if skipped and len(skipped) == len(items):
        return "skipped", page["items"][skipped[0]]["why"]
    return "ok", f"{len(skipped)} of {len(items)} skipped" if skipped else ""


def _shortened(log: Path, begin: int) -> str:
    """The end of what was printed since ``begin``; what is too long loses its middle in the file."""
    if not log.exists():
        return ""
    with log.open("r+b") as file:
        file.seek(begin)
        printed = file.read()
        if len(printed) > LOG_BYTES:
            half = LOG_BYTES // 2
            printed = printed[:half] + b"\n[... shortened ...]\n" + printed[-half:]
            file.seek(begin)
            file.write(printed)
            file.truncate()
    return printed.decode("utf-8", errors="replace")[-TAIL:]


def _number(step: Step) -> str:
    return f"[{STEPS.index(step) + 1}/{len(STEPS)}] {step.name}:"
