"""``python -m bench.modelled.cards``: a model of CRIS's training step on cards that nobody here has measured.

Every number is *modelled*: each operation of the step (see traffic.py) takes the longer of its arithmetic at an assumed
share of the card's matrix rate and its bytes at an assumed share of its bandwidth, and no less than a launch. The same
model is held against every device that was measured, so that a reader sees how far off it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastris.runtime.cards import CARDS, Card

from ..options import with_arguments
from ..report.pages import CARDS_FORMAT, cards_page
from ..report.results import save
from ..timing import machine
from ..timing.roofline import measure_ceilings
from . import traffic

RESULTS = Path(__file__).resolve().parents[1] / "results"
RESULT = RESULTS / "modelled_cards.json"
BATCH = 16

MATRIX_SHARE = 0.7
BANDWIDTH_SHARE = 0.85
LAUNCH_SECONDS = 5e-6


def rates(card: Card) -> Rates:
    """What ``card`` is taken to reach."""
    return Rates(
        MATRIX_SHARE * card.matrix_rate,
        MATRIX_SHARE * card.wide_rate,
        BANDWIDTH_SHARE * card.bandwidth * 1e9,
        LAUNCH_SECONDS,
    )


@dataclass(frozen=True)
class Rates:
    """What a device is taken to reach: operations per second, bytes per second, and the least seconds of a kernel."""

    low: float
    wide: float
    bytes: float
    launch: float

    def milliseconds(self, operations: Sequence[Mapping[str, Any]]) -> float:
        """Time of these operations, one after the other."""
        total = 0.0
        for operation in operations:
            arithmetic = operation["flops"] / (self.wide if operation["wide"] else self.low)
            total += max(arithmetic, operation["bytes"] / self.bytes, self.launch) * operation["count"]
        return 1000 * total


def model(folder: Path = RESULTS) -> dict[str, Any]:
    """Count, model every card, and hold the model against every result file in ``folder``."""
    paths = traffic.count_stages(BATCH)
    paths["triton"] = traffic.with_kernels(paths["torch"], BATCH)
    stages = {
        path: {
            stage: {
                "flops": sum(o["flops"] * o["count"] for o in operations),
                "bytes": sum(o["bytes"] * o["count"] for o in operations),
                "kernels": sum(o["count"] for o in operations),
                "ms": {card.name: rates(card).milliseconds(operations) for card in CARDS},
            }
            for stage, operations in counted.items()
        }
        for path, counted in paths.items()
    }
    return {
        "format": CARDS_FORMAT,
        "command": ["python", "-m", "bench.modelled.cards"],
        "modelled": f"training step of CRIS-RN50, 416x416, 17 words, batch {BATCH}, bf16 autocast, fused Adam",
        "git": machine.git_state(),
        "assumptions": {
            "matrix_share": MATRIX_SHARE,
            "bandwidth_share": BANDWIDTH_SHARE,
            "launch_seconds": LAUNCH_SECONDS,
            "cards": [{**asdict(card), "matrix_rate": card.matrix_rate, "wide_rate": card.wide_rate} for card in CARDS],
        },
        "batch": BATCH,
        "paths": stages,
        "checks": traffic.checks(folder, rates_of),
    }


def rates_of(result: Mapping[str, Any]) -> tuple[Callable[[traffic.Counted], float], str] | None:
    """How long operations take on a measured device, and its rates in words: its card's, or ceilings measured with it.

    A processor whose file has no ceilings is measured now. None for a device that is no processor and no known card.
    """
    about = result["machine"]
    for card in CARDS:
        if card.name.removesuffix(" 12GB") in about["device"]["name"]:
            return rates(card).milliseconds, f"as assumed for the {card.name}"
    if about["device"]["type"] != "cpu":
        return None
    ceilings, origin = result.get("ceilings"), "in the same run"
    if not ceilings:
        torch.set_num_threads(about["threads"])
        dtype = getattr(torch, result["settings"]["dtype"])
        ceilings = asdict(measure_ceilings(torch.device("cpu"), dtype, lambda: None))
        origin = "when the model was made"
    matrix, copy = ceilings["matrix_flops_per_s"], ceilings["copy_bytes_per_s"]
    text = f"{matrix / 1e9:.0f} GFLOP/s and {copy / 1e9:.1f} GB/s, measured {origin}"
    return Rates(matrix, matrix, copy, LAUNCH_SECONDS).milliseconds, text


def main(arguments: Sequence[str]) -> int:
    def work() -> int:
        content = model()
        save(RESULT, content)
        print(cards_page(content, str(RESULT.relative_to(machine.ROOT))))
        return 0

    return with_arguments("bench.modelled.cards", "", not arguments, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
