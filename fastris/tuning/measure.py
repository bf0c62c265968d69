"""The plan of a tuning: for each operator and precision prove, look for better tiles, compare with the torch path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastris.kernels.configs import Choice, Config
from fastris.operators import OPERATORS
from fastris.runtime.storage import first_line
from fastris.tuned.files import Row, Tuning
from fastris.tuned.sizes import BUCKETS, MIDDLE, PRECISIONS
from fastris.tuning.bench import Arm, Bench, Tiles

LEAST_GAIN = 0.03
"""`auto` changes its path for no less, whatever the noise."""
LEAST_TILE_GAIN = 0.01
TILES_ARE_SOUGHT_IN = ("bfloat16", "float16", "float32")
"""TF32 has the tiles of float32: the launches cannot tell them apart."""

Job = tuple[str, str]
"""Operator and precision."""


class Unusable(RuntimeError):
    """No kernels run on this machine, whatever the operator."""


@dataclass
class Plan:
    """What is left to measure, and until when.

    Attributes:
        tuning: what is known; rows and tiles are added to it.
        end: when to begin nothing more, by ``clock``, in seconds.
        say: prints a line; save: keeps what ``tuning`` holds, after every job.
        failed: the jobs that failed.
    """

    bench: Bench
    tuning: Tuning
    end: float
    say: Callable[[str], None]
    save: Callable[[], None]
    clock: Callable[[], float]
    failed: list[Job] = field(default_factory=list)


def jobs(tuning: Tuning) -> list[Job]:
    """All operators with kernels in all precisions; those that nothing is known of first."""
    known = {(operator, precision) for operator, precision, _ in tuning.rows}
    every = [(name, precision) for precision in PRECISIONS for name, entry in OPERATORS.items() if entry.kernels]
    return sorted(every, key=lambda job: job in known)


def measure(plan: Plan) -> list[Job]:
    """Do the jobs until the plan's time is over, and return those that were not begun, and those that failed.

    Raises RuntimeError where the machine lets no kernels run: that is mended, and not measured.
    """
    left = jobs(plan.tuning)
    while left and plan.clock() < plan.end:
        share = (plan.end - plan.clock()) / len(left)
        operator, precision = left.pop(0)
        try:
            _do(plan, operator, precision, plan.clock() + share)
        except Unusable:
            raise
        except Exception as error:  # of one operator; anything may go wrong in a compiler, a driver and a GPU
            plan.failed.append((operator, precision))
            plan.say(f"  {precision:<16} {operator:<31} failed: {type(error).__name__}: {first_line(error)}")
        plan.save()
    return plan.failed + left


def _do(plan: Plan, operator: str, precision: str, end: float) -> None:
    failure = plan.bench.prove(operator, precision, {})
    if failure is not None and failure.everywhere:
        raise Unusable(f"there is nothing to tune: {failure}")
    if failure is not None and failure.passing:
        raise torch.OutOfMemoryError(str(failure))
    tiles: dict[Choice, Config] = {}
    if failure is None:
        tiles = _better_tiles(plan, operator, precision, end)
        plan.tuning.tiles.update({choice.text(): config.as_dict() for choice, config in tiles.items()})
    told = []
    for bucket in BUCKETS:
        try:
            row = _row(plan, operator, precision, bucket, tiles, None if failure is None else str(failure))
        except torch.OutOfMemoryError:
            plan.tuning.rows.pop((operator, precision, bucket), None)
            told.append(f"{bucket} does not fit")
            continue
        plan.tuning.rows[row.key] = row
        told.append(f"{bucket} {row.gain:.2f}x" if row.gain else f"{bucket} not proved")
    line = f"  {precision:<16} {operator:<31} {', '.join(told)}"
    line += f"; {len(tiles)} better tiles" if tiles else ""
    plan.say(f"{line}; {failure}" if failure else line)


def _row(
    plan: Plan, operator: str, precision: str, bucket: str, tiles: dict[Choice, Config], failure: str | None
) -> Row:
    arms = {"torch": Arm("torch")} | ({} if failure else {"triton": Arm("triton", tiles)})
    found = plan.bench.time(operator, precision, BUCKETS[bucket], arms)
    torchs, triton = found["torch"], found.get("triton")
    takes = triton is not None and triton.faster_than(torchs, LEAST_GAIN)
    seconds, spread = (None, 0.0) if triton is None else (triton.seconds, triton.spread)
    return Row(operator, precision, bucket, torchs.seconds, torchs.spread, seconds, spread, takes, failure or "")


def _better_tiles(plan: Plan, operator: str, precision: str, end: float) -> dict[Choice, Config]:
    """Kernel by kernel the fastest configuration that is proved, from what is known on, as far as the time allows."""
    batch = BUCKETS[MIDDLE]
    try:
        launched = plan.bench.choices(operator, precision, batch)
        best = _known_tiles(plan.tuning, launched)
        if best and plan.bench.prove(operator, precision, best) is not None:
            best = {}
        for choice, table in launched.items():
            for other in (table, *table.alternatives) if precision in TILES_ARE_SOUGHT_IN else ():
                if plan.clock() >= end:
                    return best
                if other != best.get(choice, table):
                    best = _faster(plan, operator, precision, best, best | {choice: other})
        return best
    except torch.OutOfMemoryError:
        return {}


def _faster(plan: Plan, operator: str, precision: str, now: Tiles, other: dict[Choice, Config]) -> dict[Choice, Config]:
    """The ``other`` tiles if they are proved and win, else those of ``now``."""
    if plan.bench.prove(operator, precision, other) is not None:
        return dict(now)
    arms = {"now": Arm("triton", now), "other": Arm("triton", other)}
    try:
        found = plan.bench.time(operator, precision, BUCKETS[MIDDLE], arms)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # right on few pixels, and still not fit for many
        why = f"{type(error).__name__}: {first_line(error)}"
        plan.say(f"  {precision:<16} {operator:<31} passed over {_new(now, other)}: {why}")
        return dict(now)
    return other if found["other"].faster_than(found["now"], LEAST_TILE_GAIN) else dict(now)


def _new(now: Tiles, other: Tiles) -> str:
    """The tiles of ``other`` that are not those of ``now``."""
    new = {choice: config for choice, config in other.items() if now.get(choice) != config}
    return ", ".join(f"{choice.text()} {config.as_dict()}" for choice, config in new.items())


def _known_tiles(tuning: Tuning, launched: dict[Choice, Config]) -> dict[Choice, Config]:
    """What the tuning holds for these launches: operators share kernels, and an earlier tuning may go on."""
    known = {choice: tuning.tiles.get(choice.text()) for choice in launched}
    return {choice: Config.from_dict(tiles) for choice, tiles in known.items() if tiles is not None}
