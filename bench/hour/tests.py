"""Step 2: the tests of the kernels and those that need a GPU, a file at a time; without pytest, the benchmarks' checks.

A file is a process of its own: an illegal memory access, after which nothing more runs in its process, costs one file.
Where it happens, every other test of the file that failed is tried once more by itself. On a CPU the kernels of one
small file run under Triton's interpreter, and the tests that need a GPU say why they are skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastris.runtime.float32_precision import ieee_float32

from ..cases.arms import ARMS
from ..timing.check import Checker
from . import record
from .problems import KERNEL_CASES, OPERATOR_CASES, Place, Skip, case_named, missing, usable

TESTS = record.TOP / "tests"
CONTRACT = "tests/ops/test_contract.py"
SMALL = "tests/kernels/test_contrastive_triton.py"
OUTCOMES = "PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS"
ALONE = re.compile(rf"^(tests/\S+\.py::.*?) ({OUTCOMES})\b", re.MULTILINE)
IN_PARTS = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({OUTCOMES}) (tests/\S+\.py::.*?) *$", re.MULTILINE)
POISON = ("CUDA error", "illegal memory access", "device-side assert", "misaligned address", "launch failure")
MOST_RETRIES = 30
MOST_PROCESSES = 6
SILENCE = 150.0
"""Seconds without a line from pytest after which a test counts as hanging."""


def items(place: Place) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    with_pytest = (TESTS / "kernels").is_dir() and not missing("pytest")
    if with_pytest and place.is_gpu:
        yield from files_to_test(place)
    yield from checks(place)
    if not with_pytest:
        yield "pytest", without_pytest
    elif not place.is_gpu:
        yield from files_to_show(place)


def checks(place: Place) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every path of every operator with kernels against float64, as before any timing."""
    names = OPERATOR_CASES if place.is_gpu else KERNEL_CASES
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if place.is_gpu else (torch.float32,):
        for name in names:
            yield f"against float64: {name} {str(dtype).removeprefix('torch.')}", partial(check, place, name, dtype)


def without_pytest() -> dict[str, Any]:
    why = f"{missing('pytest')} is missing" if missing("pytest") else "the tests are not installed; use a checkout"
    raise Skip(f"{why}; operators are held against float64 all the same")


def files_to_test(place: Place) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The kernels' own tests, their contract, then every other file with a test that needs a GPU."""
    kernels = sorted(f"tests/kernels/{path.name}" for path in (TESTS / "kernels").glob("test_*_triton.py"))
    for file in kernels:
        yield file, partial(run_file, place, file, ["-m", "not long", *in_parts()])
    yield CONTRACT, partial(run_file, place, CONTRACT, ["-k", "triton", "-m", "not long", *in_parts()])
    for file in marked_files():
        if file not in kernels:
            yield f"{file} -m gpu", partial(run_file, place, file, ["-m", "gpu"])


def files_to_show(place: Place) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield f"{SMALL}, interpreted", partial(run_file, place, SMALL, ["-m", "not slow"])
    for file in marked_files()[:1]:
        yield f"{file} -m gpu", partial(run_file, place, file, ["-m", "gpu"])


def marked_files() -> list[str]:
    """Files with tests that are marked as needing a GPU, those of the kernels and operators first."""
    files = [str(path.relative_to(record.TOP)) for path in sorted(TESTS.rglob("test_*.py")) if is_marked(path)]
    return sorted(
        files, key=lambda file: (not file.startswith("tests/kernels"), not file.startswith("tests/ops"), file)
    )


def is_marked(path: Path) -> bool:
    return "pytest.mark.gpu" in path.read_text(encoding="utf-8")


def run_file(place: Place, file: str, chosen: list[str]) -> dict[str, Any]:
    """How the tests of one file ended. Raises Skip where the file cannot be read, or all of it is skipped."""
    printed, code = pytest(place, [file, *chosen])
    found = outcomes(printed)
    failed = [name for name, outcome in found.items() if outcome in ("FAILED", "ERROR")]
    if failed and any(sign in printed for sign in POISON):
        failed = still_failing(place, failed, found)
    counts = {outcome.lower(): list(found.values()).count(outcome) for outcome in sorted(set(found.values()))}
    result: dict[str, Any] = {"tests": counts, "failed": failed}
    if place.left <= 0:
        return {**result, "status": "cut", "why": f"{len(found)} tests done, {len(failed)} failed"}
    absent = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", printed)
    if absent and not found:
        raise Skip(f"{absent[1]} is missing, which {file} needs")
    if failed or code not in (0, 5):  # 5: nothing was chosen, as where only slow tests are marked
        some = "; ".join(failed[:5]) or " ".join(printed.strip().splitlines()[-1:])
        return {**result, "status": "failed", "why": f"{len(failed)} of {len(found)} failed: {some}"}
    if found and set(found.values()) == {"SKIPPED"}:
        reason = re.search(r"^SKIPPED \[\d+\] \S+: (.*)$", printed, re.MULTILINE)
        raise Skip(reason[1] if reason else "every test of it is skipped here")
    return result


def outcomes(printed: str) -> dict[str, str]:
    """Test -> outcome, from what pytest -v prints, in one process or in several."""
    return {**dict(ALONE.findall(printed)), **{name: outcome for outcome, name in IN_PARTS.findall(printed)}}


def in_parts() -> list[str]:
    """Options that share a file's tests out to several processes: most of their time goes into compiling kernels."""
    processes = min(MOST_PROCESSES, (os.cpu_count() or 1) // 2)
    return [] if missing("xdist") or processes < 2 else ["-n", str(processes)]


def still_failing(place: Place, failed: list[str], found: dict[str, str]) -> list[str]:
    """Those of ``failed`` that fail alone, too: after an illegal access all that follow fail. Corrects ``found``."""
    for name in failed[1:MOST_RETRIES]:
        if place.left < 0:
            break
        printed, code = pytest(place, [name])
        if code == 0:
            found[name] = outcomes(printed).get(name, "PASSED")
    return [name for name in failed if found[name] in ("FAILED", "ERROR")]


def pytest(place: Place, arguments: list[str]) -> tuple[str, int]:
    """Run pytest until the time is up or a test hangs: its output, which is printed as well, and its exit code."""
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="]
    extra = {} if place.is_gpu else {"TRITON_INTERPRET": "1"}
    done = subprocess.Popen(
        [*command, *arguments],
        cwd=record.TOP,
        env={**os.environ, **extra},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    timer = _started(place, done)
    try:
        for line in done.stdout or ():
            print(line, end="")
            lines.append(line)
            timer.cancel()
            timer = _started(place, done)
        code = done.wait()
    finally:
        timer.cancel()
    if code < 0 and place.left > 0:
        lines.append(f"ended by signal {-code}: a crash, or no test ended within {SILENCE:.0f} s\n")
    return "".join(lines), code


def _started(place: Place, process: subprocess.Popen[str]) -> threading.Timer:
    """A timer that ends the process when the time is up, or when it has printed nothing for long."""
    timer = threading.Timer(min(SILENCE, max(0.0, place.left)), process.kill)
    timer.start()
    return timer


def check(place: Place, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Hold every path against float64 on a small copy, as before any timing. Raises WrongNumbersError."""
    case = case_named(name)
    arms, obstacles = usable(("torch", "triton"), place, dtype)
    with ieee_float32():
        checker = Checker(case.check_problem(quick=True).to(place.device, dtype), case.composed)
        checked = {arm.name: vars(checker.check(arm)) for arm in arms}
    return place.labelled({"checked": checked, "not_run": obstacles, "reference": ARMS["reference"].name})
