"""``python -m bench.memory``: the memory of the whole training step, what batch fits on a card, and what it costs."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastris import CRISConfig
from fastris.nn.recompute import RECOMPUTE_SETTINGS
from fastris.options.declare import option
from fastris.runtime.device import choose_device
from fastris.runtime.host_memory import keep_freed_memory

from ..cases.arms import BASELINE, choose_arms
from ..commandline import with_options
from ..report import results
from ..report.results import MIB
from ..report.tables import table
from ..timing import machine
from ..timing.harness import order_of_round, synchronize, timed
from .whole import BATCH, CARD_SIZES, DTYPE, PUBLISHED_BATCH, WHOLE_GOALS, WholeCell, count_whole, model_and_batch

TIME_GOAL = 1.15
"""A step with ``"stages"`` takes at most this many times one with ``"none"``."""


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
        "machine": machine.describe(device, device.type == "cpu" and keep_freed_memory()),
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
        results.save(config.json, content)
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


def load_counts(path: Path) -> dict[str, Any]:
    """A file that ``python -m bench.memory json=FILE`` wrote. Raises ValueError when it is none."""
    content = results.load_json(path, f"write it anew with python -m bench.memory json={path}")
    if not isinstance(content, dict) or "cells" not in content:
        raise ValueError(f"{path} holds no counts; write it anew with python -m bench.memory json={path}")
    return content


def page(content: dict[str, Any], source: str) -> str:
    """The block of a page: what is kept, what fits, and what recomputing costs where it was timed."""
    cells = [WholeCell(**cell) for cell in content["cells"]]
    parts = [kept_table(cells), fits_table(cells)]
    parts += [time_table(taken, content["timed_batch"], name) for name, taken in content.get("seconds", {}).items()]
    about = content["machine"]
    facts = about["device"]["name"], f"{about['threads']} threads", f"PyTorch {about['versions']['torch']}"
    return "\n\n".join([*parts, f"<sub>{', '.join(facts)}, {about['date'][:10]}. Raw data: `{source}`.</sub>"])


def kept_table(cells: Sequence[WholeCell]) -> str:
    """MiB kept for backward per image by the whole model, in Markdown."""
    rows = []
    for cell in cells:
        total, copies = mib_per_image(cell), sum(kept["weight_copies"] for kept in cell.stages.values()) / BATCH / MIB
        parts = ", ".join(f"{name} {mib_per_image(cell, name):.0f}" for name in cell.stages)
        goal = WHOLE_GOALS.get(cell.recompute)
        met = "-" if goal is None else "yes" if total <= goal else "no"
        figures = (f"{total:.0f} ({parts})", f"{copies:.0f}") if not cell.message else (cell.message, "-")
        rows.append((cell.arm, cell.recompute, *figures, f"at most {goal}" if goal else "-", met))
    columns = ("arm", "recompute", "MiB per image", "of them copies of weights", "goal", "met")
    title = f"Kept for backward per image by the whole of CRIS-RN50 at 416x416, B={BATCH}, bfloat16 autocast, 17 words."
    return f"{title}\n\n{table(columns, rows, aligned=False)}"


def kept_per_image(content: dict[str, Any]) -> dict[str, float]:
    """MiB kept for backward per image by the whole model, by arm and recompute setting: "torch stages"."""
    cells = [WholeCell(**cell) for cell in content["cells"]]
    return {f"{cell.arm} {cell.recompute}": mib_per_image(cell) for cell in cells if not cell.message}


def mib_per_image(cell: WholeCell, *stages: str) -> float:
    """MiB kept for backward per image in these stages, or in all."""
    return results.kept_bytes(vars(cell), *stages) / BATCH / MIB


def fits_table(cells: Sequence[WholeCell]) -> str:
    """The largest batch that fits on each card, in Markdown."""
    rows = [
        (
            cell.arm,
            cell.recompute,
            *(str(cell.largest_batch(card)) for card in CARD_SIZES),
            f"{cell.step_bytes(PUBLISHED_BATCH) / 2**30:.1f}",
            "yes" if cell.largest_batch(12) >= PUBLISHED_BATCH else "no",
        )
        for cell in cells
        if not cell.message
    ]
    published = f"B={PUBLISHED_BATCH}"
    sizes = (f"{size} GB" for size in CARD_SIZES)
    columns = ("arm", "recompute", *sizes, f"{published} needs GiB", f"{published} in 12 GB")
    title = "Largest batch of one training step with Adam, forecast from counted bytes, tried on no card."
    return f"{title}\n\n{table(columns, rows, aligned=False)}"


def time_table(seconds: dict[str, list[float]], batch: int, dtype: str) -> str:
    """What the settings cost, as the median over the rounds of the ratio within each."""
    rows = []
    for setting, taken in seconds.items():
        ratios = [own / none for own, none in zip(taken, seconds["none"], strict=True)]
        ratio, spread = statistics.median(ratios), f"{min(ratios):.2f}-{max(ratios):.2f}"
        met = "-" if setting != "stages" else "yes" if ratio <= TIME_GOAL else "no"
        rows.append((setting, f"{statistics.median(taken):.2f}", f"{ratio:.2f}x [{spread}]", met))
    rounds = len(seconds["none"])
    title = f"Forward and backward, B={batch}, {dtype}, channels_last, {rounds} rounds; goal {TIME_GOAL:g}x."
    return f"{title}\n\n{table(('recompute', 's, median', 'times none [min-max]', 'met'), rows, aligned=False)}"


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    return with_options("bench.memory", WholeConfig, run, arguments)
