"""Bar charts of result files, drawn by matplotlib (``pip install 'fastris[charts]'``).

What a chart shows is data, a :class:`Chart`, and :func:`draw` is the only function that knows matplotlib: tests hold
the numbers, not the picture. Groups of horizontal bars have whiskers for the spread and a tick for a goal. Ratios are
drawn on a logarithmic axis from 1x, so that twice as slow reaches as far to the left as twice as fast to the right.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fastris.runtime.storage import replacing

from .pages import card_names, step_ms
from .results import OTHERS, Spread, best_arms, gains, is_measured, main_cases, number, reads_slower

INK, FAINT, GRID, SLOWER, GOAL = "#1f2328", "#59636e", "#d1d9e0", "#c4432b", "#9a6700"
OTHER_COLOURS = ("#8c959f", "#b6bfc8", "#6e7781", "#d0d7de")
OWN_COLOURS = ("#1f6feb", "#1a7f64", "#8250df", "#bf5b04")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Segoe UI", "Helvetica", "Arial", "DejaVu Sans"],
    "svg.fonttype": "none",  # text stays text: small, legible at any size, and read back by texts_of
    "svg.hashsalt": "fastris",  # the same names inside for the same chart
}
WIDTH, TOP, BOTTOM = 860, 96, 34
PIXELS = 0.01
"""Inches for a pixel of the SVG as browsers show it: figures are drawn at 100 pixels an inch."""


@dataclass(frozen=True)
class Bar:
    """One value, how it is written beside its bar, and its spread and goal where it has them."""

    name: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    goal: float | None = None

    @property
    def label(self) -> str:
        """The text with the goal behind it."""
        if self.goal is None:
            return self.text
        return f"{self.text} (goal {self.goal:g}x{'' if self.value >= self.goal else ', missed'})"


@dataclass(frozen=True)
class Group:
    """Bars that belong together, under a label and a smaller line of details."""

    label: str
    details: str = ""
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Chart:
    """What is drawn. ``ratios``: values are factors, on a logarithmic axis from 1x; else lengths from 0."""

    title: str
    subtitle: str
    groups: tuple[Group, ...]
    ratios: bool = False

    @property
    def values(self) -> list[float]:
        """Everything that the axis must hold."""
        return [v for group in self.groups for bar in group.bars for v in (bar.value, bar.low, bar.high, bar.goal) if v]


def speed_chart(result: Mapping[str, Any]) -> Chart:
    """How many times faster than the baseline every arm is in every case of a result file."""
    groups = []
    for case in main_cases(result["cases"]):
        head, _, details = case["title"].partition(":")
        bars = []
        own, _ = best_arms(case)
        for arm, gain in gains(case).items():
            goal = (case["goal"] or case.get("targets", {}).get(case["baseline"])) if arm == own else None
            mark = " slower" if reads_slower(gain.median) else ""
            bars.append(Bar(arm, gain.median, f"{number(gain.median)}x{mark}", gain.low, gain.high, goal))
        groups.append(Group(head, details.strip(), tuple(bars)))
    machine = result["machine"]
    facts = f"{machine['device']['name']}, {machine['threads']} threads, {result['settings']['dtype']}"
    subtitle = f"{facts}. Bars: median. Whiskers: middle 60 % of the rounds. Tick: goal. Left of 1x is slower."
    return Chart("Times faster than the published formulas", subtitle, tuple(groups), ratios=True)


def look_once_chart(result: Mapping[str, Any]) -> Chart:
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
    machine = result["machine"]
    model = result["cases"][0]["title"].partition("image, ")[2] if result["cases"] else ""
    subtitle = f"{machine['device']['name']}, {machine['threads']} threads, {model}"
    return Chart("Expressions per second", subtitle, tuple(groups))


def cards_chart(content: Mapping[str, Any]) -> Chart:
    """Modelled milliseconds of a step on every card by every path."""
    groups = []
    for card in card_names(content):
        bars = tuple(Bar(path, ms, f"{number(ms)} ms") for path, ms in step_ms(content, card).items())
        groups.append(Group(card, "modelled", bars))
    text = content["modelled"]
    return Chart("Modelled, not measured: ms per training step", text[:1].upper() + text[1:], tuple(groups))


def texts_of(svg: str) -> list[str]:
    """Every text in an SVG picture, from the top of the file to its end."""
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def is_drawn(chart: Chart, svg: str) -> bool:
    """Whether a picture holds the chart's title and every number of it, in the chart's order."""
    texts = texts_of(svg)
    drawn = iter(texts)
    labels = [bar.label for group in chart.groups for bar in group.bars]
    return chart.title in texts and all(any(text == label for text in drawn) for label in labels)


def draw(chart: Chart, path: Path) -> None:
    """Write the chart as SVG. Raises ModuleNotFoundError, with the mend, where matplotlib is not installed."""
    with _style():
        figure = figure_of(chart)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Title": chart.title})


def _style() -> AbstractContextManager[None]:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError("drawing charts needs matplotlib: pip install 'fastris[charts]'") from None
    return matplotlib.rc_context(STYLE)


def figure_of(chart: Chart) -> Any:
    """The chart as a matplotlib figure, as wide as a README shows it; inside, y runs downwards in pixels."""
    from matplotlib.figure import Figure

    details = [textwrap.wrap(group.details, 50) for group in chart.groups]
    heights = [max(18 * len(g.bars), 13 * (1 + len(lines))) for g, lines in zip(chart.groups, details, strict=True)]
    body = sum(heights) + 12 * len(heights)
    height = TOP + body + BOTTOM
    size = (WIDTH * PIXELS, height * PIXELS)
    figure = Figure(size, dpi=100, facecolor="white", edgecolor=GRID, linewidth=1)
    figure.text(20 / WIDTH, 1 - 26 / height, chart.title, size=11, weight="bold", color=INK)
    for number_, line in enumerate(textwrap.wrap(chart.subtitle, 150)[:2]):
        figure.text(20 / WIDTH, 1 - (44 + 12 * number_) / height, line, size=7.5, color=FAINT)
    axes = figure.add_axes((340 / WIDTH, BOTTOM / height, 350 / WIDTH, body / height))
    _prepare(axes, chart, body)
    colours, y = _colours(chart.groups), 0.0
    for group, lines, space in zip(chart.groups, details, heights, strict=True):
        _label(axes, group, lines, y)
        for number_, bar in enumerate(group.bars):
            _bar(axes, bar, y + 18 * number_ + 15, colours[bar.name], chart.ratios)
        y += space + 12
    _key(figure, colours, height)
    return figure


def _prepare(axes: Any, chart: Chart, height: float) -> None:
    """Axis, grid and limits; y runs downwards in pixels."""
    values = chart.values or [1.0]
    axes.set_ylim(height, 0)
    if chart.ratios:
        low, high = math.floor(math.log2(min(1.0, *values))), max(1, math.ceil(math.log2(max(1.0, *values))))
        axes.set_xscale("log", base=2)
        axes.set_xlim(2.0**low, 2.0**high)
        ticks = [2.0**power for power in range(low, high + 1)]
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.set_xlim(0, 1.02 * max(values))
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axvline(1.0 if chart.ratios else 0.0, color=INK, linewidth=0.8)
    axes.tick_params(axis="x", length=0, pad=6, labelsize=8, labelcolor=FAINT)
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def _label(axes: Any, group: Group, lines: Sequence[str], y: float) -> None:
    place = axes.get_yaxis_transform()
    axes.text(-16 / 350, y + 16, group.label, size=8.6, color=INK, ha="right", va="baseline", transform=place)
    for number_, line in enumerate(lines):
        axes.text(-16 / 350, y + 29 + 13 * number_, line, size=7.2, color=FAINT, ha="right", transform=place)


def _bar(axes: Any, bar: Bar, y: float, colour: str, ratios: bool) -> None:
    origin = 1.0 if ratios else 0.0
    axes.barh(y, bar.value - origin, left=origin, height=14, color=colour)
    reach = max(bar.value, origin)
    if bar.low is not None and bar.high is not None:
        axes.errorbar(bar.value, y, xerr=[[max(0.0, bar.value - bar.low)], [max(0.0, bar.high - bar.value)]],
                      color=INK, linewidth=0.8, capsize=2.5, capthick=0.8)  # fmt: skip
        reach = max(reach, bar.high)
    if bar.goal is not None:
        axes.plot([bar.goal, bar.goal], [y - 10, y + 10], color=GOAL, linewidth=2, solid_capstyle="butt", clip_on=False)
        reach = max(reach, bar.goal)
    ink = SLOWER if ratios and reads_slower(bar.value) else INK
    axes.annotate(bar.label, (reach, y), (6, 0), textcoords="offset points", size=8, color=ink, va="center")


def _key(figure: Any, colours: Mapping[str, str], height: float) -> None:
    from matplotlib.patches import Rectangle

    x = 20.0
    for name, colour in colours.items():
        corner = (x / WIDTH, 1 - 80 / height)
        figure.add_artist(Rectangle(corner, 11 / WIDTH, 11 / height, color=colour, transform=figure.transFigure))
        figure.text((x + 16) / WIDTH, 1 - 78 / height, name, size=8, color=INK)
        x += 34 + 6.3 * len(name)


def _colours(groups: Sequence[Group]) -> dict[str, str]:
    """One colour for bars of one name: greys for what fastris is compared with."""
    found: dict[str, str] = {}
    counts = [0, 0]
    for name in dict.fromkeys(bar.name for group in groups for bar in group.bars):
        own = not name.startswith(OTHERS)
        palette = OWN_COLOURS if own else OTHER_COLOURS
        found[name] = palette[counts[own] % len(palette)]
        counts[own] += 1
    return found
