"""The memory of a training step: what a count holds, which batch it forecasts for a card, and its tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastris.ops.upsample_conv import CPU_PART_BYTES, GPU_PART_BYTES

from ..timing.harness import Outcome
from .results import MIB, kept_bytes, load_json
from .tables import table

BATCH = 2
DTYPE = torch.bfloat16
WHOLE_GOALS = {"pointwise": 240, "stages": 135}
"""Recompute setting -> MiB kept per image, at most, with the weights' copies, by every arm but the baseline."""

CARD_SIZES = (8, 12, 16, 24)
"""Memory of the cards in GiB."""

CONTEXT = 512 * 2**20
"""Bytes of a card that PyTorch's allocator does not get: CUDA's context, kernels, a desktop. Estimated."""

WORKSPACE = GPU_PART_BYTES - CPU_PART_BYTES + 256 * 2**20
"""Bytes that come and go within an operation: on a GPU the projector's larger tap images, and cuDNN's and cuBLAS's
workspaces, estimated."""

PUBLISHED_BATCH = 64
GIB = 2**30

TIME_GOAL = 1.15
"""A step with ``"stages"`` takes at most this many times one with ``"none"``."""


@dataclass
class MemoryCell(Outcome):
    """One arm's count for a batch of :data:`BATCH`: stage -> :class:`Kept`, as a dict."""

    stages: dict[str, Any] = field(default_factory=dict)


@dataclass
class WholeCell(MemoryCell):
    """One arm with one recompute setting: ``stages`` as in :class:`MemoryCell`; ``fixed`` bytes for weights and
    optimizer state; ``lines`` part -> (bytes, bytes per image) at that part's peak."""

    recompute: str = "none"
    fixed: int = 0
    lines: dict[str, tuple[float, float]] = field(default_factory=dict)

    def step_bytes(self, batch: int) -> float:
        """Forecast of a training step's bytes on a card, without what the allocator does not get."""
        return self.fixed + WORKSPACE + max(start + batch * slope for start, slope in self.lines.values())

    def largest_batch(self, gib: float) -> int:
        """The largest batch whose step fits on a card of ``gib``; 0 where one image does not."""
        room = gib * GIB - CONTEXT - WORKSPACE - self.fixed
        batch = min(((room - start) / slope for start, slope in self.lines.values() if slope > 0), default=0)
        return max(0, int(batch)) if all(start <= room for start, _ in self.lines.values()) else 0


def load_counts(path: Path) -> dict[str, Any]:
    """A file that ``python -m bench.memory json=FILE`` wrote. Raises ValueError when it is none."""
    content = load_json(path, f"write it anew with python -m bench.memory json={path}")
    if not isinstance(content, dict) or "cells" not in content:
        raise ValueError(f"{path} holds no counts; write it anew with python -m bench.memory json={path}")
    return content


def memory_page(content: dict[str, Any], source: str) -> str:
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
    return kept_bytes(vars(cell), *stages) / BATCH / MIB


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
