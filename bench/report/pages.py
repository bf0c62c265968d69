"""Pages and charts of results that are no table of cases: modelled cards, and looking once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import charts
from .results import OTHERS, Spread, gains, is_measured, load_json, number
from .tables import caption, table

CARDS_FORMAT = 1
"""Version of the files that ``python -m bench.modelled.cards`` writes."""


def load_model(path: Path) -> dict[str, Any]:
    """A file of this command. Raises ValueError when it is of another format."""
    content = load_json(path)
    if not isinstance(content, dict) or content.get("format") != CARDS_FORMAT or "paths" not in content:
        raise ValueError(f"{path} is not of this version's python -m bench.modelled.cards; write it again")
    return content


def cards_page(content: Mapping[str, Any], source: str) -> str:
    """All tables: the step, its stages, the assumptions, and how far off the model is where something was measured."""
    return "\n\n".join(
        [
            f"**Modelled, not measured:** {content['modelled']}, ms per step (images per second).",
            _steps(content),
            "<details><summary>Assumptions, stages, and how far off the model is on a measured device</summary>",
            _assumptions(content),
            _stages(content),
            _checks(content),
            f"Raw numbers: `{source}`.",
            "</details>",
        ]
    )


def step_ms(content: Mapping[str, Any], path: str, card: str) -> float:
    """Modelled milliseconds of the whole step."""
    return sum(stage["ms"][card] for stage in content["paths"][path].values())


def _cards(content: Mapping[str, Any]) -> list[str]:
    return [card["name"] for card in content["assumptions"]["cards"]]


def _steps(content: Mapping[str, Any]) -> str:
    paths, batch = list(content["paths"]), content["batch"]
    rows = []
    for card in _cards(content):
        times = {path: step_ms(content, path, card) for path in paths}
        cells = [f"{number(ms)} ({1000 * batch / ms:.0f}/s)" for ms in times.values()]
        other, own = (min(ms for path, ms in times.items() if path.startswith(OTHERS) is is_) for is_ in (True, False))
        rows.append((card, *cells, f"{times[paths[0]] / own:.2f}x, {other / own:.2f}x"))
    gain = f"gain over {paths[0]}, over the best other path"
    return table(("*modelled*", *paths, gain), rows, aligned=False)


def _assumptions(content: Mapping[str, Any]) -> str:
    made = content["assumptions"]
    rows = []
    for card in made["cards"]:
        rates = (f"{card[kind] / 1e12:.1f}" for kind in ("matrix_rate", "wide_rate"))
        rows.append((card["name"], *rates, f"{card['bandwidth']:g}", f"{card['memory']}", card["source"]))
    head = ("card", "bf16 TFLOP/s, dense, float32 sums", "float32 TFLOP/s", "GB/s", "GB", "source")
    text = (
        f"Every operation takes the longest of: its products at {made['matrix_share']:.0%} of the matrix rate, its "
        f"bytes at {made['bandwidth_share']:.0%} of the bandwidth, {1e6 * made['launch_seconds']:.0f} us for a launch. "
        "Nothing is fused but what the path fuses itself, each input is read and each output written once, caches keep "
        "nothing, the grouped convolution reaches the same share as any other, dropout is left out, and the processor "
        "keeps up with launches. The triton column takes the kernels' traffic from their documentation."
    )
    return f"{text}\n\n{table(head, rows, aligned=False)}"


def _stages(content: Mapping[str, Any]) -> str:
    paths = content["paths"]
    card = _cards(content)[0]
    rows = []
    for name in next(iter(paths.values())):
        counted = [stages[name] for stages in paths.values()]
        cells = [(f"{s['flops'] / 1e9:.0f}", f"{s['bytes'] / 1e9:.2f}", number(s["ms"][card])) for s in counted]
        rows.append((name, *map(", ".join, cells)))
    return (
        f"Stage by stage, forward and backward: GFLOP, GB through memory, and *modelled* ms on the {card}.\n\n"
        + table(("stage", *paths), rows, aligned=False)
    )


def _checks(content: Mapping[str, Any]) -> str:
    if not content["checks"]:
        return "No device has been measured to check the model against."
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for check in content["checks"]:
        cases.setdefault((check["device"], check["case"]), {})[check["arm"]] = check
    arms = list(dict.fromkeys(check["arm"] for check in content["checks"]))
    rows = []
    for (_, name), found in cases.items():
        cells = [_off(found[arm]) if arm in found else "" for arm in arms]
        gains = [_gain(found, arms, kind) for kind in ("modelled_ms", "measured_ms")]
        rows.append((name, *cells, " / ".join(gains)))
    devices = "; ".join(dict.fromkeys(f"{check['device']} ({check['rates']})" for check in content["checks"]))
    text = (
        f"Modelled / measured ms on {devices}, how many times longer it took than modelled, and the gain of {arms[-1]} "
        f"over {arms[0]}, modelled / measured."
    )
    return f"{text}\n\n{table(('case', *arms, 'gain'), rows, aligned=False)}"


def _off(check: Mapping[str, Any]) -> str:
    modelled, measured = check["modelled_ms"], check["measured_ms"]
    return f"{number(modelled)} / {number(measured)} ({measured / modelled:.2f}x)"


def _gain(found: Mapping[str, Any], arms: Sequence[str], kind: str) -> str:
    """Of the last arm over the first."""
    if arms[0] not in found or arms[-1] not in found:
        return "-"
    return f"{number(found[arms[0]][kind] / found[arms[-1]][kind])}x"


def cards_chart(content: Mapping[str, Any]) -> charts.Chart:
    """Modelled milliseconds of a step on every card by every path."""
    groups = []
    for card in _cards(content):
        times = {path: step_ms(content, path, card) for path in content["paths"]}
        bars = tuple(charts.Bar(path, ms, f"{number(ms)} ms") for path, ms in times.items())
        groups.append(charts.Group(card, "modelled", bars))
    text = content["modelled"]
    return charts.Chart("Modelled, not measured: ms per training step", text[0].upper() + text[1:], tuple(groups))


def look_once_page(result: Mapping[str, Any], source: str) -> str:
    """The table for README: expressions per second, and images per second, of every arm."""
    arms = list(dict.fromkeys(arm for case in result["cases"] for arm in case["arms"]))
    rows = []
    for case in result["cases"]:
        count, kind = case["sizes"]["expressions"], case["title"].partition(":")[0].lower()
        gain = gains(case).get("look once")
        cells = [_rates(case["arms"].get(arm), count) for arm in arms]
        rows.append((f"{kind}, {count} per image", *cells, "-" if gain is None else _with_range(gain)))
    head = ("", *arms, "gain")
    notes = (
        "Expressions per second (images per second) with several expressions about each image. Published: one by one, "
        "by the published formulas. The gain is looking once over that, with the middle 60 % of the rounds."
    )
    lines = [
        notes,
        table(head, rows, aligned=False),
        f"<sub>{caption(result)} Raw data: `{source}`.</sub>",
    ]
    return "\n\n".join(lines)


def _rates(cell: Mapping[str, Any] | None, count: int) -> str:
    if cell is None:
        return ""
    if not is_measured(cell):
        return f"**{cell['status'].upper()}**"
    images = 1000 / Spread.of(cell["ms"]).median
    return f"{number(count * images)} ({number(images)})"


def _with_range(gain: Spread) -> str:
    return f"**{number(gain.median)}x** ({number(gain.low)} to {number(gain.high)})"
