"""What tuning asks of a device: are these kernels right, and how long does this take."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

from fastris import preflight
from fastris.kernels.configs import Choice, Config, replaced, watched
from fastris.preflight import Failure
from fastris.runtime.graph_timing import Timing, buffers_needed, time_rivals
from fastris.tuned import PRECISIONS
from fastris.tuning.problems import CRIS, Sizes, computing_in, problem

Tiles = Mapping[Choice, Config]


class Arm(NamedTuple):
    """A way to run an operator: a path, with tiles in place of the launch tables' for ``triton``."""

    path: str
    tiles: Tiles = {}  # noqa: RUF012 - never written to


class Bench(Protocol):
    """One device. :class:`DeviceBench` is the real one."""

    def prove(self, operator: str, precision: str, tiles: Tiles) -> Failure | None:
        """What is wrong with the kernels as they launch with ``tiles``, or None."""

    def choices(self, operator: str, precision: str, batch: int) -> dict[Choice, Config]:
        """What a step of the operator launches, with the tables' configurations and their alternatives."""

    def time(self, operator: str, precision: str, batch: int, arms: Mapping[str, Arm]) -> dict[str, Timing]:
        """Timings of a step by each arm. Raises torch.OutOfMemoryError where the batch does not fit."""


class DeviceBench:
    """A GPU; or, of small sizes, the CPU under Triton's interpreter."""

    def __init__(self, device: torch.device, sizes: Sizes = CRIS, seconds: float = 0.1):
        self.device, self.sizes, self.seconds = device, sizes, seconds

    def prove(self, operator: str, precision: str, tiles: Tiles) -> Failure | None:
        with computing_in(precision), replaced(tiles, self.device.index):
            return preflight.try_out(operator, self.device, PRECISIONS[precision])

    def choices(self, operator: str, precision: str, batch: int) -> dict[Choice, Config]:
        step = problem(operator, batch, self.device, self.sizes).step
        with computing_in(precision), replaced({}, self.device.index), watched() as seen:
            step("triton", self._autocast(precision))
        self._free()
        return dict(seen)

    def time(self, operator: str, precision: str, batch: int, arms: Mapping[str, Arm]) -> dict[str, Timing]:
        try:
            first = problem(operator, batch, self.device, self.sizes)
            more = buffers_needed(self.device, first.bytes) - 1
            problems = [first, *(problem(operator, batch, self.device, self.sizes) for _ in range(more))]

            def call(each, arm: Arm) -> Callable[[], None]:
                def run() -> None:
                    with replaced(arm.tiles, self.device.index):
                        each.step(arm.path, self._autocast(precision))

                return run

            rivals = {name: [call(each, arm) for each in problems] for name, arm in arms.items()}
            with computing_in(precision):
                return time_rivals(rivals, self.device, seconds=self.seconds)
        finally:
            self._free()

    def _autocast(self, precision: str) -> torch.dtype | None:
        dtype = PRECISIONS[precision]
        return None if dtype is torch.float32 else dtype

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Rehearsal(DeviceBench):
    """The same on a CPU, with the kernels in Triton's interpreter, on one tiny sample: its times are no GPU's."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), Sizes(side=2, channels=16, heads=1, words=5), seconds=0.0)

    def prove(self, operator: str, precision: str, tiles: Tiles) -> Failure | None:
        if PRECISIONS[precision] is torch.bfloat16:
            return Failure("Triton's interpreter computes wrong numbers in bfloat16", "measure on a GPU")
        return super().prove(operator, precision, tiles)

    def choices(self, operator: str, precision: str, batch: int) -> dict[Choice, Config]:
        return super().choices(operator, precision, 1)

    def time(self, operator: str, precision: str, batch: int, arms: Mapping[str, Arm]) -> dict[str, Timing]:
        return super().time(operator, precision, 1, arms)
