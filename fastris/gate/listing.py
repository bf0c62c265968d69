"""``python -m fastris.kernels.listing``: what a profiler would be asked first, read from each kernel's machine code.

Registers, stack, shared memory; how many warps stay on a multiprocessor and what limits them; tensor-core instructions;
how wide global memory is read and written; loads that repeat another's address; warp instructions for each number
written. From these and a card's data sheet a bound is modelled: the longest of the time to move the bytes, to multiply,
and to issue the instructions. Nothing here is measured, and no card reaches its bound.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from fastris.kernels.launch import Launch
from fastris.runtime.cards import CARDS, Card

from .builds import Build, Compiled, nvidia_tool
from .sass import Counts, counts, disassembled
from .work import Work, work

WARP = 32
SCHEDULERS = 4  # of a multiprocessor; each issues one warp instruction a clock


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on one multiprocessor share (CUDA C++ Programming Guide, compute capabilities)."""

    warps: int
    blocks: int
    shared: int  # bytes
    registers: int = 65_536


class _A100(Card):
    @property
    def wide_rate(self) -> float:
        """64 float32 multiply-adds a clock, half of what the other cards here do."""
        return super().wide_rate / 2


_KNOWN = {card.name: card for card in CARDS}
# sm -> the card that stands for it, and its multiprocessor.
LISTED: dict[str, tuple[Card, Multiprocessor]] = {
    "sm_80": (
        _A100("A100 80GB", 108, 1.41, 2048, 2039, 80, "NVIDIA A100 data sheet: 312 TFLOP/s dense, 2,039 GB/s"),
        Multiprocessor(64, 32, 167_936),
    ),
    "sm_86": (_KNOWN["RTX 3060 12GB"], Multiprocessor(48, 16, 102_400)),
    "sm_89": (_KNOWN["RTX 4090"], Multiprocessor(48, 24, 102_400)),
    "sm_90": (_KNOWN["H200"], Multiprocessor(64, 32, 233_472)),
    "sm_100": (
        Card("B200", 148, 1.85, 8192, 8000, 180, "NVIDIA B200 data sheet: 2.25 PFLOP/s dense, 8 TB/s"),
        Multiprocessor(64, 32, 233_472),
    ),
    "sm_120": (_KNOWN["RTX 5090"], Multiprocessor(48, 24, 102_400)),
}


@dataclass(frozen=True)
class Row:
    """One kernel on one card. Times are of one picture, in microseconds.

    Attributes:
        warps: resident on a multiprocessor, of those that it has room for; ``limit`` is what keeps more away:
            registers, shared memory, block slots, or nothing ("full").
        matrix: instructions for tensor cores in the code.
        load_bytes, store_bytes: that a thread moves with one instruction, on average.
        loads: instructions that read global memory, and how many of them repeat an address: see sass.py.
        per_output: warp instructions times 32 for each number written.
        memory, compute, issue: modelled times; ``bound`` names the longest, and ``of_roofline`` is how much longer than
            memory and compute alone it makes the launch.
    """

    name: str
    dtype: str
    registers: int
    stack: int
    shared: int
    warps: int
    limit: str
    matrix: int
    load_bytes: float
    store_bytes: float
    widths: str
    loads: int
    redundant: int
    instructions: int
    per_output: float
    memory: float
    compute: float
    issue: float
    bound: str
    of_roofline: float


def listed(compiled: Compiled) -> Row | None:
    """The row of a build; None for a card that has no table."""
    if compiled.build.arch not in LISTED:
        return None
    assert isinstance(compiled.code, bytes)
    found = counts(disassembled(compiled.code, str(nvidia_tool("nvdisasm"))))
    return row(compiled.build, compiled.launch, found)


def row(build: Build, launch: Launch, found: Counts) -> Row:
    card, multiprocessor = LISTED[build.arch]
    todo = work(launch)
    warps, limit = resident_warps(build, multiprocessor)
    executed = _executed(found, todo, build.num_warps) * build.num_warps * prod(launch.grid)
    low = build.dtype != "float32" or launch_is_tf32(launch)
    rate = card.matrix_rate / (2 if build.dtype == "float32" else 1) if low else card.wide_rate
    times = {
        "memory": todo.bytes / (card.bandwidth * 1e9),
        "compute": 2 * todo.products / rate,
        "issue": executed / (card.multiprocessors * SCHEDULERS * card.boost_ghz * 1e9),
    }
    bound = max(times, key=lambda name: times[name])
    memory, compute, issue = (round(1e6 * seconds / todo.samples, 3) for seconds in times.values())
    return Row(
        build.name,
        build.dtype,
        build.registers,
        build.stack,
        build.shared,
        warps,
        limit,
        sum(found.matrix.values()),
        _mean(found.loads),
        _mean(found.stores),
        " ".join(f"{8 * size}b:{n}" for size, n in sorted(found.loads.items(), reverse=True)),
        sum(found.loads.values()),
        found.redundant_loads,
        sum(found.instructions),
        round(executed * WARP / max(1, todo.outputs), 2),
        memory,
        compute,
        issue,
        bound,
        round(times[bound] / max(times["memory"], times["compute"]), 2),
    )


def launch_is_tf32(launch: Launch) -> bool:
    return dict(launch.arguments).get("PRECISION") == "tf32"


def _mean(widths: Counter[int]) -> float:
    return round(sum(size * n for size, n in widths.items()) / max(1, sum(widths.values())), 2)


def resident_warps(build: Build, multiprocessor: Multiprocessor) -> tuple[int, str]:
    """Warps that stay on a multiprocessor at once, and what keeps more away.

    Registers are given to a warp 256 at a time, to each of four schedulers from its own quarter; a block takes 1 KiB of
    shared memory for itself.
    """
    per_warp = -(-build.registers * WARP // 256) * 256
    by_registers = multiprocessor.registers // SCHEDULERS // per_warp * SCHEDULERS // build.num_warps
    blocks = {
        "full": multiprocessor.warps // build.num_warps,
        "registers": by_registers,
        "shared memory": multiprocessor.shared // (build.shared + 1024),
        "block slots": multiprocessor.blocks,
    }
    limit = min(blocks, key=lambda name: blocks[name])
    return blocks[limit] * build.num_warps, limit


def _executed(found: Counts, todo: Work, warps: int) -> float:
    """Instructions that one warp executes: loops as often as the launch goes round them.

    Where the compiler unrolled a loop, its trips are fewer: the products that the tiles need say by how much. Of a
    branch, both sides are counted.
    """
    times = [1.0]
    for depth in range(1, len(found.instructions)):
        times.append(times[-1] * (todo.trips[depth - 1] if depth <= len(todo.trips) else 1))
    deepest = max((depth for depth, products in enumerate(found.products) if products), default=0)
    if deepest:
        outside = sum(n * t for n, t in zip(found.products[:deepest], times, strict=False))
        times[deepest] = max(1.0, (todo.padded / warps - outside) / found.products[deepest])
    return sum(n * t for n, t in zip(found.instructions, times, strict=True))
