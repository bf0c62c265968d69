"""Tables from result files: ``python -m bench.report FILE`` prints the Markdown that README shows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 1
"""Version of the result files that this module reads and ``python -m bench`` writes."""

MIB = 2**20


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


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of one result, under a line that says where it comes from."""
    parts = [_caption(result)]
    if result["cases"]:
        parts.append(_table(TIMED_COLUMNS, [row for case in result["cases"] for row in _timed_rows(case)]))
    if result.get("memory"):
        parts += [_memory_caption(result["memory"]), _table(MEMORY_COLUMNS, _memory_rows(result["memory"]))]
    return "\n\n".join(parts)


TIMED_COLUMNS = ("case", "arm", "ms, median [p20-p80]", "times faster than reference", "goal", "met")
MEMORY_COLUMNS = ("arm", "MiB per image", "of them copies of weights", "share of reference", "goal", "met")


def _timed_rows(case: Mapping[str, Any]) -> list[tuple[str, ...]]:
    baseline = case["arms"].get(case["baseline"], {}).get("ms", [])
    rows: list[tuple[str, ...]] = []
    for arm, cell in case["arms"].items():
        goal = (
            case["goal"] if arm in case.get("goal_arms", [a for a in case["arms"] if a != case["baseline"]]) else None
        )
        ratio = speedup(baseline, cell["ms"]) if cell["status"] == "measured" else None
        rows.append(
            (
                "" if rows else f"{case['title']}, {case['passes']}",
                arm,
                _spread(Spread.of(cell["ms"])) if cell["status"] == "measured" else _trouble(cell),
                "-" if ratio is None or arm == case["baseline"] else _spread(ratio, "x"),
                "-" if goal is None else f"{goal:g}x",
                "-" if goal is None else "no" if ratio is None else verdict(ratio, goal),
            )
        )
    return rows


def _memory_rows(memory: Mapping[str, Any]) -> list[tuple[str, ...]]:
    batch, baseline = memory["batch"], memory["arms"].get(memory["baseline"], {})
    reference = _kept(baseline)
    rows: list[tuple[str, ...]] = []
    for arm, cell in memory["arms"].items():
        if cell["status"] != "measured":
            rows.append((arm, _trouble(cell), "-", "-", "-", "-"))
            continue
        kept, copies = _kept(cell), sum(stage["weight_copies"] for stage in cell["stages"].values())
        share = kept / reference if reference and arm != memory["baseline"] else None
        stages = ", ".join(f"{name} {_mib(stage, batch)}" for name, stage in cell["stages"].items())
        rows.append(
            (
                arm,
                f"{kept / batch / MIB:.0f} ({stages})",
                f"{copies / batch / MIB:.0f}",
                "-" if share is None else f"{share:.2f}x",
                "-" if share is None else f"at most {memory['goal']:g}x",
                "-" if share is None else verdict(Spread(share, share, share), memory["goal"], at_most=True),
            )
        )
    return rows


def _kept(cell: Mapping[str, Any]) -> int:
    return sum(stage["activations"] + stage["weight_copies"] for stage in cell.get("stages", {}).values())


def _mib(stage: Mapping[str, int], batch: int) -> str:
    return f"{(stage['activations'] + stage['weight_copies']) / batch / MIB:.0f}"


def _caption(result: Mapping[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    revision = machine["git"]["revision"]
    source = f"revision {revision[:10]}" if revision else "unknown revision"
    facts = [
        machine["device"]["name"],
        f"{machine['threads']} threads",
        settings["dtype"],
        f"PyTorch {machine['versions']['torch']}",
        f"fastris {machine['versions']['fastris']}, {source}{' with changes' if machine['git']['dirty'] else ''}",
        machine["date"][:10],
    ]
    notes = ["Every arm's outputs and gradients were held against float64 before it was timed; arms took turns."]
    if settings["quick"]:
        notes.append("Quick: few rounds, checked on small copies.")
    if not result["complete"]:
        notes.append("Incomplete: stopped by Ctrl-C.")
    return ", ".join(facts) + ". " + " ".join(notes)


def _memory_caption(memory: Mapping[str, Any]) -> str:
    text = memory["title"]
    return f"{text[0].upper()}{text[1:]}. Parameters are not counted, low-precision copies of them are."


def _trouble(cell: Mapping[str, Any]) -> str:
    return f"{cell['status'].upper()}: {cell['message']}" if cell["message"] else "not timed"


def _spread(spread: Spread, unit: str = "") -> str:
    return f"{_number(spread.median)}{unit} [{_number(spread.low)}-{_number(spread.high)}]"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source is aligned, so that it reads well on a terminal, too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    head, *body = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def load(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError when it is none, or of another format."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file ({error}); give one that python -m bench --json wrote") from None
    found = result.get("format") if isinstance(result, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}, and this version reads {FORMAT}; measure again")
    return result


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m bench.report FILE.json", file=sys.stderr)
        return 2
    try:
        print(markdown(load(Path(arguments[0]))))
    except (OSError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
