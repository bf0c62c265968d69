"""``fastris bench``: check, time, count, and print tables."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from typing import Any

import torch

from fastris import CRISConfig
from fastris.runtime.device import choose_device

from .cases.arms import ARMS, Arm, choose_arms
from .cases.table import Case, choose_cases
from .memory import whole as memory
from .options import BASELINE, PASSES, BenchConfig
from .report import compare, results, tables
from .timing import machine
from .timing.harness import Cell, Progress, Setting, case_entry, measure_case
from .timing.roofline import Ceilings, add_shares, count_work, measure_ceilings


def chosen_cases(config: BenchConfig) -> tuple[list[Case], bool]:
    """The cases at the batches and passes asked for, and whether memory is to be counted."""
    rows, with_memory = choose_cases(config.op)
    passes = [name for name in PASSES if name in config.passes]
    found = [row.of_pass(name) for row in rows for name in passes]
    cases = [case for case in found if case is not None]
    if rows and not cases:
        raise ValueError(f"{rows[0].name} has no {' or '.join(passes)} pass; choose passes=forward or passes=both")
    for row in rows:
        if row.name not in [case.name for case in cases]:
            warnings.warn(f"left out: {row.name} has no {' or '.join(passes)} pass", stacklevel=2)
    if not config.batch:
        return cases, with_memory
    chosen, reasons = [], []
    for case, batch in ((case, batch) for case in cases for batch in config.batch):
        try:
            chosen.append(case.at_batch(batch))
        except ValueError as error:
            reasons.append(str(error))
    if cases and not chosen:
        raise ValueError(reasons[0])
    for reason in dict.fromkeys(reasons):
        warnings.warn(f"left out: {reason}", stacklevel=2)
    return chosen, with_memory


class Result:
    """What was found so far, kept on disk as it grows."""

    def __init__(self, config: BenchConfig, setting: Setting):
        self.path = config.json
        self.ceilings: Ceilings | None = None
        self.content: dict[str, Any] = {
            "format": results.FORMAT,
            "command": config.command(),
            "complete": False,
            "machine": machine.prepare(setting.device, config.threads),
            "settings": {"dtype": config.dtype, "quick": config.quick, **dataclasses.asdict(config.effort())},
            "ceilings": None,
            "cases": [],
            "memory": None,
        }

    def save(self) -> None:
        """Write the file as a whole, so that whoever reads it sees the old or the new one."""
        if self.path is not None:
            results.save(self.path, self.content)

    def hold_to(self, ceilings: Ceilings) -> None:
        """Hold every timing to ``ceilings``, or to the best ones found before."""
        self.ceilings = ceilings.or_better(self.ceilings or ceilings)
        self.content["ceilings"] = dataclasses.asdict(self.ceilings)
        add_shares(self.content["cases"], self.ceilings)

    def troubles(self) -> bool:
        """Whether an arm was refused, failed or ran out of memory."""
        tables = [*self.content["cases"], *filter(None, [self.content["memory"]])]
        cells = [cell for table in tables for cell in table["arms"].values()]
        return any(cell["message"] and cell["status"] != results.LEFT_OUT for cell in cells)


def run(config: BenchConfig) -> int:
    """Measure what ``config`` asks for. Raises ValueError for names and devices that do not exist."""
    config.check()
    older = None if config.compare is None else compare.load_any(config.compare)
    device, dtype = choose_device(config.device), getattr(torch, config.dtype)
    cases, with_memory = chosen_cases(config)
    arms = choose_arms(config.arms, device, dtype)
    progress = ProgressLine(len(cases) + with_memory)
    if config.profile is not None:
        config.profile.mkdir(parents=True, exist_ok=True)
    setting = Setting(device, dtype, config.effort(), config.quick, config.profile, progress.show)
    result = Result(config, setting)
    result.save()  # a file that cannot be written is better known now
    code = 0
    try:
        for case in cases:
            progress.begin(f"{case.name}, B={case.sizes['batch']}" if config.batch else case.name)
            result.hold_to(measure_ceilings(device, dtype, setting.synchronize))  # best of all: it may be busy now
            _measure(case, arms, config, setting, result)
        if with_memory:
            progress.begin("memory")
            _count(arms, device, progress.show, result)
        result.content["complete"] = True
    except KeyboardInterrupt:
        code = 130
    progress.end()
    result.save()
    print(tables.markdown(result.content))
    if cases:
        print("\n" + tables.details(result.content))
    slower = _compare(older, result.content) if older is not None else 0
    return code or int(result.troubles()) or slower


def _measure(case: Case, arms: list[Arm], config: BenchConfig, setting: Setting, result: Result) -> None:
    cells: dict[str, Cell] = {}
    soon = [arm for arm in arms if not (config.quick and _is_late(case, arm, setting) and arm.name not in config.arms)]
    roofline = _work(case, setting)
    try:
        measure_case(case, soon, setting, cells)
    finally:
        for arm in arms:
            if arm not in soon:
                why = f"compiling it takes long, and this is a quick run; --arms {arm.name} asks for it"
                cells[arm.name] = Cell(arm.name, results.LEFT_OUT, why)
        result.content["cases"].append(_entry(case, cells, setting, roofline))
        if result.ceilings is not None:
            add_shares(result.content["cases"], result.ceilings)
        result.save()


def _is_late(case: Case, arm: Arm, setting: Setting) -> bool:
    return arm.compile is not None and case.compiles_long and setting.device.type == "cpu"


def _work(case: Case, setting: Setting) -> dict[str, Any]:
    """What a step has to do. A case that cannot be counted is timed all the same, and its entry says why."""
    try:
        return count_work(case, setting.dtype)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _entry(case: Case, cells: dict[str, Cell], setting: Setting, roofline: dict[str, Any]) -> dict[str, Any]:
    precision = str(setting.dtype).removeprefix("torch.")
    entry = case_entry(case, BASELINE, {name: cells[name] for name in ARMS if name in cells})
    entry |= {
        "goal": case.goals.get(f"{setting.device.type}/{precision}"),
        "goal_arms": [name for name in entry["arms"] if name != BASELINE and not name.startswith(results.OTHERS)],
        "targets": dict(case.targets) if (setting.device.type, precision) == ("cuda", "bfloat16") else {},
        "roofline": roofline,
    }
    return entry | {"headline": results.headline(entry)}


def _compare(older: dict[str, Any], newer: dict[str, Any]) -> int:
    found = compare.compare(older, newer)
    print("\n" + found.text())
    return int(found.slower())


def _count(arms: list[Arm], device: torch.device, progress: Progress, result: Result) -> None:
    cells: dict[str, memory.MemoryCell] = {}
    eager = [arm for arm in arms if arm.compile is None and not arm.repaired]
    try:
        memory.count_memory(eager, device, progress, cells, CRISConfig.preset("cris_r50"))
    finally:
        result.content["memory"] = {
            "title": memory.TITLE,
            "batch": memory.BATCH,
            "baseline": BASELINE,
            "goal": memory.GOAL,
            "arms": {name: dataclasses.asdict(cell) for name, cell in cells.items()},
        }
        result.save()


class ProgressLine:
    """One line on the terminal's error stream that says what is going on; where there is no terminal, a line a case."""

    def __init__(self, total: int):
        self.total, self.number, self.case = total, 0, ""
        self.live = sys.stderr.isatty()

    def begin(self, case: str) -> None:
        self.number, self.case = self.number + 1, case
        if not self.live:
            print(f"[{self.number}/{self.total}] {case}", file=sys.stderr, flush=True)

    def show(self, what: str) -> None:
        if self.live:
            text = f"[{self.number}/{self.total}] {self.case}: {what}"
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
