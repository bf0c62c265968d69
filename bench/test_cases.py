"""The cases of ``fastris bench`` through pytest-benchmark, with its saving and comparing::

    python -m pytest bench --benchmark-only --benchmark-autosave
    python -m pytest bench --benchmark-only --benchmark-compare -k decoder

Arms are checked before they are timed, on the small copies, and the device is idle before and after every step. On a
CPU: the small copies, in float32, without compiled arms. On a GPU: the real sizes, in float32 and bfloat16.
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
DEVICE = choose_device("auto")
ON_CPU = DEVICE.type == "cpu"


def parameters() -> list[Any]:
    """One parameter set for every case, precision and arm."""
    return [
        pytest.param(case, arm, dtype, id=f"{case.name}-{arm.name}" + ("" if ON_CPU else f"-{str(dtype)[6:]}"))
        for dtype in ((torch.float32,) if ON_CPU else (torch.float32, torch.bfloat16))
        for case in CASES
        for arm in choose_arms((), DEVICE, dtype)
        if not (ON_CPU and arm.compile is not None)
    ]


@pytest.mark.parametrize(("case", "arm", "dtype"), parameters())
def test_case(benchmark: Any, case: Case, arm: Arm, dtype: torch.dtype) -> None:
    with compiled_or_failed() if arm.compile is not None else nullcontext():
        Checker(case.check_problem(quick=True).to(DEVICE, dtype), case.composed).check(arm)
        forget_compiled(arm)
        step = Step(case.problem(**(case.small if ON_CPU else {})).to(DEVICE, dtype, arm.tuned), arm)

        def run() -> None:
            step()
            synchronize(DEVICE)

        run()
        benchmark.group = case.name
        benchmark.extra_info.update(device=str(DEVICE), dtype=str(dtype), small=ON_CPU, arm=arm.name)
        benchmark(run)
    forget_compiled(arm)
    release(DEVICE)
