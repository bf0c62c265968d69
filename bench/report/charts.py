"""Bar charts as SVG, written by hand: no library, the same bytes for the same numbers, legible on any background.

One drawing serves all: groups of horizontal bars, with whiskers for the spread and a tick for a goal. Ratios are drawn
on a logarithmic axis from 1x, so that twice as slow reaches as far to the left as twice as fast to the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

from .tables import MIB, OTHERS, Spread, best_arms, gains, is_measured, kept_bytes, main_cases, number

WIDTH, PLOT_LEFT, PLOT_WIDTH = 860, 340, 350
BAR, GAP, GROUP_GAP, LINE = 14, 4, 12, 13
TOP, AXIS = 104, 34
INK, FAINT, GRID, PAPER, SLOWER, GOAL = "#1f2328", "#59636e", "#d1d9e0", "#ffffff", "#c4432b", "#9a6700"
OTHER_COLOURS = ("#8c959f", "#b6bfc8", "#6e7781", "#d0d7de")
OWN_COLOURS = ("#1f6feb", "#1a7f64", "#8250df", "#bf5b04")
CHARACTER = 0.56
"""Width of an average character as a fraction of the font's size."""


@dataclass(frozen=True)
class Bar:
    """One value, how it is written beside its bar, and its spread and goal where it has them."""

    name: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Group:
    """Bars that belong together, under a label and a smaller line of details."""

    label: str
    details: str = ""
    bars: tuple[Bar, ...] = ()


@dataclass
class Axis:
    """Where values lie: ``place`` maps one to 0..1, ``origin`` is where bars begin, ``ticks`` have their texts."""

    place: Callable[[float], float]
    origin: float
    ticks: list[tuple[float, str]] = field(default_factory=list)


def linear_axis(values: Sequence[float], unit: str) -> Axis:
    """From 0 to a round number beyond the largest value."""
    largest = max(values, default=1.0) or 1.0
    rough = largest / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * m for m in (1, 2, 2.5, 5, 10) if magnitude * m >= rough)
    count = math.ceil(largest / step)
    return Axis(lambda v: v / (count * step), 0.0, [(i * step, f"{i * step:g}{unit}") for i in range(count + 1)])


def ratio_axis(values: Sequence[float]) -> Axis:
    """Logarithmic, by powers of two, with 1x inside."""
    low = math.floor(math.log2(min(1.0, *values)))
    high = max(1, math.ceil(math.log2(max(1.0, *values))))
    ticks = [(2.0**power, f"{2.0**power:g}x") for power in range(low, high + 1)]
    return Axis(lambda v: (math.log2(v) - low) / (high - low), 1.0, ticks)


def speed_chart(result: Mapping[str, Any]) -> str:
    """How many times faster than the baseline every arm is in every case of a result file."""
    groups = []
    for case in main_cases(result["cases"]):
        head, _, details = case["title"].partition(":")
        bars = []
        own, _ = best_arms(case)
        for arm, gain in gains(case).items():
            goal = (case["goal"] or case.get("targets", {}).get(case["baseline"])) if arm == own else None
            mark = " slower" if gain.median < 1 else ""
            bars.append(Bar(arm, gain.median, f"{number(gain.median)}x{mark}", gain.low, gain.high, goal))
        groups.append(Group(head, details.strip(), tuple(bars)))
    values = [v for g in groups for b in g.bars for v in (b.value, b.low, b.high, b.goal) if v]
    machine = result["machine"]
    facts = f"{machine['device']['name']}, {machine['threads']} threads, {result['settings']['dtype']}"
    subtitle = f"{facts}. Bars: median. Whiskers: middle 60 % of the rounds. Tick: goal. Left of 1x is slower."
    return draw("Times faster than the published formulas", subtitle, groups, ratio_axis(values or [1.0]))


def memory_chart(memory: Mapping[str, Any]) -> str:
    """Bytes kept for backward per image, stage by stage and together, of every arm."""
    arms = {arm: cell for arm, cell in memory["arms"].items() if is_measured(cell)}
    stages = list(dict.fromkeys(name for cell in arms.values() for name in cell["stages"]))

    def bars(*names: str) -> tuple[Bar, ...]:
        sizes = {arm: kept_bytes(cell, *names) / memory["batch"] / MIB for arm, cell in arms.items()}
        return tuple(Bar(arm, size, f"{size:.0f} MiB") for arm, size in sizes.items())

    groups = [Group(name, "", bars(name)) for name in stages] + [Group("together", "", bars(*stages))]
    axis = linear_axis([bar.value for group in groups for bar in group.bars], "")
    return draw("Kept for backward, MiB per image", _sentence(memory["title"]), groups, axis)


def look_once_chart(result: Mapping[str, Any]) -> str:
    """Expressions per second over the number of expressions per image, of every way to ask."""
    groups = []
    for case in result["cases"]:
        count = case["sizes"]["expressions"]
        bars = []
        for arm, cell in case["arms"].items():
            if is_measured(cell):
                times = Spread.of(cell["ms"])
                median, low, high = (1000 * count / ms for ms in (times.median, times.high, times.low))
                gain = gains(case).get(arm)
                factor = f", {number(gain.median)}x" if gain else ""
                bars.append(Bar(arm, median, f"{number(median)}/s{factor}", low, high))
        groups.append(Group(f"{case['title'].partition(':')[0]}, {count} per image", "", tuple(bars)))
    axis = linear_axis([bar.high or bar.value for group in groups for bar in group.bars], "")
    machine = result["machine"]
    model = result["cases"][0]["title"].partition("image, ")[2] if result["cases"] else ""
    subtitle = f"{machine['device']['name']}, {machine['threads']} threads, {model}"
    return draw("Expressions per second", subtitle, groups, axis)


def draw(title: str, subtitle: str, groups: Sequence[Group], axis: Axis) -> str:
    """The chart as an SVG document. Bars of one name have one colour, listed on top."""
    colours = _colours(groups)
    body, y = [], TOP
    for group in groups:
        lines = [escape(line) for line in _wrapped(group.details, PLOT_LEFT - 40, 10)]
        height = max(len(group.bars) * (BAR + GAP), LINE * (1 + len(lines)))
        body.append(_text(PLOT_LEFT - 16, y + 11, group.label, 12, INK, "end"))
        body += [
            _text(PLOT_LEFT - 16, y + 11 + LINE * (i + 1), line, 10, FAINT, "end", True) for i, line in enumerate(lines)
        ]
        for number_, bar in enumerate(group.bars):
            body += _bar(bar, y + number_ * (BAR + GAP), axis, colours[bar.name])
        y += height + GROUP_GAP
    grid = [
        _line(_x(axis, tick), TOP - 8, _x(axis, tick), y, INK if tick == axis.origin else GRID)
        for tick, _ in axis.ticks
    ]
    labels = [_text(_x(axis, tick), y + 16, text, 11, FAINT, "middle") for tick, text in axis.ticks]
    head = [
        _text(20, 26, title, 15, INK, weight="600"),
        *(_text(20, 43 + 12 * i, line, 10.5, FAINT) for i, line in enumerate(_wrapped(subtitle, WIDTH - 40, 10.5)[:2])),
    ]
    return _document([*head, *_key(colours), *grid, *body, *labels], y + AXIS, title)


def _colours(groups: Sequence[Group]) -> dict[str, str]:
    names = dict.fromkeys(bar.name for group in groups for bar in group.bars)
    found, counts = {}, [0, 0]
    for name in names:
        own = not name.startswith(OTHERS)
        palette = OWN_COLOURS if own else OTHER_COLOURS
        found[name] = palette[counts[own] % len(palette)]
        counts[own] += 1
    return found


def _bar(bar: Bar, y: float, axis: Axis, colour: str) -> list[str]:
    start, end = _x(axis, axis.origin), _x(axis, bar.value)
    left, right = min(start, end), max(start, end)
    ink = SLOWER if axis.origin == 1.0 and bar.value < 1 else INK
    parts = [f'<rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="{BAR}" fill="{colour}"/>']
    reach = right
    if bar.low is not None and bar.high is not None:
        low, high, middle = _x(axis, bar.low), _x(axis, bar.high), y + BAR / 2
        parts += [
            _line(low, middle, high, middle, INK),
            *(_line(x, middle - 4, x, middle + 4, INK) for x in (low, high)),
        ]
        reach = max(reach, high)
    note = ""
    if bar.goal is not None:
        goal = _x(axis, bar.goal)
        reach = max(reach, goal)
        parts.append(_line(goal, y - 3, goal, y + BAR + 3, GOAL, 2.5))
        note = f" (goal {bar.goal:g}x{'' if bar.value >= bar.goal else ', missed'})"
    parts.append(_text(max(reach, start) + 7, y + 11, bar.text + note, 11, ink))
    return parts


def _key(colours: Mapping[str, str]) -> list[str]:
    parts, x = [], 20.0
    for name, colour in colours.items():
        parts += [
            f'<rect x="{x:.1f}" y="68" width="11" height="11" fill="{colour}"/>',
            _text(x + 16, 78, name, 11, INK),
        ]
        x += 34 + len(name) * 11 * CHARACTER
    return parts


def _x(axis: Axis, value: float) -> float:
    return PLOT_LEFT + PLOT_WIDTH * axis.place(value)


def _wrapped(text: str, width: float, size: float) -> list[str]:
    """Lines no wider than ``width`` pixels, broken at spaces."""
    limit, lines = int(width / (size * CHARACTER)), [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > limit:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines if lines[0] else []


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _text(
    x: float, y: float, text: str, size: float, colour: str, anchor: str = "start", escaped=False, weight=""
) -> str:
    attributes = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"' + (
        f' font-weight="{weight}"' if weight else ""
    )
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{text if escaped else escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _document(parts: Sequence[str], height: float, title: str) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    font = "font-family=\"-apple-system,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif\""
    paper = (
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="6" fill="{PAPER}" stroke="{GRID}"/>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">',
            f"<title>{escape(title)}</title>",
            paper,
            *parts,
            "</svg>",
            "",
        ]
    )
