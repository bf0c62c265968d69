"""Rounds of timing: arms take turns, an arm that is wrong is never timed, and one that fails spoils no other."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from ..cases.arms import Arm, compiled_or_failed
from ..cases.problem import Problem
from ..cases.table import Case
from ..counter import saved_storages
from ..options import Effort
from .check import Checker, WrongNumbersError
from .tracing import write_trace

Progress = Callable[[str], None]

SAMPLE_SECONDS = 0.02
"""A step shorter than this is repeated within one sample until the sample is about as long."""

MAX_REPEATS = 50


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
    ``checked`` is what the check before the timing found. ``peak_bytes`` is the most memory that a step took beyond
    what was allocated before it, where the device tells (CUDA); ``kept_bytes`` what its forward pass kept for the
    backward pass, parameters and buffers not counted; ``flops`` the operations of its path; ``share`` the least time
    that the case could take over the median: see bench/timing/roofline.py. None where it is not known.
    """

    checked: dict[str, Any] = field(default_factory=dict)
    repeats: int = 1
    ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    flops: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class Setting:
    """How cases are measured: where, in which precision, for how long, and whom to tell.

    ``quick`` checks on small copies. ``profile`` is the folder for traces, if any: see bench/timing/tracing.py.
    """

    device: torch.device
    dtype: torch.dtype
    effort: Effort
    quick: bool = False
    profile: Path | None = None
    progress: Progress = lambda text: None

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        synchronize(self.device)


def measure_case(case: Case, arms: Sequence[Arm], setting: Setting, cells: dict[str, Cell]) -> None:
    """Check every arm of ``case``, then time those that passed. Fills ``cells``, which Ctrl-C leaves as they are."""
    cells.update({arm.name: Cell(arm.name) for arm in arms})
    with compiled_or_failed() if any(arm.compile is not None for arm in arms) else nullcontext():
        _check_and_time(case, arms, setting, cells)
    release(setting.device)


def _check_and_time(case: Case, arms: Sequence[Arm], setting: Setting, cells: dict[str, Cell]) -> None:
    checker = None
    for arm in arms:
        setting.progress(f"checking {arm.name}")
        with failures_into(cells[arm.name]):
            checker = checker or Checker(
                case.check_problem(setting.quick).to(setting.device, setting.dtype), case.composed
            )
            cells[arm.name].checked = vars(checker.check(arm))
            cells[arm.name].status = "checked"
        forget_compiled(arm)
    del checker
    steps = _prepared_steps(case, [arm for arm in arms if cells[arm.name].status == "checked"], setting, cells)
    take_turns(steps, cells, setting.effort, setting.synchronize, setting.progress)
    if setting.profile is not None:
        for name in [name for name in steps if cells[name].status == "measured"]:
            setting.progress(f"tracing {name}")
            step, file = steps[name], f"{case.name}-B{case.sizes['batch']}-{case.timed}-{name}.json.gz"
            write_trace(step, setting.profile / file, step.problem.module if step.arm.compile is None else None)
    steps.clear()
    for arm in arms:
        forget_compiled(arm)


def forget_compiled(arm: Arm) -> None:
    """Compiled code is kept per function and not per module: the next case would find too much of it and give up."""
    if arm.compile is not None:
        torch.compiler.reset()


class Step:
    """One arm's timed piece of work on one problem; ``set_up`` is called before it, off the clock.

    Forward alone is a training step's: it keeps what backward needs. Backward alone is timed behind a forward pass of
    its own, on an idle device, so that it contains the latency of its first kernel, and the two alone may add up to
    more than both together; the difference of two timings would carry the noise of both.
    """

    def __init__(self, problem: Problem, arm: Arm, timed: str = "both"):
        self.arm, self.timed = arm, timed
        self.problem, self.runnable = arm.prepare(problem)
        self._outputs: tuple[torch.Tensor, ...] = ()

    @property
    def set_up(self) -> Callable[[], None] | None:
        return self._forward if self.timed == "backward" else None

    def __call__(self) -> None:
        if self.timed == "backward":
            outputs, self._outputs = self._outputs, ()
            with self.arm.active(new_step=False):
                self.problem.backward(outputs)
        elif self.timed == "forward" and self.problem.training:
            self._forward()
            self._outputs = ()
        else:
            with self.arm.active():
                self.problem.step(self.runnable)

    def _forward(self) -> None:
        with self.arm.active(), record_function("forward"):
            self._outputs = self.problem.training_forward(self.runnable)


def _prepared_steps(case: Case, arms: Iterable[Arm], setting: Setting, cells: Mapping[str, Cell]) -> dict[str, Step]:
    """Each arm's step, warmed up, with the number of repeats that its length asks for.

    Arms share a problem, and so its parameters, unless one is tuned and the other is not. They warm up in turns, as
    they are timed: memory that one arm leaves must fit the next.
    """
    steps: dict[str, Step] = {}
    problems: dict[bool, Problem] = {}
    for arm in arms:
        setting.progress(f"warming up {arm.name}")
        cell = cells[arm.name]
        with failures_into(cell):
            if arm.tuned not in problems:
                problems[arm.tuned] = case.problem().to(setting.device, setting.dtype, arm.tuned)
            step = Step(problems[arm.tuned], arm, case.timed)
            timed(step, 1, setting.synchronize)
            cell.kept_bytes = kept_bytes(step)
            steps[arm.name] = step
    warm = {}
    for name, step in steps.items():
        setting.progress(f"warming up {name} again")
        cell = cells[name]
        with failures_into(cell):
            seconds = timed(step, 1, setting.synchronize)
            cell.peak_bytes = peak_bytes(step, setting.device)
            cell.repeats = max(1, min(MAX_REPEATS, round(SAMPLE_SECONDS / seconds)))
            warm[name] = step
    return warm


def kept_bytes(step: Step) -> int | None:
    """Bytes that a forward pass keeps for the backward pass, every storage whole and once, without what stays anyway.

    None where there is no backward pass.
    """
    problem = step.problem
    if not problem.training:
        return None
    resident = (*problem.module.parameters(), *problem.module.buffers())
    with saved_storages(resident) as saved, step.arm.active():
        problem.training_forward(step.runnable)
    return sum(saved.values())


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """The most memory that a step takes beyond what is allocated before it; None where the device does not tell."""
    if device.type != "cuda":
        return None
    if step.set_up is not None:
        step.set_up()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


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


def timed(step: Callable[[], object], repeats: int, synchronize: Callable[[], None]) -> float:
    """Seconds per step, from an idle device to an idle device; what a :class:`Step` sets up before it is not timed."""
    set_up = getattr(step, "set_up", None)
    seconds, at_once = 0.0, repeats if set_up is None else 1
    for _ in range(repeats // at_once):
        if set_up is not None:
            set_up()
        synchronize()
        begin = time.perf_counter()
        for _ in range(at_once):
            step()
        synchronize()
        seconds += time.perf_counter() - begin
    return seconds / repeats


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


def case_entry(case: Case, baseline: str, cells: Mapping[str, Cell]) -> dict[str, Any]:
    """What a result file holds of one case."""
    return {
        "name": case.name,
        "op": case.op,
        "title": case.title,
        "sizes": dict(case.sizes),
        "passes": case.passes,
        "baseline": baseline,
        "goal": None,
        "arms": {name: asdict(cell) for name, cell in cells.items()},
    }


def release(device: torch.device | None = None) -> None:
    """Give memory of finished work back, so that the next case finds it."""
    gc.collect()
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
