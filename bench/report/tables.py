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

from ..commandline import with_arguments
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
    reached,
    reads_slower,
    verdict,
)

TALL = ("case", "arm", "ms [p20-p80]", "times faster", "goal", "met")


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
        if ahead is not None and is_slower(case):
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


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], aligned: bool = True) -> str:
    """A Markdown table; ``aligned`` pads its source, so that it reads well on a terminal, too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) if aligned else 1 for i in range(len(columns))]
    head, *body = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


DETAILS = ("case", "arm", "GFLOP", "GFLOP/s", "share of roofline", "kept, MiB", "peak, MiB")


def details(result: Mapping[str, Any]) -> str:
    """The second table of a result, its ceilings above and its headlines below it."""
    rows = [row for case in result["cases"] for row in _detail_rows(case)]
    parts = [_ceilings(result["ceilings"]), table(DETAILS, rows)]
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
    own, _ = best_arms(case)
    lines = []
    for arm, target in case.get("targets", {}).items():
        found, what = reached(case, arm), "of the roofline" if arm == "share" else f"times faster than {arm}"
        if found is None:
            lines.append(f"  {case['name']}: {arm} {target:g}: not measured")
        else:
            met = "reached" if found.median >= target else "not reached"
            lines.append(f"  {case['name']}: {found.median:.2f} {what} ({own}), target {target:g}: {met}")
    return lines


def _ceilings(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return (
        f"Ceilings measured in this run: copy {found['copy_bytes_per_s'] / 1e9:.1f} GB/s, {found['dtype']} matrix "
        f"product {found['matrix_flops_per_s'] / 1e9:.0f} GFLOP/s. Share of roofline: the least time that compulsory "
        "bytes and the fewest operations known need under them, over the median."
    )


def _detail_rows(case: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, cell in case["arms"].items():
        if not cell["ms"]:
            continue
        flops, share = cell["flops"], cell["share"]
        rate = None if flops is None else flops / Spread.of(cell["ms"]).median * 1000
        rows.append(
            (
                "" if rows else f"{case['name']}, B={case['sizes'].get('batch', '?')}, {case['passes']}",
                name,
                "-" if flops is None else f"{flops / 1e9:.3g}",
                "-" if rate is None else f"{rate / 1e9:.3g}",
                "-" if share is None else f"{100 * share:.0f} %",
                _plain_mib(cell["kept_bytes"]),
                _plain_mib(cell["peak_bytes"]),
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


def _plain_mib(count: int | None) -> str:
    return "-" if count is None else f"{count / MIB:.1f}"


def main(arguments: Sequence[str]) -> int:
    def show() -> int:
        print(markdown(load(Path(arguments[0]))))
        return 0

    fits = len(arguments) == 1 and not arguments[0].startswith("-")
    return with_arguments("bench.report.tables", "FILE.json", fits, show)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
