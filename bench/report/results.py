"""Result files, and what follows from their numbers: ratios within rounds, the best arms, goals and headlines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastris.runtime.storage import replacing

from ..timing import machine

FORMAT = 1
"""Version of the result files that this module reads and ``fastris bench`` writes."""

MIB = 2**20

LEFT_OUT = "left out"
"""Status of an arm that a quick run does not measure."""

OTHERS = ("reference", "published", "repaired", "compiled", "max_autotune")
"""How the names of arms begin that are not fastris: the published formulas, as they are, repaired, compiled."""


class Spread(NamedTuple):
    """The median of some samples, and the 20th and 80th percentiles, between which the middle 60 % lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        low, median, high = np.percentile(samples, (20, 50, 80))
        return cls(float(median), float(low), float(high))


def speedup(baseline: Sequence[float], samples: Sequence[float]) -> Spread | None:
    """How many times faster than the baseline, from the rounds in which both were timed; None where there is none.

    Ratios are taken within each round and only then summarised: what slows a whole round down cancels.
    """
    ratios = [slow / fast for slow, fast in zip(baseline, samples, strict=False)]
    return Spread.of(ratios) if ratios else None


def verdict(ratio: Spread, goal: float, at_most: bool = False) -> str:
    """Whether ``ratio`` reaches ``goal``, and whether its own spread leaves that open."""
    met = ratio.median <= goal if at_most else ratio.median >= goal
    open_ = ratio.low < goal <= ratio.high
    return ("yes" if met else "no") + (", within noise" if open_ and ratio.low != ratio.high else "")


def is_measured(cell: Mapping[str, Any]) -> bool:
    return cell["status"] == "measured"


def gains(case: Mapping[str, Any]) -> dict[str, Spread]:
    """Arm -> how many times faster than the case's baseline, for every other arm that was timed."""
    baseline = case["arms"].get(case["baseline"], {}).get("ms", [])
    found = {
        arm: speedup(baseline, cell["ms"])
        for arm, cell in case["arms"].items()
        if is_measured(cell) and arm != case["baseline"]
    }
    return {arm: gain for arm, gain in found.items() if gain is not None}


def is_own(case: Mapping[str, Any], arm: str) -> bool:
    """Whether an arm is fastris, to which the case's goal applies; else it is what fastris is compared with."""
    if "goal_arms" in case:
        return arm in case["goal_arms"]
    return arm != case["baseline"] and not arm.startswith(OTHERS)


def best_arms(case: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The fastest arm of fastris and the fastest other one, by their medians; None where there is none.

    Where Triton was measured, plain PyTorch does not count as fastris: there it is the algebra, and not what runs.
    """
    medians = {arm: Spread.of(cell["ms"]).median for arm, cell in case["arms"].items() if is_measured(cell)}
    own = [arm for arm in medians if is_own(case, arm) and not (arm == "torch" and "triton" in medians)]
    others = [arm for arm in medians if not is_own(case, arm)]
    fastest, other = (min(side, key=medians.__getitem__) if side else None for side in (own, others))
    return fastest, other


def lead(case: Mapping[str, Any]) -> Spread | None:
    """How many times faster the best arm of fastris is than the best other one; below 1 it is slower."""
    own, other = best_arms(case)
    return None if own is None or other is None else speedup(case["arms"][other]["ms"], case["arms"][own]["ms"])


def headline(case: Mapping[str, Any]) -> dict[str, Any] | None:
    """The best of fastris over the best of the repaired formulas: ``{"ours", "theirs", "ratio", "low", "high"}``.

    The formulas as published, the baseline, are left out. None where one side was not measured.
    """
    tuned = {**case, "arms": {arm: cell for arm, cell in case["arms"].items() if arm != case["baseline"]}}
    (own, other), ratio = best_arms(tuned), lead(tuned)
    if ratio is None:
        return None
    return {"ours": own, "theirs": other, "ratio": ratio.median, "low": ratio.low, "high": ratio.high}


def reached(case: Mapping[str, Any], arm: str) -> Spread | None:
    """How many times faster the best arm of fastris is than ``arm``, or for "share" its part of the roofline."""
    own, cells = best_arms(case)[0], case["arms"]
    if own is None:
        return None
    if arm == "share":
        share = cells[own].get("share")
        return None if share is None else Spread(share, share, share)
    return speedup(cells[arm]["ms"], cells[own]["ms"]) if arm in cells and is_measured(cells[arm]) else None


class Goal(NamedTuple):
    """One thing that a case has to reach: as written, what was reached, and whether that is enough."""

    text: str
    reached: str
    met: str


def goals(case: Mapping[str, Any]) -> list[Goal]:
    """The goal over the baseline and the targets over other arms or of the roofline, for the best arm of fastris."""
    wanted = {case["baseline"]: case["goal"]} if case["goal"] is not None else {}
    found = []
    for arm, least in (wanted | case.get("targets", {})).items():
        text = f"{100 * least:.0f} % of roofline" if arm == "share" else f"{least:g}x"
        text += "" if arm in (case["baseline"], "share") else f" {arm}"
        ratio = reached(case, arm)
        if ratio is None:
            found.append(Goal(text, "-", "no"))
        else:
            value = f"{100 * ratio.median:.0f} %" if arm == "share" else f"{number(ratio.median)}x"
            found.append(Goal(text, value, verdict(ratio, least)))
    return found


def main_cases(cases: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """What pages and charts show first: goals, whole models, and wherever fastris is slower; all if there are none."""
    return [case for case in cases if goals(case) or case["op"] == "model" or is_slower(case)] or cases


def is_slower(case: Mapping[str, Any]) -> bool:
    """Whether fastris at its best is slower than the best other arm."""
    ahead = lead(case)
    return ahead is not None and reads_slower(ahead.median)


def kept_bytes(cell: Mapping[str, Any], *stages: str) -> int:
    """Bytes that an arm keeps for backward in these stages, or in all."""
    found = cell.get("stages", {})
    return sum(found[name]["activations"] + found[name]["weight_copies"] for name in stages or found if name in found)


def case_name(case: Mapping[str, Any]) -> str:
    """The case's own name, and what else tells it from its neighbours."""
    batch = case["sizes"].get("batch")
    part = case["passes"] if case["passes"].endswith("alone") else ""
    return ", ".join(filter(None, (case["name"], f"B={batch}" if batch is not None else "", part)))


def reads_slower(factor: float) -> bool:
    """Whether a factor is below 1 as it is written: 0.998, which reads 1.00x, is not called slower."""
    return float(number(factor)) < 1


def number(value: float) -> str:
    """With three digits or so."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


class ResultFile:
    """What was measured so far, kept on disk as it grows where there is a ``path``. Makes the process ready to measure.

    ``command`` and ``settings`` are what was asked for, ``facts`` what else the file holds.
    """

    def __init__(
        self,
        path: Path | None,
        command: Sequence[str],
        device: torch.device,
        threads: int | None,
        settings: Mapping[str, Any],
        **facts: Any,
    ):
        self.path = path
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "command": list(command),
            "complete": False,
            "machine": machine.prepare(device, threads),
            "settings": settings,
            **facts,
            "cases": [],
            "memory": None,
        }

    def save(self) -> None:
        """Write the file."""
        if self.path is not None:
            save(self.path, self.content)

    @contextmanager
    def growing(self) -> Iterator[None]:
        """A block that measures. Ctrl-C ends it, keeps what is there, and leaves the file incomplete."""
        self.save()  # a file that cannot be written is better known now
        try:
            yield
            self.content["complete"] = True
        except KeyboardInterrupt:
            pass
        self.save()

    def troubles(self) -> bool:
        """Whether an arm was refused, failed or ran out of memory."""
        entries = [*self.content["cases"], *filter(None, [self.content["memory"]])]
        cells = [cell for entry in entries for cell in entry["arms"].values()]
        return any(cell["message"] and cell["status"] != LEFT_OUT for cell in cells)


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file as a whole, so that whoever reads it sees the old or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_json(path: Path, mend: str = "give one that python -m bench --json wrote") -> Any:
    """What a JSON file holds. Raises ValueError, with the mend, where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file ({error}); {mend}") from None


def load(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError when it is none, or of another format."""
    result = load_json(path)
    found = result.get("format") if isinstance(result, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}, and this version reads {FORMAT}; measure again")
    return result
