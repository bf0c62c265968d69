"""``python -m bench``: check, time, count, and print a table."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench import machine, memory, report
from bench.arms import BASELINE, Arm, choose_arms
from bench.cases import Case, choose_cases
from bench.harness import Cell, Effort, Progress, measure_case
from fastris import CRISConfig
from fastris.config import describe, load_options, option
from fastris.optim import choose_device

QUICK = Effort(rounds=5, min_rounds=2, seconds=5.0)


@dataclass
class BenchConfig:
    """Checks every arm against float64, times the arms in turns, and prints medians and ratios.

    Ctrl-C keeps what was measured. The exit code is 1 when an arm was refused or failed.
    """

    op: tuple[str, ...] = option((), "operators or cases, and memory, e.g. --op decoder,memory; all if empty")
    arms: tuple[str, ...] = option((), f"arms to measure beside {BASELINE}; all that can run here if empty")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "precision; the lower two under autocast")
    threads: int | None = option(None, "CPU threads; PyTorch's choice if none")
    quick: bool = option(False, "few rounds, and checks on small copies")
    rounds: int = option(Effort.rounds, "rounds per case at most")
    seconds: float = option(Effort.seconds, f"no new round after this, but at least {Effort.min_rounds}", "s per case")
    json: Path | None = option(None, "file for every single timing; written after each case")

    def effort(self) -> Effort:
        asked = Effort(self.rounds, min(self.rounds, Effort.min_rounds), self.seconds)
        if not self.quick:
            return asked
        return Effort(*map(min, dataclasses.astuple(asked), dataclasses.astuple(QUICK)))


class Result:
    """What was found so far, kept on disk as it grows."""

    def __init__(self, config: BenchConfig, device: torch.device, arguments: list[str]):
        self.path = config.json
        self.content: dict[str, Any] = {
            "format": report.FORMAT,
            "command": ["python", "-m", "bench", *arguments],
            "complete": False,
            "machine": machine.describe(device),
            "settings": {"dtype": config.dtype, "quick": config.quick, **dataclasses.asdict(config.effort())},
            "cases": [],
            "memory": None,
        }

    def save(self) -> None:
        """Write the file as a whole, so that whoever reads it sees the old or the new one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.path)

    def troubles(self) -> bool:
        """Whether an arm was refused, failed or ran out of memory."""
        tables = [*self.content["cases"], *filter(None, [self.content["memory"]])]
        return any(cell["message"] for table in tables for cell in table["arms"].values())


def run(config: BenchConfig, arguments: list[str]) -> int:
    """Measure what ``config`` asks for. Raises ValueError for names and devices that do not exist."""
    device, dtype = choose_device(config.device), getattr(torch, config.dtype)
    cases, with_memory = choose_cases(config.op)
    arms = choose_arms(config.arms, device, dtype)
    for name, value in (("rounds", config.rounds), ("threads", config.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    result = Result(config, device, arguments)
    result.save()  # a file that cannot be written is better known now
    progress = ProgressLine(len(cases) + with_memory)
    code = 0
    try:
        for case in cases:
            progress.begin(case.name)
            _measure(case, arms, device, dtype, config, progress.show, result)
        if with_memory:
            progress.begin("memory")
            _count(arms, device, progress.show, result)
        result.content["complete"] = True
    except KeyboardInterrupt:
        code = 130
    progress.end()
    result.save()
    print(report.markdown(result.content))
    return code or int(result.troubles())


def _measure(
    case: Case,
    arms: list[Arm],
    device: torch.device,
    dtype: torch.dtype,
    config: BenchConfig,
    progress: Progress,
    result: Result,
) -> None:
    cells: dict[str, Cell] = {}
    try:
        measure_case(case, arms, device, dtype, config.effort(), config.quick, progress, cells)
    finally:
        entry = {
            "name": case.name,
            "op": case.op,
            "title": case.title,
            "sizes": dict(case.sizes),
            "passes": case.passes,
            "baseline": BASELINE,
            "goal": case.goals.get(f"{device.type}/{config.dtype}"),
            "arms": {name: dataclasses.asdict(cell) for name, cell in cells.items()},
        }
        result.content["cases"].append(entry)
        result.save()


def _count(arms: list[Arm], device: torch.device, progress: Progress, result: Result) -> None:
    cells: dict[str, memory.MemoryCell] = {}
    try:
        memory.count_memory(arms, device, progress, cells, CRISConfig.preset("cris_r50"))
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


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"usage: python -m bench [name=value ...]\n\n{inspect.getdoc(BenchConfig)}\n\n{describe(BenchConfig)}")
        return 0
    try:
        return run(load_options(BenchConfig, arguments), arguments)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
