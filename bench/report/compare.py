"""What moved between two result files, beyond noise: ``fastris bench --compare OLD.json``, or of two files::

    python -m bench.report.compare OLD.json NEW.json

A case is compared with itself: the same name, sizes and passes, in the same dtype, on the same device with as many
threads. Everything else is listed with the reason. For every arm two things are compared: its milliseconds, and its
time over the baseline's *of the same round*, which a busier or slower machine leaves alone. A change counts as beyond
noise when both hold:

- the exact two-sided rank test (Mann and Whitney, 1947) of the rounds says p < 1 %, which takes 5 rounds on each side;
- the medians differ by more than 5 %, because two runs of one program differ by a few percent, however steady each.

With 2 to 4 rounds on a side, as a quick run has of long cases, a change is beyond noise when the slowest round of one
side is more than 20 % faster than the fastest of the other. One round tells nothing.

An arm *became slower* when its time over the baseline did. The baseline itself has only milliseconds. Where only these
moved, it is shown, but not counted: that is the machine, or what all arms share.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..options import with_arguments
from .results import load_json

SIGNIFICANCE = 0.01
SMALLEST_CHANGE = 0.05
LEAST_ROUNDS = 5
FEW_ROUNDS_CHANGE = 0.2
EXACT_ROUNDS = 60
"""Up to so many rounds of both files together the rank test is exact; beyond, its normal approximation is."""


@dataclass(frozen=True)
class Change:
    """One quantity then and now: medians, their ratio, and whether it is beyond noise; None where nobody can tell."""

    before: float
    now: float
    beyond_noise: bool | None

    @classmethod
    def between(cls, before: Sequence[float], now: Sequence[float]) -> Change:
        first, second = float(np.median(before)), float(np.median(now))
        fewest = min(len(before), len(now))
        if fewest < LEAST_ROUNDS:
            apart = max(min(now) / max(before), min(before) / max(now)) > 1 + FEW_ROUNDS_CHANGE
            return cls(first, second, apart if fewest > 1 else None)
        large = abs(second / first - 1) > SMALLEST_CHANGE
        return cls(first, second, large and rank_test(before, now) < SIGNIFICANCE)

    @property
    def factor(self) -> float:
        return self.now / self.before

    def verdict(self) -> str:
        if self.beyond_noise is None:
            return "one round cannot tell"
        if not self.beyond_noise:
            return "within noise"
        return f"{self.factor:.2f}x the time" + (" (slower)" if self.factor > 1 else " (faster)")


@dataclass(frozen=True)
class Row:
    """One arm of one case in both files. ``relative`` is its time over the baseline's; None for the baseline itself."""

    case: str
    arm: str
    absolute: Change
    relative: Change | None

    def slower(self) -> bool:
        found = self.relative
        return found is not None and bool(found.beyond_noise) and found.factor > 1

    def moved(self) -> bool:
        return bool(self.absolute.beyond_noise) or (self.relative is not None and bool(self.relative.beyond_noise))


@dataclass
class Comparison:
    """Everything that two result files have in common, and what could not be compared and why."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def slower(self) -> bool:
        """Whether an arm became slower, beyond noise, against the baseline of its own run."""
        return any(row.slower() for row in self.rows)

    def text(self) -> str:
        """For people: what moved, what did not, what could not be compared."""
        moved = [row for row in self.rows if row.moved()]
        still = sum(row not in moved and row.absolute.beyond_noise is not None for row in self.rows)
        untold = len(self.rows) - len(moved) - still
        lines = [f"Compared with the older file: {len(moved)} moved beyond noise, {still} did not."]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  {_describe(row)}" for row in moved]
        if untold:
            lines.append(f"  {untold} cannot be told: one of the files has a single round")
        lines += [f"  not compared: {reason}" for reason in self.left_out]
        return "\n".join(lines)


def _describe(row: Row) -> str:
    absolute = f"{row.absolute.before:.4g} -> {row.absolute.now:.4g} ms, {row.absolute.verdict()}"
    if row.relative is None:
        return f"{row.case}, {row.arm}: {absolute}"
    return (
        f"{row.case}, {row.arm}: over the baseline {row.relative.before:.4g} -> {row.relative.now:.4g}, "
        f"{row.relative.verdict()}; {absolute}"
    )


def compare(older: Mapping[str, Any], newer: Mapping[str, Any]) -> Comparison:
    """What moved from ``older`` to ``newer``, the contents of two result files."""
    found = Comparison()
    if older.get("format") != newer.get("format"):
        found.notes.append(f"the files have formats {older.get('format')} and {newer.get('format')}")
    differences = _differences(older, newer)
    if differences:
        found.left_out.append(f"every case: {'; '.join(differences)}")
        return found
    for name, before, now in _versions(older, newer):
        found.notes.append(f"{name} was {before} and is {now}")
    old_cases = {_key(case): case for case in older.get("cases", [])}
    new_cases = {_key(case): case for case in newer.get("cases", [])}
    for key, case in new_cases.items():
        if key not in old_cases:
            found.left_out.append(f"{_name(case)}: the older file does not hold it at these sizes")
        else:
            _compare_case(old_cases[key], case, found)
    found.left_out += [f"{_name(old_cases[key])}: only in the older file" for key in old_cases if key not in new_cases]
    return found


def _compare_case(older: Mapping[str, Any], newer: Mapping[str, Any], found: Comparison) -> None:
    baseline = newer["baseline"]
    same_baseline = older["baseline"] == baseline
    for arm, cell in newer["arms"].items():
        before = older["arms"].get(arm, {"status": "not in the older file"})
        troubles = [c["status"] for c in (before, cell) if not c.get("ms")]
        if troubles:
            found.left_out.append(f"{_name(newer)}, {arm}: {' and '.join(dict.fromkeys(troubles))}")
            continue
        relative = None
        if arm != baseline and same_baseline and older["arms"][baseline].get("ms") and newer["arms"][baseline]["ms"]:
            pairs = ((before, older), (cell, newer))
            relative = Change.between(*(_over(c["ms"], case["arms"][baseline]["ms"]) for c, case in pairs))
        found.rows.append(Row(_name(newer), arm, Change.between(before["ms"], cell["ms"]), relative))


def _over(times: Sequence[float], baseline: Sequence[float]) -> list[float]:
    return [time / base for time, base in zip(times, baseline, strict=False)]


def _key(case: Mapping[str, Any]) -> str:
    return json.dumps([case.get("name"), case.get("passes"), case.get("sizes")], sort_keys=True, default=list)


def _name(case: Mapping[str, Any]) -> str:
    batch = case.get("sizes", {}).get("batch")
    return f"{case.get('name')}{'' if batch is None else f', B={batch}'}, {case.get('passes')}"


def _differences(older: Mapping[str, Any], newer: Mapping[str, Any]) -> list[str]:
    """Why no case of the two files can be compared."""
    facts = {
        "device": ("machine", "device", "name"),
        "threads": ("machine", "threads"),
        "dtype": ("settings", "dtype"),
        "float32 precision": ("machine", "float32"),
    }
    if _look(newer, ("machine", "device", "type")) != "cpu":
        del facts["threads"]
    if _look(older, ("machine", "float32")) is None:  # older files do not tell
        del facts["float32 precision"]
    return [
        f"{name} was {before} and is {now}"
        for name, path in facts.items()
        if (before := _look(older, path)) != (now := _look(newer, path))
    ]


def _versions(older: Mapping[str, Any], newer: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = sorted(set(_look(older, ("machine", "versions")) or {}) | set(_look(newer, ("machine", "versions")) or {}))
    pairs = [(name, *(_look(result, ("machine", "versions", name)) for result in (older, newer))) for name in names]
    return [(name, before, now) for name, before, now in pairs if before != now]


def _look(result: Any, path: Sequence[str]) -> Any:
    for name in path:
        result = result.get(name) if isinstance(result, Mapping) else None
    return result


def rank_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the rank test that both come from one distribution; ties count half. Exact for short samples."""
    m, n = len(first), len(second)
    wins = sum((a > b) + 0.5 * (a == b) for a in first for b in second)
    extreme = min(wins, m * n - wins)
    if m + n > EXACT_ROUNDS:
        deviation = (m * n * (m + n + 1) / 12) ** 0.5
        z = max(0.0, abs(wins - m * n / 2) - 0.5) / deviation
        return math.erfc(z / 2**0.5)
    counts = _rank_counts(m, n)
    total = sum(counts)
    return min(1.0, 2 * sum(counts[: int(extreme + 0.5) + 1]) / total)


def _rank_counts(m: int, n: int) -> list[int]:
    """How many of the orders of m and n samples have u pairs the wrong way round, for every u: Gaussian binomials."""
    counts = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for u in range(m * n, n + i - 1, -1):  # times (1 - q^(n+i))
            counts[u] -= counts[u - n - i]
        for u in range(i, m * n + 1):  # over (1 - q^i)
            counts[u] += counts[u - i]
    return counts


def load_any(path: Path) -> dict[str, Any]:
    """A result file of any format version. Raises ValueError when it is none, OSError when it cannot be read."""
    try:
        result = load_json(path, "give one that fastris bench json=... wrote")
    except ValueError as error:
        raise ValueError(f"compare: {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("cases"), list) or "machine" not in result:
        raise ValueError(f"compare: {path} is no result file; give one that fastris bench json=... wrote")
    return result


def main(arguments: Sequence[str]) -> int:
    def show() -> int:
        found = compare(*(load_any(Path(argument)) for argument in arguments))
        print(found.text())
        return int(found.slower())

    fits = len(arguments) == 2 and not any(argument.startswith("-") for argument in arguments)
    return with_arguments("bench.report.compare", "OLD.json NEW.json", fits, show)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
