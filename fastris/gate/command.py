"""``python -m fastris.kernels.gate``: build every kernel as it is launched, for every card, and read what it costs.

It prints registers, shared memory and stack of each build and fails when one would not run well: more shared memory
than a block may have, registers spilled to the stack or to local memory, or worse than the committed table of its card.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from . import tables
from .builds import ARCHS, Build, compiled, named_launches
from .listing import LISTED, Row, listed
from .scenarios import DTYPES

Job = tuple[int | str, torch.dtype]
CARDS: dict[str, int | str] = {arch if isinstance(arch, str) else f"sm_{arch}": arch for arch in ARCHS}
Built = list[tuple[Build, Row | None]]


def _row(build: Build) -> str:
    return (
        f"{build.name:68} {build.arch:8} {build.dtype:9} {build.num_warps:5} {build.shared:7} {build.limit:7} "
        f"{build.registers:5} {build.stack:5}{'' if build.fits else '  DOES NOT FIT'}"
    )


BRIEFLY = (
    "train",
    "train AlignFormer",
    "train pixel decoder",
    "train words",
    "train loss",
    "stage 1",
    "MagNet stage 1",
    "eval",
)
"""The scenarios of a brief gate."""
SIBLINGS = ("sm_89", "sm_100", "sm_103", "gfx1100")
"""Cards that a brief gate leaves out for time: sm_86, sm_90 and gfx942 have the same tiles."""


def build_all(arch: int | str, dtype: torch.dtype, only: str = "", brief: bool = False) -> Built:
    """Everything that is launched in ``dtype`` on a card, or what has ``only`` in its name, built and read.

    ``brief``: only the scenarios of :data:`BRIEFLY`, with the tiles of the launch tables.
    """
    named = {
        name: launch
        for name, launch in named_launches(arch, dtype).items()
        if only in name and (not brief or name.partition(": ")[2].partition(" #")[0] in BRIEFLY)
    }
    made = (compiled(name, launch, arch, dtype) for name, launch in named.items())
    return [(each.build, listed(each)) for each in made]


def in_processes(jobs: Sequence[Job], processes: int | None, only: str = "", brief: bool = False) -> Iterator[Built]:
    """Each job's builds, in order. Fresh processes: a fork would inherit the threads of what was imported before."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(build_all, *zip(*jobs, strict=True), [only] * len(jobs), [brief] * len(jobs))


def interpreting(what: str) -> bool:
    """Whether Triton is told to interpret and not to compile, with a line that says so."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    print(f"{what} compiles; unset TRITON_INTERPRET", file=sys.stderr)
    return True


def main() -> int:
    """Print the table of all builds; exit status 1 when one does not fit, or is worse than its card's table."""
    parser = argparse.ArgumentParser(prog="python -m fastris.kernels.gate", description=main.__doc__)
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="that compile at once (default: all cores)"
    )
    parser.add_argument(
        "--refresh", action="store_true", help="write the tables of the cards anew, and compare nothing"
    )
    parser.add_argument("--card", choices=CARDS, action="append", help="as sm_90; may be repeated (default: all)")
    parser.add_argument(
        "--brief",
        action="store_true",
        help="build only what CRIS-RN50 and AlignFormer launch in training, and CRIS in evaluation, in bfloat16 for "
        f"all cards but {', '.join(SIBLINGS)}",
    )
    arguments = parser.parse_args()
    if arguments.brief and arguments.refresh:
        parser.error("--refresh writes whole tables; leave --brief out")
    if interpreting("the gate"):
        return 2
    print(f"{'kernel':68} {'card':8} {'dtype':9} {'warps':>5} {'shared':>7} {'limit':>7} {'regs':>5} {'stack':>5}")
    failures = 0
    cards = arguments.card or [card for card in CARDS if not (arguments.brief and card in SIBLINGS)]
    rows: dict[str, list[Row]] = {card: [] for card in LISTED if card in cards}
    dtypes = (torch.bfloat16,) if arguments.brief else DTYPES
    jobs = [(CARDS[card], dtype) for card in CARDS if card in cards for dtype in dtypes]
    for built in in_processes(jobs, arguments.processes, brief=arguments.brief):
        failures += sum(not build.fits for build, _ in built)
        print("\n".join(_row(build) for build, _ in built), flush=True)
        for build, row in built:
            if row:
                rows[build.arch].append(row)
    if arguments.refresh:
        tables.FOLDER.mkdir(exist_ok=True)
        for card, found in rows.items():
            tables.path_of(card).write_text(tables.text(card, found))
    worse = 0 if arguments.refresh else _compared(rows, arguments.brief)
    print(f"{failures} builds do not fit" if failures else "every build fits")
    return 1 if failures or worse else 0


def _compared(rows: dict[str, list[Row]], brief: bool) -> int:
    """Print what got worse than the tables say; how many lines that were."""
    count = 0
    for card, found in rows.items():
        failures, remarks = tables.compare(card, found, whole=not brief)
        count += len(failures)
        print("\n".join([*failures, *remarks]), end="\n" if failures or remarks else "")
    return count
