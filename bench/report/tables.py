"""Tables from result files: ``python -m bench.report.tables FILE`` prints them; docs.py puts them into docs/.

A run prints a row for every case and arm, which suits a terminal; a page gets a row for every case and a column for
every arm. Arms, cases, stages and optional numbers that a file has, and that this module has never
heard of, appear by themselves.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 1
"""Version of the result files that this module reads and ``python -m bench`` writes."""

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
    """The fastest arm of fastris and the fastest other one, by their medians; None where there is none."""
    medians = {arm: Spread.of(cell["ms"]).median for arm, cell in case["arms"].items() if is_measured(cell)}
    sides = [[arm for arm in medians if is_own(case, arm) is own] for own in (True, False)]
    own, other = (min(side, key=medians.__getitem__) if side else None for side in sides)
    return own, other


def lead(case: Mapping[str, Any]) -> Spread | None:
    """How many times faster the best arm of fastris is than the best other one; below 1 it is slower."""
    own, other = best_arms(case)
    return None if own is None or other is None else speedup(case["arms"][other]["ms"], case["arms"][own]["ms"])


TALL = ("case", "arm", "ms [p20-p80]", "times faster", "goal", "met")


class Goal(NamedTuple):
    """One thing that a case has to reach: as written, what was reached, and whether that is enough."""

    text: str
    reached: str
    met: str


def goals(case: Mapping[str, Any]) -> list[Goal]:
    """The goal over the baseline and the targets over other arms or of the roofline, for the best arm of fastris."""
    own, _ = best_arms(case)
    wanted = {case["baseline"]: case["goal"]} if case["goal"] is not None else {}
    found = []
    for arm, least in (wanted | case.get("targets", {})).items():
        cell = case["arms"].get(own, {}) if arm == "share" else case["arms"].get(arm, {})
        text = f"{100 * least:.0f} % of roofline" if arm == "share" else f"{least:g}x"
        text += "" if arm in (case["baseline"], "share") else f" {arm}"
        ratio = None
        if own is not None and arm == "share" and cell.get("share") is not None:
            ratio = Spread(cell["share"], cell["share"], cell["share"])
        elif own is not None and arm != "share" and cell.get("ms"):
            ratio = speedup(cell["ms"], case["arms"][own]["ms"])
        if ratio is None:
            found.append(Goal(text, "-", "no"))
        else:
            reached = f"{100 * ratio.median:.0f} %" if arm == "share" else f"{number(ratio.median)}x"
            found.append(Goal(text, reached, verdict(ratio, least)))
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """All of one result, under a line that says where it comes from. What a run prints."""
    parts = [caption(result)]
    if result["cases"]:
        parts += [
            table(TALL, [row for case in result["cases"] for row in _tall_rows(case)]),
            _legend(result["cases"]),
            findings(result["cases"]),
        ]
    if result.get("memory"):
        parts.append(memory_table(result["memory"]))
    return "\n\n".join(parts)


def _tall_rows(case: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    gain = gains(case)
    for place, (arm, cell) in enumerate(case["arms"].items()):
        goal = case["goal"] if is_own(case, arm) and cell["status"] != LEFT_OUT else None
        yield (
            "" if place else case_name(case),
            arm,
            spread(Spread.of(cell["ms"])) if is_measured(cell) else _trouble(cell),
            spread(gain[arm], "x") + _slower(gain[arm]) if arm in gain else "-",
            "-" if goal is None else f"{goal:g}x",
            "-" if goal is None else verdict(gain[arm], goal) if arm in gain else "no",
        )


def case_name(case: Mapping[str, Any]) -> str:
    """The case's own name, and what else tells it from its neighbours."""
    batch = case["sizes"].get("batch")
    part = case["passes"] if case["passes"].endswith("alone") else ""
    return ", ".join(filter(None, (case["name"], f"B={batch}" if batch is not None else "", part)))


def _legend(cases: Sequence[Mapping[str, Any]]) -> str:
    """What the names mean, and what went wrong."""
    lines = dict.fromkeys(f"- {case_name(case)}: {case['title']}, {case['passes']}" for case in cases)
    for case in cases:
        told = ((arm, cell) for arm, cell in case["arms"].items() if cell["message"])
        lines |= dict.fromkeys(f"- {case_name(case)}, {arm}: {_trouble(cell)}: {cell['message']}" for arm, cell in told)
    return "\n".join(lines)


def findings(cases: Sequence[Mapping[str, Any]], named: Callable[[Mapping[str, Any]], str] = case_name) -> str:
    """Two lines for whoever reads no table: where fastris is slower, and which goals are not met."""
    slower, missed = [], []
    for case in cases:
        own, other = best_arms(case)
        ahead = lead(case)
        if ahead is not None and reads_slower(ahead.median):
            noise = ", within noise" if ahead.high >= 1 else ""
            slower.append(f"{named(case)} ({own}: {number(ahead.median)}x the speed of {other}{noise})")
        missed += [f"{named(case)} ({g.reached} of {g.text})" for g in goals(case) if g.met.startswith("no")]
    return (
        f"Slower than the best other arm: {'; '.join(slower) or 'nothing here'}.\n"
        f"Goals not met: {'; '.join(missed) or 'none'}."
    )


PAGE_NOTE = (
    "Median time of one step. Factors are over the first column, with the range of the middle 60 % of the rounds; the "
    "goal is for the best arm of fastris."
)


def page(result: Mapping[str, Any], source: str) -> str:
    """The same for a page: one row per case, few columns; every arm behind a fold. ``source`` names the file."""
    parts = []
    if cases := result["cases"]:
        main = main_cases(cases)
        parts += [PAGE_NOTE, _narrow_table(main), findings(cases, _long_name).replace("\n", "\n\n")]
        arms = {arm for case in cases for arm in case["arms"]}
        if len(arms) > 2 or len(main) < len(cases):
            parts.append(f"<details><summary>Every case and arm</summary>\n\n{_wide_table(cases)}\n\n</details>")
    if result.get("memory"):
        parts.append(memory_table(result["memory"]))
    return "\n\n".join([*parts, f"<sub>{caption(result)} Raw data: `{source}`.</sub>"])


def main_cases(cases: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """What pages and charts show first: goals, whole models, and wherever fastris is slower; all if there are none."""
    return [case for case in cases if goals(case) or case["op"] == "model" or _is_slower(case)] or cases


def _is_slower(case: Mapping[str, Any]) -> bool:
    ahead = lead(case)
    return ahead is not None and reads_slower(ahead.median)


def _narrow_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """Baseline, the best other arm where there are others, the best arm of fastris, and the goal."""
    first = cases[0]["baseline"]
    others = any(not is_own(case, arm) and arm != first for case in cases for arm in case["arms"])
    rows = []
    for case in cases:
        own, other = best_arms(case)
        best = [_wide_cell(case, other, named=True)] if others else []
        ahead = lead(case) if others else None
        factor = "" if ahead is None else f"<br>{number(ahead.median)}x the best other{_slower(ahead)}"
        cells = [_wide_cell(case, first), *best, _wide_cell(case, own, named=True) + factor, _wide_goal(case)]
        rows.append((_label(case), *cells))
    return table(("", first, *(["best other"] if others else []), "fastris", "goal"), rows, aligned=False)


def _wide_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """One column for every arm."""
    arms = list(dict.fromkeys(arm for case in cases for arm in case["arms"]))
    rows = [(_label(case), *(_wide_cell(case, arm) for arm in arms)) for case in cases]
    return table(("", *arms), rows, aligned=False)


def _wide_cell(case: Mapping[str, Any], arm: str | None, named: bool = False) -> str:
    cell = case["arms"].get(arm)
    if cell is None:
        return "-"
    if not is_measured(cell):
        return "-" if cell["status"] == LEFT_OUT else f"**{_trouble(cell)}**"
    gain = gains(case).get(arm or "")
    lines = [f"{number(Spread.of(cell['ms']).median)} ms"]
    if gain is not None:
        lines.append(f"**{number(gain.median)}x{_slower(gain)}**")
        lines.append(f"<sub>{number(gain.low)} to {number(gain.high)}</sub>")
    if cell.get("share") is not None:
        lines.append(f"<sub>{100 * cell['share']:.0f} % of roofline</sub>")
    return "<br>".join([*([f"<sub>{arm}</sub>"] if named else []), *lines])


def _wide_goal(case: Mapping[str, Any]) -> str:
    return "<br>".join(f"{g.text}: " + (g.met if g.met.startswith("yes") else f"**{g.met}**") for g in goals(case))


def _label(case: Mapping[str, Any]) -> str:
    return f"{_head(case)}<br><sub>{_details(case)}</sub>"


def _long_name(case: Mapping[str, Any]) -> str:
    return f"{_head(case)}, {_details(case).partition(',')[0]}"


def _head(case: Mapping[str, Any]) -> str:
    return case["title"].partition(":")[0]


def _details(case: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (case["title"].partition(":")[2].strip(), case["passes"])))


def memory_table(memory: Mapping[str, Any]) -> str:
    """Bytes kept for backward: one row per stage, one column per arm, the total and its share of the baseline's."""
    arms, batch = memory["arms"], memory["batch"]
    stages = list(dict.fromkeys(name for cell in arms.values() for name in cell.get("stages", {})))
    rows = [(name, *(_mib(cell, batch, name) for cell in arms.values())) for name in stages]
    rows.append(("**together**", *(f"**{_mib(cell, batch, *stages)}**" for cell in arms.values())))
    copies = [sum(kept["weight_copies"] for kept in cell.get("stages", {}).values()) for cell in arms.values()]
    rows.append(("of which copies of weights", *(f"{value / batch / MIB:.0f}" if value else "-" for value in copies)))
    rows.append((f"share of {memory['baseline']}", *(_share(memory, arm) for arm in arms)))
    text = memory["title"]
    notes = [f"{arm}: {_trouble(cell)}: {cell['message']}" for arm, cell in arms.items() if cell["message"]]
    lines = [f"{text[0].upper()}{text[1:]}. Parameters are not counted, low-precision copies of them are.", *notes]
    return "\n".join(lines) + "\n\n" + table(("MiB per image", *arms), rows)


def kept_bytes(cell: Mapping[str, Any], *stages: str) -> int:
    """Bytes that an arm keeps for backward in these stages, or in all."""
    found = cell.get("stages", {})
    return sum(found[name]["activations"] + found[name]["weight_copies"] for name in stages or found if name in found)


def _mib(cell: Mapping[str, Any], batch: int, *stages: str) -> str:
    return f"{kept_bytes(cell, *stages) / batch / MIB:.0f}" if is_measured(cell) else _trouble(cell)


def _share(memory: Mapping[str, Any], arm: str) -> str:
    kept, whole = kept_bytes(memory["arms"][arm]), kept_bytes(memory["arms"].get(memory["baseline"], {}))
    if arm == memory["baseline"] or not kept or not whole:
        return "-"
    share, goal = kept / whole, memory.get("goal")
    met = "" if goal is None else f" (at most {goal:g}: {verdict(Spread(share, share, share), goal, at_most=True)})"
    return f"{share:.2f}{met}"


def caption(result: Mapping[str, Any]) -> str:
    """Where the numbers come from."""
    machine, settings = result["machine"], result["settings"]
    revision = machine["git"]["revision"]
    source = f"revision {revision[:10]}" if revision else "unknown revision"
    facts = [
        machine["device"]["name"],
        f"{machine['threads']} threads",
        *(["freed memory kept for all arms"] if machine.get("keeps_freed_memory") else []),
        settings["dtype"],
        f"PyTorch {machine['versions']['torch']}",
        f"fastris {machine['versions']['fastris']}, {source}{' with changes' if machine['git']['dirty'] else ''}",
        machine["date"][:10],
    ]
    notes = [
        result.get("note")
        or "Every arm's outputs and gradients were held against float64 before it was timed; arms took turns."
    ]
    if settings["quick"]:
        notes.append("Quick: few rounds, checked on small copies.")
    if not result["complete"]:
        notes.append("Incomplete: stopped by Ctrl-C.")
    return ", ".join(facts) + ". " + " ".join(notes)


def _slower(gain: Spread) -> str:
    return "" if not reads_slower(gain.median) else ", slower" if gain.high < 1 else ", slower within noise"


def _trouble(cell: Mapping[str, Any]) -> str:
    trouble = cell["message"] and cell["status"] != LEFT_OUT
    return cell["status"].upper() if trouble else cell["status"] if cell["message"] else "not timed"


def spread(value: Spread, unit: str = "") -> str:
    return f"{number(value.median)}{unit} [{number(value.low)}-{number(value.high)}]"


def reads_slower(factor: float) -> bool:
    """Whether a factor is below 1 as it is written: 0.998, which reads 1.00x, is not called slower."""
    return float(number(factor)) < 1


def number(value: float) -> str:
    """With three digits or so."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], aligned: bool = True) -> str:
    """A Markdown table; ``aligned`` pads its source, so that it reads well on a terminal, too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) if aligned else 1 for i in range(len(columns))]
    head, *body = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file as a whole, so that whoever reads it sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


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
        print("usage: python -m bench.report.tables FILE.json", file=sys.stderr)
        return 2
    try:
        print(markdown(load(Path(arguments[0]))))
    except (OSError, ValueError) as error:
        print(f"bench.report.tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
