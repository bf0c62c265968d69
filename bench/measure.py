"""``fastris bench``: check, time, count, and print tables."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from typing import Any

import torch

from fastris.runtime.device import choose_device

from . import memory
from .cases.arms import ARMS, Arm, choose_arms
from .cases.table import Case, choose_cases
from .options import BASELINE, PASSES, BenchConfig
from .report import compare, results, tables
from .timing.harness import Cell, Setting, case_entry, measure_case
from .timing.roofline import Ceilings, add_shares, count_work, measure_ceilings


def chosen_cases(config: BenchConfig) -> tuple[list[Case], bool]:
    """The cases at the batches and passes asked for, and whether memory is to be counted. What cannot be is warned of.

    Raises ValueError where nothing of an operator's name is left.
    """
    rows, with_memory = choose_cases(config.op)
    passes = [name for name in PASSES if name in config.passes]
    reasons = {}
    cases = []
    for row, name in ((row, name) for row in rows for name in passes):
        for batch in config.batch or (row.sizes["batch"],):
            try:
                case = row.of_pass(name).at_batch(batch)
            except ValueError as error:
                reasons[str(error)] = row.name
                continue
            if case not in cases:  # what only runs forward is whole with its forward pass
                cases.append(case)
    if rows and not cases:
        raise ValueError(next(iter(reasons)))
    for reason in reasons:
        warnings.warn(f"left out: {reason}", stacklevel=2)
    return cases, with_memory


class Result(results.ResultFile):
    """What was found so far, held to the best ceilings that were measured."""

    def __init__(self, config: BenchConfig, setting: Setting):
        settings = {"dtype": config.dtype, "quick": config.quick, **dataclasses.asdict(config.effort())}
        super().__init__(config.json, config.command(), setting.device, config.threads, settings, ceilings=None)
        self.ceilings: Ceilings | None = None

    def hold_to(self, ceilings: Ceilings) -> None:
        """Hold every timing to ``ceilings``, or to the best ones found before."""
        self.ceilings = ceilings.or_better(self.ceilings or ceilings)
        self.content["ceilings"] = dataclasses.asdict(self.ceilings)
        add_shares(self.content["cases"], self.ceilings)

    def add(self, case: Case, cells: dict[str, Cell], setting: Setting, work: dict[str, Any]) -> None:
        """Add a case's cells, with its goals, its work and what follows from both."""
        precision = str(setting.dtype).removeprefix("torch.")
        entry = case_entry(case, BASELINE, {name: cells[name] for name in ARMS if name in cells})
        entry |= {
            "goal": case.goals.get(f"{setting.device.type}/{precision}"),
            "goal_arms": [name for name in entry["arms"] if name != BASELINE and not name.startswith(results.OTHERS)],
            "targets": dict(case.targets) if (setting.device.type, precision) == ("cuda", "bfloat16") else {},
            "roofline": work,
        }
        self.content["cases"].append(entry | {"headline": results.headline(entry)})
        if self.ceilings is not None:
            add_shares(self.content["cases"], self.ceilings)
        self.save()


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
    with result.growing():
        for case in cases:
            progress.begin(f"{case.name}, B={case.sizes['batch']}" if config.batch else case.name)
            result.hold_to(measure_ceilings(device, dtype, setting.synchronize))  # best of all: it may be busy now
            _measure(case, arms, config, setting, result)
        if with_memory:
            progress.begin("memory")
            for found in memory.count_own(arms, device, progress.show):
                result.content["memory"] = found
                result.save()
    progress.end()
    print(tables.markdown(result.content))
    if cases:
        print("\n" + tables.details(result.content))
    slower = 0
    if older is not None:
        moved = compare.compare(older, result.content)
        print("\n" + moved.text())
        slower = int(moved.slower())
    return 130 if not result.content["complete"] else int(result.troubles()) or slower


def _measure(case: Case, arms: list[Arm], config: BenchConfig, setting: Setting, result: Result) -> None:
    """Time one case. Quick runs on a CPU leave out arms that compile long, unless these are asked for by name."""
    late = config.quick and case.compiles_long and setting.device.type == "cpu"
    left_out = [arm for arm in arms if late and arm.compile is not None and arm.name not in config.arms]
    try:
        work = count_work(case, setting.dtype)
    except Exception as error:  # a case that cannot be counted is timed all the same, and its entry says why
        work = {"error": f"{type(error).__name__}: {error}"[:500]}
    cells: dict[str, Cell] = {}
    try:
        measure_case(case, [arm for arm in arms if arm not in left_out], setting, cells)
    finally:
        for arm in left_out:
            why = f"compiling it takes long, and this is a quick run; --arms {arm.name} asks for it"
            cells[arm.name] = Cell(arm.name, results.LEFT_OUT, why)
        result.add(case, cells, setting, work)


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
