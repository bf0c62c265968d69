"""Batches whose loss or gradient is not finite: the step is not made, and what was in them is kept."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from fastris.runtime import distributed
from fastris.training.run import MEND_NOT_FINITE, Run

if TYPE_CHECKING:
    from fastris.data import ReferringDataset

SKIPPED = "skipped.jsonl"


def leave_out(run: Run, dataset: ReferringDataset, batch: list[int], loss: float, norm: float, at_most: int) -> str:
    """Record a batch (indices of references) that the run has just left out; returns a line for the log that says so.

    Every process calls it; the main one appends to `skipped.jsonl` in the run's folder.

    Raises:
        RuntimeError: it is number `at_most` in a row, so the run ends.
    """
    position, path, told = run.position, run.folder / SKIPPED, _describe(run, batch, loss, norm)
    row = {
        "epoch": position.epoch + 1,
        "batch": position.batch,
        "after_step": position.step,
        "loss": str(loss),
        "gradient_norm": str(norm),
        "references": batch,
        "ref_ids": [str(dataset.reference(index).ref_id) for index in batch],
    }
    with distributed.together():
        if distributed.is_main():
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if position.skipped_in_a_row >= at_most:
            raise RuntimeError(
                f"{told}, as were the last {position.skipped_in_a_row} in a row (max_skipped); {path} lists them. "
                f"{run.last} is from step {run.saved_step}. {MEND_NOT_FINITE}"
            )
    return f"{told}; {path} lists what was in it"


def _describe(run: Run, batch: list[int], loss: float, norm: float) -> str:
    """One line about the batch that was left out."""
    position = run.position
    found = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    return (
        f"{found} in epoch {position.epoch + 1}, batch {position.batch} (references {_short(batch)}), so it is left out"
    )


def _short(batch: list[int], most: int = 16) -> str:
    return str(batch) if len(batch) <= most else f"{str(batch[:most])[:-1]}, ... {len(batch)} in all]"
