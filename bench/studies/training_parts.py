"""``python -m bench.studies.training_parts``: what Mask Grounding and the alignment loss add to a step of CRIS.

Operations of the whole step, forward and backward, counted on shapes: nothing is computed, and no time is measured.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastris.models import registry
from fastris.options.declare import option
from fastris.runtime.markdown import markdown_table

from ..cases import builders
from ..cases.table import REAL_LENGTHS, Case
from ..options import with_options
from ..timing.roofline import count_flops

SWITCHES: dict[str, dict[str, float]] = {
    "off": {},
    "mask_grounding=1.0": {"mask_grounding": 1.0},
    "alignment_loss=0.5": {"alignment_loss": 0.5},
    "both": {"mask_grounding": 1.0, "alignment_loss": 0.5},
}
"""What is counted, by name; the weights of the losses change nothing of the work."""

BOTH = "both"
GOAL = 0.08
"""Operations that both add, at most this fraction of the step's."""

HIDDEN = 2
"""Tokens of each sentence that are taken to be hidden. RefCOCO's have 1.1 on average: a little too many are counted."""


@dataclass
class TrainingPartsConfig:
    """Counts the operations of a training step of CRIS with and without its training parts."""

    model: str = option("cris_r50", "a preset of CRIS")
    batch: int = option(8, "references in the step; at least 2")


def run(config: TrainingPartsConfig) -> int:
    if config.batch < 2:
        raise ValueError(f"batch must be at least 2, got {config.batch}")
    counts = {name: count_step(config.model, config.batch, switches) for name, switches in SWITCHES.items()}
    print(table(counts, config.batch))
    share = counts[BOTH] / counts["off"] - 1
    print(f"\nboth add {share:.1%} of the step's operations; the goal is at most {GOAL:.0%}")
    return int(share > GOAL)


def count_step(preset: str, batch: int, switches: dict[str, float]) -> int:
    """Multiplications and additions of forward and backward in float32, the fast path's algebra, sentences of L words.

    Raises ValueError for the preset of another system.
    """
    plain: Any = registry.preset(preset)
    if plain.system != "cris":
        raise ValueError(f"model must be a preset of CRIS, got {preset}")
    model = dataclasses.replace(plain, dropout=0.0, **switches)
    sizes = {"preset": model, "side": model.input_size, "batch": batch, "words": model.word_len}
    case = Case(
        name="training_parts",
        op="model",
        title="",
        build=builders.training_step,
        sizes={**sizes, "lengths": REAL_LENGTHS},
        small={},
    )
    with without_hidden_words():
        return count_flops(case, "torch")


@contextmanager
def without_hidden_words() -> Iterator[None]:
    """Where there are no numbers, no word can be drawn: :data:`HIDDEN` of each sentence take their place."""

    def rows(chosen: Tensor) -> Tensor:
        return torch.zeros(HIDDEN * len(chosen), dtype=torch.int64, device=chosen.device)

    def drawn(rows: int, length: int, device: torch.device) -> Tensor:
        return torch.rand(3, rows, length, device=device)

    with (
        mock.patch("fastris.nn.mask_grounding.chosen_rows", rows),
        mock.patch("fastris.models.cris.training_parts.draw_ahead", drawn),
    ):
        yield


def table(counts: dict[str, int], batch: int) -> str:
    """GFLOP for each reference, and what is added to a plain CRIS."""
    rows = [
        (name, f"{count / batch / 1e9:.1f}", "" if name == "off" else f"{count / counts['off'] - 1:.2%}")
        for name, count in counts.items()
    ]
    return markdown_table(("training step", "GFLOP for each reference", "added"), rows)


def main(arguments: list[str]) -> int:
    return with_options("bench.studies.training_parts", TrainingPartsConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
