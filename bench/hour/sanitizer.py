"""Step 3: compute-sanitizer on tiny cases of every operator with kernels, where it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastris.runtime.device import choose_device

from ..cases.arms import ARMS
from .problems import KERNEL_CASES, Place, Skip, case_named

TOOLS = ("memcheck", "racecheck")
DTYPES = ("bfloat16", "float32", "float16")
FOUND = 86
"""Exit code of compute-sanitizer where it found something."""


def items(place: Place) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    if not place.is_gpu:
        raise Skip("compute-sanitizer needs a GPU")
    tool = find()
    if tool is None:
        raise Skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    for dtype in DTYPES:
        for which in TOOLS:
            yield f"{which} {dtype}", partial(sanitize, tool, which, dtype)


def find() -> str | None:
    """The path of compute-sanitizer, None where it is not installed."""
    places = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(place, "bin") for place in (*places, "/usr/local/cuda") if place]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(map(str, folders))
    )


def sanitize(tool: str, which: str, dtype: str) -> dict[str, Any]:
    """Forward and backward pass of every case by its kernels. Raises RuntimeError where the tool finds something."""
    command = [tool, "--tool", which, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command += [sys.executable, "-m", __package__ + ".sanitizer", dtype]
    # Memory straight from the driver: in PyTorch's pool an access past a tensor would hit its neighbour unseen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    return judge(done.returncode, done.stdout)


def judge(code: int, printed: str) -> dict[str, Any]:
    """What the tool said. Raises Skip where it cannot work on this device, RuntimeError where it found something."""
    said = re.findall(r"^=+ (.+)$", printed, re.MULTILINE)
    if code == 0:
        return {"summary": said[-1] if said else ""}
    if "Device not supported" in printed or "Failed to initialize" in printed:
        raise Skip(f"compute-sanitizer cannot work here: {said[-1] if said else 'no message'}")
    raise RuntimeError("; ".join(said[:2] + said[-1:]) or f"exit code {code}")


def tiny(dtype: str) -> None:
    """One forward and backward pass of every case by the kernels."""
    device, arm = choose_device("cuda"), ARMS["triton"]
    for name in KERNEL_CASES:
        problem = case_named(name).check_problem(quick=True).to(device, getattr(torch, dtype), tuned=True)
        problem, runnable = arm.prepare(problem)
        with arm.active():
            problem.step(runnable)
        torch.cuda.synchronize()


if __name__ == "__main__":
    tiny(*sys.argv[1:])
