"""``python -m fastris.kernels.gate``: build every kernel as it is launched, for every card, and read what it costs.

It prints registers, shared memory and stack of each build and fails when one would not run well: more shared memory
than a block may have, or registers spilled to the stack or to local memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from .builds import ARCHS, Build, builds
from .scenarios import DTYPES


def _row(build: Build) -> str:
    return (
        f"{build.name:68} {build.arch:8} {build.dtype:9} {build.num_warps:5} {build.shared:7} {build.limit:7} "
        f"{build.registers:5} {build.stack:5}{'' if build.fits else '  DOES NOT FIT'}"
    )


def main() -> int:
    """Print the table of all builds; exit status 1 when one does not fit."""
    parser = argparse.ArgumentParser(prog="python -m fastris.kernels.gate", description=main.__doc__)
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="that compile at once (default: all cores)"
    )
    processes = parser.parse_args().processes
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("the gate compiles; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    print(f"{'kernel':68} {'card':8} {'dtype':9} {'warps':>5} {'shared':>7} {'limit':>7} {'regs':>5} {'stack':>5}")
    failures = 0
    jobs = [(arch, dtype) for arch in ARCHS for dtype in DTYPES]
    # Fresh processes: a fork would inherit the threads of whatever was imported before.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for results in pool.map(builds, *zip(*jobs, strict=True)):
            failures += sum(not result.fits for result in results)
            print("\n".join(map(_row, results)), flush=True)
    print(f"{failures} builds do not fit" if failures else "every build fits")
    return 1 if failures else 0
