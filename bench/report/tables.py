"""Tables of result files: ``python -m bench.report.tables FILE`` prints them; docs.py puts them into docs/.

A run prints a row for every case and arm, which suits a terminal; a page gets a row for every case and a column for
every arm. Arms, cases, stages and optional numbers that a file has, and that this module has never heard of, appear by
themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastris.runtime.markdown import markdown_table

from ..options import with_arguments
from .results import (
    LEFT_OUT,
    MIB,
    Spread,
    best_arms,
    case_name,
    gains,
    goals,
    is_measured,
    is_own,
    is_slower,
    kept_bytes,
    lead,
    load,
    main_cases,
    number,
    reads_slower,
    verdict,
)

TALL = ("case", "arm", "ms [p20-p80]", "times faster", "goal", "met")


def markdown(result: Mapping[str, Any]) -> str:
    """All of one result, under a line that says where it comes from. What a run prints."""
    parts = [caption(result)]
    if cases := result["cases"]:
        rows = [row for case in cases for row in _tall_rows(case)]
        parts += [markdown_table(TALL, rows, aligned=True), _legend(cases), findings(cases)]
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


def _legend(cases: Sequence[Mapping[str, Any]]) -> str:
    """What the names mean, and what went wrong."""
    lines = [f"- {case_name(case)}: {case['title']}, {case['passes']}" for case in cases]
    for case in cases:
        told = ((arm, cell) for arm, cell in case["arms"].items() if cell["message"])
        lines += [f"- {case_name(case)}, {arm}: {_trouble(cell)}: {cell['message']}" for arm, cell in told]
    return "\n".join(dict.fromkeys(lines))


def findings(cases: Sequence[Mapping[str, Any]], named: Callable[[Mapping[str, Any]], str] = case_name) -> str:
    """Two lines for whoever reads no table: where fastris is slower, and which goals are not met."""
    slower, missed = [], []
    for case in cases:
        own, other = best_arms(case)
        ahead = lead(case)
        if ahead is not None and is_slower(case):
            noise = ", within noise" if ahead.high >= 1 else ""
            slower.append(f"{named(case)} ({own}: {number(ahead.median)}x the speed of {other}{noise})")
        missed += [f"{named(case)} ({g.reached} of {g.text})" for g in goals(case) if g.met.startswith("no")]
    return (
        f"Slower than the best other arm: {'; '.join(slower) or 'nothing here'}.\n"
        f"Goals not met: {'; '.join(missed) or 'none'}."
    )


DETAILS = ("case", "arm", "GFLOP", "GFLOP/s", "share of roofline", "kept, MiB", "peak, MiB")


def details(result: Mapping[str, Any]) -> str:
    """The second table of a run: work and memory, the ceilings above it, headlines and goals below."""
    rows = [row for case in result["cases"] for row in _detail_rows(case)]
    parts = [markdown_table(DETAILS, rows, aligned=True)]
    if found := result["ceilings"]:
        text = (
            f"Ceilings measured in this run: copy {found['copy_bytes_per_s'] / 1e9:.1f} GB/s, {found['dtype']} matrix "
            f"product {found['matrix_flops_per_s'] / 1e9:.0f} GFLOP/s. Share of roofline: the least time that "
            "compulsory bytes and the fewest operations known need under them, over the median."
        )
        parts.insert(0, text)
    heads = [(case_name(case), case["headline"]) for case in result["cases"] if case.get("headline")]
    lines = [
        f"  {name}: {spread(Spread(h['ratio'], h['low'], h['high']), 'x')} ({h['ours']} over {h['theirs']})"
        for name, h in heads
    ]
    if lines:
        parts.append("\n".join(["Best of fastris over best of repaired eager and compiled:", *lines]))
    lines = [f"  {case_name(case)}: {g.text}: {g.met} ({g.reached})" for case in result["cases"] for g in goals(case)]
    if lines:
        parts.append("\n".join(["Goals, for the best of fastris:", *lines]))
    return "\n\n".join(parts)


def _detail_rows(case: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def mib(count: int | None) -> str:
        return "-" if count is None else f"{count / MIB:.1f}"

    name = case_name(case)
    for arm, cell in case["arms"].items():
        if cell["ms"]:
            work = None if cell["flops"] is None else cell["flops"] / 1e9
            rate = None if work is None else 1000 * work / Spread.of(cell["ms"]).median
            numbers = shown(work, ".3g"), shown(rate, ".3g"), shown(cell["share"], ".0%")
            yield name, arm, *numbers, mib(cell["kept_bytes"]), mib(cell["peak_bytes"])
            name = ""


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
        arms = list(dict.fromkeys(arm for case in cases for arm in case["arms"]))
        if len(arms) > 2 or len(main) < len(cases):
            rows = [(_label(case), *(_wide_cell(case, arm) for arm in arms)) for case in cases]
            everything = markdown_table(("", *arms), rows)
            parts.append(f"<details><summary>Every case and arm</summary>\n\n{everything}\n\n</details>")
    if result.get("memory"):
        parts.append(memory_table(result["memory"]))
    return "\n\n".join([*parts, f"<sub>{caption(result)} Raw data: `{source}`.</sub>"])


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
        goal = "<br>".join(f"{g.text}: {g.met if g.met.startswith('yes') else f'**{g.met}**'}" for g in goals(case))
        rows.append((_label(case), _wide_cell(case, first), *best, _wide_cell(case, own, named=True) + factor, goal))
    return markdown_table(("", first, *(["best other"] if others else []), "fastris", "goal"), rows)


def _wide_cell(case: Mapping[str, Any], arm: str | None, named: bool = False) -> str:
    cell = case["arms"].get(arm)
    if cell is None:
        return "-"
    if not is_measured(cell):
        return "-" if cell["status"] == LEFT_OUT else f"**{_trouble(cell)}**"
    gain = gains(case).get(arm or "")
    lines = [f"<sub>{arm}</sub>"] if named else []
    lines.append(f"{number(Spread.of(cell['ms']).median)} ms")
    if gain is not None:
        lines.append(f"**{number(gain.median)}x{_slower(gain)}**")
        lines.append(f"<sub>{number(gain.low)} to {number(gain.high)}</sub>")
    if cell.get("share") is not None:
        lines.append(f"<sub>{100 * cell['share']:.0f} % of roofline</sub>")
    return "<br>".join(lines)


def _label(case: Mapping[str, Any]) -> str:
    head, _, details = case["title"].partition(":")
    return f"{head}<br><sub>{', '.join(filter(None, (details.strip(), case['passes'])))}</sub>"


def _long_name(case: Mapping[str, Any]) -> str:
    head, _, details = case["title"].partition(":")
    return f"{head}, {(details.strip() or case['passes']).partition(',')[0]}"


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
    return "\n".join(lines) + "\n\n" + markdown_table(("MiB per image", *arms), rows, aligned=True)


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
        *([_float32(machine["float32"])] if "float32" in machine else []),
        f"PyTorch {machine['versions']['torch']}",
        f"fastris {machine['versions']['fastris']}, {source}{' with changes' if machine['git']['dirty'] else ''}",
        machine["date"][:10],
    ]
    checked = "Every arm's outputs and gradients were held against float64 before it was timed; arms took turns."
    notes = [result.get("note") or checked]
    if settings["quick"]:
        notes.append("Quick: few rounds, checked on small copies.")
    if not result["complete"]:
        notes.append("Incomplete: stopped by Ctrl-C.")
    return ", ".join(facts) + ". " + " ".join(notes)


def _float32(found: Mapping[str, str]) -> str:
    """What products of float32 tensors were timed in."""
    matmul, convolution = (name.upper() for name in (found["matmul"], found["convolution"]))
    if matmul == convolution:
        return f"float32 products in {matmul}"
    return f"float32 matrix products in {matmul} and convolutions in {convolution}"


def _slower(gain: Spread) -> str:
    return "" if not reads_slower(gain.median) else ", slower" if gain.high < 1 else ", slower within noise"


def _trouble(cell: Mapping[str, Any]) -> str:
    trouble = cell["message"] and cell["status"] != LEFT_OUT
    return cell["status"].upper() if trouble else cell["status"] if cell["message"] else "not timed"


def spread(value: Spread, unit: str = "") -> str:
    return f"{number(value.median)}{unit} [{number(value.low)}-{number(value.high)}]"


def main(arguments: Sequence[str]) -> int:
    def show() -> int:
        print(markdown(load(Path(arguments[0]))))
        return 0

    fits = len(arguments) == 1 and not arguments[0].startswith("-")
    return with_arguments("bench.report.tables", "FILE.json", fits, show)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
