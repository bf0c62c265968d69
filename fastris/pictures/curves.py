"""Line charts on one page of HTML that needs nothing else: no script, no network, no library."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 260, 64, 12, 12, 34
MOST = 400
"""Points of a line; of more, neighbours are averaged."""
FEW = 80
"""A line of no more points has a dot at each, which tells its numbers."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --first: #1f6fb4; --second: #c8571b; }
@media (prefers-color-scheme: dark) { :root { --first: #6cb2f0; --second: #f0935c; } }
body { font: 14px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.3em; } h2 { font-size: 1em; margin: 0; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1.5em; }
svg { width: 100%; height: auto; } text { font-size: 11px; fill: currentColor; }
.grid { stroke: var(--line); } polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.s0 { stroke: var(--first); color: var(--first); } .s1 { stroke: var(--second); color: var(--second); }
circle { fill: currentColor; stroke: none; } legend, .key { font-size: 12px; } .key span { margin-right: 1em; }
table { border-collapse: collapse; margin-top: 1.5em; } td, th { padding: .15em .8em; text-align: right; }
"""


@dataclass(frozen=True)
class Chart:
    """Lines over the same steps; ``unit`` follows the numbers, such as `` %``. At most two lines."""

    title: str
    lines: Mapping[str, Points]
    unit: str = ""


def page(title: str, facts: str, charts: Iterable[Chart], columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A page of charts above a table; all texts are escaped."""
    table = ""
    if body := "".join(_row("td", row) for row in rows):
        table = f"<table>{_row('th', columns)}{body}</table>"
    drawn = "".join(_figure(chart) for chart in charts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1><p>{html.escape(facts)}</p>\n"
        f"<main>{drawn}</main>\n{table}</body></html>\n"
    )


def thinned(points: Points) -> Points:
    """At most :data:`MOST` points: means over equal runs of neighbours. What is not finite is left out."""
    points = [point for point in points if all(map(math.isfinite, point))]
    size = -(-len(points) // MOST) or 1
    runs = (points[start : start + size] for start in range(0, len(points), size))
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that begin at or below ``low`` and end at or above ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _figure(chart: Chart) -> str:
    lines = {name: kept for name, points in chart.lines.items() if (kept := thinned(points))}
    keys = "".join(f'<span class="s{i}">&#9632; {html.escape(name)}</span>' for i, name in enumerate(lines))
    heading = f'<h2>{html.escape(chart.title)}</h2><div class="key">{keys}</div>'
    if not lines:
        return f"<section>{heading}nothing yet</section>"
    every = [point for points in lines.values() for point in points]
    across = (min(x for x, _ in every), max(x for x, _ in every))
    marks = ticks(min(y for _, y in every), max(y for _, y in every))

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - across[0]) / ((across[1] - across[0]) or 1)
        height = (y - marks[0]) / (marks[-1] - marks[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(chart.title)}">']
    for mark in marks:
        y = place(across[0], mark)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:.4g}{html.escape(chart.unit)}</text>'
        )
    for x, anchor in ((across[0], "start"), (across[1], "end")):
        parts.append(
            f'<text x="{place(x, marks[0])[0]:.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}">step {x:.0f}</text>'
        )
    for number, (name, points) in enumerate(lines.items()):
        parts.append(_line(number, name, points, [place(*point) for point in points], chart.unit))
    return f"<section>{heading}{''.join(parts)}</svg></section>"


def _line(number: int, name: str, points: Points, places: Points, unit: str) -> str:
    drawn = f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'
    if len(points) <= FEW:
        told = (html.escape(f"{name}: {y:.4g}{unit} at step {x:.0f}") for x, y in points)
        dots = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>{text}</title></circle>'
                for (x, y), text in zip(places, told, strict=True))  # fmt: skip
        drawn += "".join(dots)
    return f'<g class="s{number}">{drawn}</g>'


def _row(cell: str, values: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{html.escape(value)}</{cell}>" for value in values) + "</tr>"
