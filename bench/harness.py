"""Rounds of timing: arms take turns, an arm that is wrong is never timed, and one that fails spoils no other."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.arms import Arm
from bench.cases import Case
from bench.check import Checker, WrongNumbersError
from bench.problem import Problem

Progress = Callable[[str], None]

SAMPLE_SECONDS = 0.02
"""A step shorter than this is repeated within one sample until the sample is about as long."""

MAX_REPEATS = 50

LONG_SECONDS = 2.0
"""A step longer than this is warm after one."""


@dataclass(frozen=True)
class Effort:
    """How long to measure one case: up to ``rounds`` rounds, of which those after ``min_rounds`` end at ``seconds``."""

    rounds: int = 20
    min_rounds: int = 5
    seconds: float = 120.0


@dataclass
class Outcome:
    """What became of one arm in one case.

    ``status`` is measured, refused (wrong numbers), out of memory or failed; or, where Ctrl-C came first, checked
    (right numbers, not timed) or not reached.
    ``message`` says what went wrong.
    """

    arm: str
    status: str = "not reached"
    message: str = ""


@dataclass
class Cell(Outcome):
    """One arm's timing in one case.

    ``ms`` holds the time of one step in milliseconds for every round in order, each the mean of ``repeats`` steps;
    ``checked`` is what the check before the timing found.
    """

    checked: dict[str, Any] = field(default_factory=dict)
    repeats: int = 1
    ms: list[float] = field(default_factory=list)


def measure_case(
    case: Case,
    arms: list[Arm],
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    quick: bool,
    progress: Progress,
    cells: dict[str, Cell],
) -> None:
    """Check every arm of ``case``, then time those that passed. Fills ``cells``, which Ctrl-C leaves as they are."""
    cells.update({arm.name: Cell(arm.name) for arm in arms})
    checker = None
    for arm in arms:
        progress(f"checking {arm.name}")
        with failures_into(cells[arm.name]):
            checker = checker or Checker(case.check_problem(quick).to(device, dtype), case.composed)
            cells[arm.name].checked = vars(checker.check(arm))
            cells[arm.name].status = "checked"
    del checker
    passed = [arm for arm in arms if cells[arm.name].status == "checked"]
    steps = _prepared_steps(case, passed, device, dtype, cells, progress)
    take_turns(steps, cells, effort, lambda: _synchronize(device), progress)
    release(device)


def _prepared_steps(
    case: Case,
    arms: Iterable[Arm],
    device: torch.device,
    dtype: torch.dtype,
    cells: Mapping[str, Cell],
    progress: Progress,
) -> dict[str, Callable[[], None]]:
    """Each arm's step on one shared problem, warmed up, with the number of repeats that its length asks for."""
    steps: dict[str, Callable[[], None]] = {}
    problem = None
    for arm in arms:
        progress(f"warming up {arm.name}")
        with failures_into(cells[arm.name]):
            problem = problem or case.problem().to(device, dtype)
            step = _step(problem, arm)
            seconds = timed(step, 1, lambda: _synchronize(device))
            if seconds < LONG_SECONDS:
                seconds = timed(step, 1, lambda: _synchronize(device))
            cells[arm.name].repeats = max(1, min(MAX_REPEATS, round(SAMPLE_SECONDS / seconds)))
            steps[arm.name] = step
    return steps


def _step(problem: Problem, arm: Arm) -> Callable[[], None]:
    module = arm.prepare(problem.module)

    def step() -> None:
        with arm.active():
            problem.step(module)

    return step


def take_turns(
    steps: Mapping[str, Callable[[], None]],
    cells: Mapping[str, Cell],
    effort: Effort,
    synchronize: Callable[[], None],
    progress: Progress,
) -> None:
    """Time one sample of every step per round; each round begins with another step, so that any may follow any.

    A step that fails leaves the rounds, and its cell keeps the status.
    """
    running = list(steps)
    begin = time.perf_counter()
    for number in range(effort.rounds):
        if not running or (number >= effort.min_rounds and time.perf_counter() - begin > effort.seconds):
            break
        progress(f"round {number + 1} of at most {effort.rounds}")
        for name in order_of_round(running, number):
            cell = cells[name]
            with failures_into(cell):
                cell.ms.append(1000 * timed(steps[name], cell.repeats, synchronize))
                cell.status = "measured"
        running = [name for name in running if cells[name].status == "measured"]


def order_of_round(names: list[str], number: int) -> list[str]:
    """``names`` rotated by ``number``."""
    shift = number % len(names)
    return names[shift:] + names[:shift]


def timed(step: Callable[[], None], repeats: int, synchronize: Callable[[], None]) -> float:
    """Seconds per step, from an idle device to an idle device."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize()
    return (time.perf_counter() - begin) / repeats


@contextmanager
def failures_into(cell: Outcome) -> Iterator[None]:
    """A block whose failure is written into a cell instead of ending the run. Ctrl-C passes through."""
    try:
        yield
    except Exception as error:
        cell.message = " ".join(f"{error}".split())[:500]
        if isinstance(error, WrongNumbersError):
            cell.status = "refused"
        elif is_out_of_memory(error):
            cell.status = "out of memory"
        else:
            cell.status = "failed"
            cell.message = f"{type(error).__name__}: {cell.message}"
    else:
        return
    release()


def is_out_of_memory(error: BaseException) -> bool:
    """On a CPU, PyTorch's allocator says it in the text of a RuntimeError."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def release(device: torch.device | None = None) -> None:
    """Give memory of finished work back, so that the next case finds it."""
    gc.collect()
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
