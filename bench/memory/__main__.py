"""``python -m bench.memory``: the memory of the whole training step, what batch fits on a card, and what it costs."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastris import CRISConfig
from fastris.nn.recompute import RECOMPUTE_SETTINGS
from fastris.options.declare import option
from fastris.runtime.device import choose_device

from ..cases.arms import choose_arms
from ..commandline import with_options
from ..options import BASELINE
from ..report.memory import BATCH, DTYPE, WHOLE_GOALS, WholeCell, fits_table, kept_table, time_table
from ..report.results import save
from ..timing import machine
from ..timing.harness import order_of_round, synchronize, timed
from .whole import count_whole, model_and_batch


@dataclass
class WholeConfig:
    """Counts what a training step of CRIS-RN50 at 416x416 keeps and needs, for every recompute setting."""

    arms: tuple[str, ...] = option((), f"arms to count beside {BASELINE}; all eager paths that run here if empty")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    rounds: int = option(0, "steps to time per setting, in turns; 0 counts only")
    batch: int = option(BATCH, "images per timed step; at least 2")
    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = option(("bfloat16",), "precisions of timed steps")
    json: Path | None = option(None, "file for all counts and timings")


def run(config: WholeConfig) -> int:
    device = choose_device(config.device)
    if config.rounds < 0 or config.batch < 2:
        raise ValueError(f"rounds must be at least 0 and batch at least 2, got {config.rounds} and {config.batch}")
    cells: list[WholeCell] = []
    model = CRISConfig.preset("cris_r50")
    arms = choose_arms(config.arms, device, DTYPE)
    eager = [arm for arm in arms if arm.compile is None and not arm.repaired]  # counted operation by operation
    count_whole(eager, device, _say, cells, model)
    print(kept_table(cells), fits_table(cells), sep="\n\n")
    content: dict[str, Any] = {
        "machine": machine.prepare(device),
        "batch": BATCH,
        "goals": WHOLE_GOALS,
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    if config.rounds:
        content |= {"seconds": {}, "timed_batch": config.batch}
        for name in config.dtype:
            seconds = time_settings(model, device, getattr(torch, name), config.batch, config.rounds)
            print("", time_table(seconds, config.batch, name), sep="\n")
            content["seconds"][name] = seconds
    if config.json is not None:
        save(config.json, content)
    return int(any(cell.message for cell in cells))


def time_settings(
    config: CRISConfig, device: torch.device, dtype: torch.dtype, batch: int, rounds: int
) -> dict[str, list[float]]:
    """Setting -> seconds of forward and backward in every round, on one model; settings take turns, after a warm-up.

    In channels_last, as training on a GPU: see :func:`fastris.runtime.device.layout_for`.
    """
    model, data = model_and_batch(config, "none", device, batch)
    model.to(memory_format=torch.channels_last)
    data = (data[0].contiguous(memory_format=torch.channels_last), *data[1:])

    def step() -> None:
        model.zero_grad()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = model(*data)[2]
        loss.backward()

    seconds: dict[str, list[float]] = {setting: [] for setting in RECOMPUTE_SETTINGS}
    for number in range(rounds + 1):
        for setting in order_of_round(list(RECOMPUTE_SETTINGS), number):
            _say(f"timing {setting}, round {number} of {rounds}")
            model.set_recompute(setting)
            taken = timed(step, 1, lambda: synchronize(device))
            if number:
                seconds[setting].append(taken)
    return seconds


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    return with_options("bench.memory", WholeConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
