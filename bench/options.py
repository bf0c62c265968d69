"""The options of ``fastris bench``, their words, and how ``python -m bench.*`` commands start. Imports no torch."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from fastris.options.declare import describe, load_options, option

T = TypeVar("T")

BASELINE = "reference"
"""The arm that all others are compared with: the published formulas, operation by operation."""

ARM_NAMES = (BASELINE, "repaired", "compiled", "max_autotune", "torch", "triton", "fastris_compiled")
"""Of :data:`bench.cases.arms.ARMS`, in that order."""

PASSES = ("forward", "backward", "both")
"""What may be timed: the forward pass of a training step, its backward pass, or the whole step."""


@dataclass(frozen=True)
class Effort:
    """How long to measure one case: up to ``rounds`` rounds, of which those after ``min_rounds`` end at ``seconds``."""

    rounds: int = 20
    min_rounds: int = 5
    seconds: float = 120.0


QUICK = Effort(rounds=5, min_rounds=2, seconds=5.0)


@dataclass
class BenchConfig:
    """Checks every arm against float64, times the arms in turns, and prints medians, ratios and shares of the roofline.

    Ctrl-C keeps what was measured. The exit code is 1 when an arm was refused or failed, or when --compare finds one
    that became slower.
    """

    op: tuple[str, ...] = option((), "operators or cases, and memory, e.g. --op decoder,memory; all if empty")
    arms: tuple[str, ...] = option(
        (), f"arms to measure beside {BASELINE}, of {', '.join(ARM_NAMES)}; all usual if empty"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "precision; the lower two under autocast")
    batch: tuple[int, ...] = option((), "batch sizes, e.g. batch=1,8,16,32; each case's own if empty")
    passes: tuple[Literal["forward", "backward", "both"], ...] = option(("both",), "what to time of a training step")
    threads: int | None = option(None, "CPU threads; PyTorch's choice if none")
    quick: bool = option(False, "few rounds, checks on small copies, compiled arms only where they compile soon")
    rounds: int = option(Effort.rounds, "rounds per case at most")
    seconds: float = option(Effort.seconds, f"no new round after this, but at least {Effort.min_rounds}", "s per case")
    json: Path | None = option(None, "file for every single timing; written after each case")
    compare: Path | None = option(None, "older file; prints what moved beyond noise since then")
    profile: Path | None = option(None, "folder for a trace of each case and arm, to open in Perfetto")

    def effort(self) -> Effort:
        asked = Effort(self.rounds, min(self.rounds, Effort.min_rounds), self.seconds)
        if not self.quick:
            return asked
        return Effort(*map(min, dataclasses.astuple(asked), dataclasses.astuple(QUICK)))

    def check(self) -> None:
        """Raises ValueError, naming the option."""
        for name in ("rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if any(batch < 1 for batch in self.batch):
            raise ValueError(f"batch must be at least 1, got {', '.join(map(str, self.batch))}")

    def command(self) -> list[str]:
        """The command line that asks for this."""
        words = ["fastris", "bench"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words.append(f"{field.name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
        return words


def told(command: str, work: Callable[[], int]) -> int:
    """The exit code of ``work``; 2, and one line, where it raises what whoever called it can mend."""
    try:
        return work()
    except (ValueError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2


def with_options(command: str, config: type[T], run: Callable[[T], int], arguments: Sequence[str]) -> int:
    """Run a command whose options are a dataclass, as those of ``fastris`` are: see :mod:`fastris.options.declare`."""
    if {"-h", "--help"} & set(arguments):
        print(f"usage: python -m {command} [name=value ...]\n\n{inspect.getdoc(config)}\n\n{describe(config)}")
        return 0
    return told(command, lambda: run(load_options(config, arguments)))


def with_arguments(command: str, wanted: str, fits: bool, work: Callable[[], int]) -> int:
    """Run a command without options where its arguments are those ``wanted``; else print its usage."""
    if not fits:
        print(f"usage: python -m {command} {wanted}".rstrip(), file=sys.stderr)
        return 2
    return told(command, work)
