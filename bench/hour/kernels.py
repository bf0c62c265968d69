"""Step 4: every operator with kernels, and the parts made of them, by graph replay: repaired, torch, Triton, compiled.

An arm is held against float64 before it is timed, once for all batches; on a CPU on a small copy. All arms of an item
take turns. A time is that of the forward pass of a training step, or of forward and backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fastris.runtime.float32_precision import ieee_float32
from fastris.runtime.graph_timing import buffers_needed, time_rivals

from ..cases.arms import Arm, compiled_or_failed
from ..cases.table import Case
from ..timing.check import Checker
from ..timing.harness import Cell, Step, failures_into, release
from ..timing.roofline import count_bytes
from .problems import MAX_AUTOTUNE, OPERATOR_CASES, Place, Skip, batches, case_named, sized, usable

BATCHES = (16, 64, 4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EAGER = ("repaired", "torch", "triton")
MOST_COPIES = 8
"""Sets of buffers that calls rotate through, at most: more would take memory that batches of 64 need."""

MOST_COMPILED = 4
"""The same where arms are compiled, each copy perhaps anew; torch.compile makes 8 versions of a function at most."""

SECONDS = 0.3
"""How long each arm's rounds last."""


def items(place: Place) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    names = OPERATOR_CASES if place.is_gpu else OPERATOR_CASES[:1] + OPERATOR_CASES[3:4]
    for dtype in DTYPES if place.is_gpu else (torch.float32,):
        precision = str(dtype).removeprefix("torch.")
        for batch in batches(place, BATCHES):
            for name in names:
                key = f"{name} {precision} B={batch}"
                yield key, partial(measure, place, name, dtype, batch, EAGER)
        if dtype is torch.bfloat16:
            for name in names:
                key = f"{name} {precision} B={BATCHES[0]} compiled"
                yield key, partial(measure, place, name, dtype, BATCHES[0], ("repaired", "max_autotune"))


def measure(place: Place, name: str, dtype: torch.dtype, batch: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Each arm's seconds. Raises RuntimeError where an arm that runs here is wrong or fails."""
    case = case_named(name)
    arms, obstacles = usable(names, place, dtype)
    if [arm.name for arm in arms] == ["repaired"]:
        raise Skip("; ".join(f"{arm}: {why}" for arm, why in obstacles.items()))
    arms = [MAX_AUTOTUNE if arm.name == "max_autotune" else arm for arm in arms]
    cells = {arm.name: Cell(arm.name) for arm in arms}
    found: dict[str, Any] = {"case": name, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "arms": {}}
    with ieee_float32(), compiled_or_failed():
        for arm in arms:
            cells[arm.name].status, cells[arm.name].message = verdict(name, arm, place, dtype)
        right = [arm for arm in arms if not cells[arm.name].message]
        for timed in ("forward", "both"):
            for arm_name, timing in time_arms(case, right, place, dtype, batch, timed, cells).items():
                found["arms"].setdefault(arm_name, {})[timed] = timing
    torch.compiler.reset()
    release(place.device)
    wrong = {arm: {"status": cell.status, "why": cell.message} for arm, cell in cells.items() if cell.message}
    found |= {"not_run": obstacles, "wrong": wrong, "float32_products": "ieee"}
    if wrong:
        reasons = [f"{arm} {cell['status']}: {cell['why']}" for arm, cell in wrong.items()]
        found |= {"status": "failed", "why": "; ".join(reasons)}
    return place.labelled(found)


_verdicts: dict[tuple[str, str, torch.dtype], tuple[str, str]] = {}


def verdict(name: str, arm: Arm, place: Place, dtype: torch.dtype) -> tuple[str, str]:
    """The status of ``arm`` in a case, and what is wrong with its numbers: nothing if they hold."""
    key = name, arm.name, dtype
    if key not in _verdicts:
        cell = Cell(arm.name, "checked")
        with failures_into(cell):
            case = case_named(name)
            Checker(case.check_problem(quick=not place.is_gpu).to(place.device, dtype), case.composed).check(arm)
        torch.compiler.reset()
        _verdicts[key] = cell.status, cell.message
    return _verdicts[key]


def time_arms(
    case: Case, arms: list[Arm], place: Place, dtype: torch.dtype, batch: int, timed: str, cells: dict[str, Cell]
) -> dict[str, Any]:
    """Arm -> its timing, all in turns; one that fails is told in its cell, and the others are timed without it."""
    problem = sized(case, place, batch)
    copies = copies_needed(case, place, batch, dtype)
    if any(arm.compile is not None for arm in arms):
        copies = min(copies, MOST_COMPILED)
    problems = [problem.to(place.device, dtype, tuned=True) for _ in range(copies)]
    rivals = {}
    for arm in arms:
        with failures_into(cells[arm.name]):
            calls = [Step(problem, arm, timed) for problem in problems]
            calls[0]()  # an arm that fails fails here, and spoils no other's timing
            place.synchronize()
            rivals[arm.name] = calls
    if not rivals:
        return {}
    timings = time_rivals(rivals, place.device, seconds=SECONDS)
    return {name: {**dataclasses.asdict(timing), "copies": len(problems)} for name, timing in timings.items()}


def copies_needed(case: Case, place: Place, batch: int, dtype: torch.dtype) -> int:
    """How many sets of buffers keep the caches cold."""
    if not place.is_gpu:
        return 2
    return min(MOST_COPIES, buffers_needed(place.device, count_bytes(case.at_batch(batch), dtype)))
