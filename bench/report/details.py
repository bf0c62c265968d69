"""What the times mean: operations, memory and share of the roofline of every cell, and the headline of a case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..cases.arms import ARMS, THEIRS, ours
from ..timing.roofline import Ceilings, bound
from .tables import MIB, Spread, speedup, table


def headline(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best of fastris over the best of the published formulas: ``{"ours", "theirs", "ratio", "low", "high"}``.

    Best is the smallest median; the ratio is the median of the rounds' ratios, between their 20th and 80th percentiles.
    None where one side was not measured.
    """
    times = {name: cell["ms"] for name, cell in arms.items() if cell["status"] == "measured"}
    best = []
    for side in (ours(times), THEIRS):
        there = [name for name in side if name in times]
        if not there:
            return None
        best.append(min(there, key=lambda name: float(np.median(times[name]))))
    ratio = speedup(times[best[1]], times[best[0]])
    if ratio is None:
        return None
    return {"ours": best[0], "theirs": best[1], "ratio": ratio.median, "low": ratio.low, "high": ratio.high}


def add_shares(result: Mapping[str, Any], ceilings: Ceilings) -> None:
    """Fill in what follows from ``ceilings``: every case's bound, every measured cell's ``flops`` and ``share``."""
    for case in result["cases"]:
        work = case["roofline"]
        if "error" in work:
            continue
        work.update(bound(work, ceilings))
        for name, cell in case["arms"].items():
            if cell["ms"]:
                cell["flops"] = work["flops"]["reference" if ARMS[name].impl == "reference" else "torch"]
                cell["share"] = work["ms"] / float(np.median(cell["ms"]))


COLUMNS = ("case", "arm", "GFLOP", "GFLOP/s", "share of roofline", "kept, MiB", "peak, MiB")


def markdown(result: Mapping[str, Any]) -> str:
    """The second table of a result, its ceilings above and its headlines below it."""
    rows = [row for case in result["cases"] for row in _rows(case)]
    parts = [_ceilings(result["ceilings"]), table(COLUMNS, rows)]
    heads = [_headline(case) for case in result["cases"] if case.get("headline")]
    if heads:
        parts.append("Best of fastris over best of repaired eager and compiled:\n" + "\n".join(heads))
    goals = [line for case in result["cases"] for line in target_lines(case)]
    if goals:
        parts.append(
            "Targets, the best of fastris over another arm, or its share of the roofline:\n" + "\n".join(goals)
        )
    return "\n\n".join(part for part in parts if part)


def target_lines(case: Mapping[str, Any]) -> list[str]:
    """One line for each of the case's targets: what was found, and whether that reaches it."""
    cells = {name: cell for name, cell in case["arms"].items() if cell["status"] == "measured"}
    there = [name for name in ours(cells) if name in cells]
    lines = []
    for name, target in case.get("targets", {}).items():
        if not there or (name != "share" and name not in cells):
            lines.append(f"  {case['name']}: {name} {target:g}: not measured")
            continue
        best = min(there, key=lambda arm: float(np.median(cells[arm]["ms"])))
        if name == "share":
            found, what = cells[best].get("share") or 0.0, "of the roofline"
        else:
            ratio = speedup(cells[name]["ms"], cells[best]["ms"])
            found, what = (0.0 if ratio is None else ratio.median), f"times faster than {name}"
        verdict = "reached" if found >= target else "not reached"
        lines.append(f"  {case['name']}: {found:.2f} {what} ({best}), target {target:g}: {verdict}")
    return lines


def _ceilings(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return (
        f"Ceilings measured in this run: copy {found['copy_bytes_per_s'] / 1e9:.1f} GB/s, {found['dtype']} matrix "
        f"product {found['matrix_flops_per_s'] / 1e9:.0f} GFLOP/s. Share of roofline: the least time that compulsory "
        "bytes and the fewest operations known need under them, over the median."
    )


def _rows(case: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, cell in case["arms"].items():
        if not cell["ms"]:
            continue
        flops, share = cell["flops"], cell["share"]
        rate = None if flops is None else flops / float(np.median(cell["ms"])) * 1000
        rows.append(
            (
                "" if rows else f"{case['name']}, B={case['sizes'].get('batch', '?')}, {case['passes']}",
                name,
                "-" if flops is None else f"{flops / 1e9:.3g}",
                "-" if rate is None else f"{rate / 1e9:.3g}",
                "-" if share is None else f"{100 * share:.0f} %",
                _mib(cell["kept_bytes"]),
                _mib(cell["peak_bytes"]),
            )
        )
    return rows


def _headline(case: Mapping[str, Any]) -> str:
    found = case["headline"]
    spread = Spread(found["ratio"], found["low"], found["high"])
    return (
        f"  {case['name']}, B={case['sizes'].get('batch', '?')}, {case['passes']}: {spread.median:.2f}x "
        f"[{spread.low:.2f}-{spread.high:.2f}] ({found['ours']} over {found['theirs']})"
    )


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / MIB:.1f}"
