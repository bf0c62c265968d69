"""The cases of ``fastris bench`` through pytest-benchmark, with its saving and comparing::

    python -m pytest bench --benchmark-only --benchmark-autosave
    python -m pytest bench --benchmark-only --benchmark-compare -k decoder

Arms are checked before they are timed, on the small copies, and the device is idle before and after every step.
Sizes are the small copies on a CPU and the real ones elsewhere, unless ``--bench-sizes`` says otherwise.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fastris.runtime.device import choose_device

from .cases.arms import Arm, choose_arms, compiled_or_failed
from .cases.table import CASES, Case
from .timing.check import Checker
from .timing.harness import Step, forget_compiled, release, synchronize

pytest.importorskip("pytest_benchmark")


def parameters(config: pytest.Config) -> list[Any]:
    """One parameter set for every case and arm."""
    device, dtype = choose_device(config.getoption("--bench-device")), getattr(torch, config.getoption("--bench-dtype"))
    names = tuple(name for name in config.getoption("--bench-arms").split(",") if name)
    arms = choose_arms(names, device, dtype)
    if not names and device.type == "cpu":
        arms = [arm for arm in arms if arm.compile is None]
    sizes = config.getoption("--bench-sizes")
    small = sizes == "small" or (sizes == "auto" and device.type == "cpu")
    place = device, dtype, small
    return [pytest.param(case, arm, place, id=f"{case.name}-{arm.name}") for case in CASES for arm in arms]


def test_case(benchmark: Any, case: Case, arm: Arm, place: tuple[torch.device, torch.dtype, bool]) -> None:
    with compiled_or_failed() if arm.compile is not None else nullcontext():
        _check_and_time(benchmark, case, arm, place)


def _check_and_time(benchmark: Any, case: Case, arm: Arm, place: tuple[torch.device, torch.dtype, bool]) -> None:
    device, dtype, small = place
    Checker(case.check_problem(quick=True).to(device, dtype), case.composed).check(arm)
    forget_compiled(arm)
    problem = case.problem(**(case.small if small else {})).to(device, dtype, arm.tuned)
    step = Step(problem, arm)

    def run() -> None:
        step()
        synchronize(device)

    run()
    synchronize(device)
    benchmark.group = case.name
    benchmark.extra_info.update(device=str(device), dtype=str(dtype), small=small, arm=arm.name)
    benchmark(run)
    forget_compiled(arm)
    release(device)
