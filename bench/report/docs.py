"""``python -m bench.report.docs``: the measured blocks of README.md and docs/, and their charts, from bench/results.

A block lies between ``<!-- bench: NAME -->`` and ``<!-- /bench -->``; all other text is left as it is. ``--check``
writes nothing and fails when a block, or a number in a chart, is not what the result files say. Charts are drawn anew
only where their numbers changed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import charts, pages, results, switches, tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("bench") / "results"
IMAGES = Path("docs") / "images"
COMMAND = "python -m bench.report.docs"
MARK = re.compile(r"<!-- (?P<end>/)?bench(?:: (?P<name>\S+))? -->")
FACE = "face"
CHART_ONLY = "-chart"
"""At the end of a block's name: its chart and where it comes from, without the table."""


@dataclass(frozen=True)
class Kind:
    """What a result file becomes: how it is read, the text of its block, and its chart, if it has one.

    ``page`` gets the content and the file's name; ``picture`` is the chart's alternative text.
    """

    load: Callable[[Path], Any]
    page: Callable[[Any, str], str]
    chart: Callable[[Any], charts.Chart] | None = None
    picture: str = ""


TIMED = Kind(results.load, tables.page, charts.speed_chart, "times faster than the published formulas")
ASKED = "expressions per second, over expressions per image"
MODELLED = "modelled time of a training step on cards that were not measured"
SPECIAL = {
    "look-once": ("look_once.json", Kind(results.load, pages.look_once_page, charts.look_once_chart, ASKED)),
    "cards": ("modelled_cards.json", Kind(pages.load_model, pages.cards_page, charts.cards_chart, MODELLED)),
    "memory": ("whole_memory.json", Kind(pages.load_counts, pages.memory_page)),
    "alignformer-memory": ("alignformer_memory.json", Kind(pages.load_counts, pages.memory_page)),
    "magnet-memory": ("magnet_memory.json", Kind(pages.load_counts, pages.memory_page)),
    "demo": ("demo_metrics.json", Kind(results.load_json, pages.demo_page)),
    "switches": ("switches.json", Kind(switches.load_switches, switches.switches_page)),
}
"""Blocks that are no table of cases, with their files; any other block NAME is of NAME.json or NAME_*.json."""

PLANNED = {
    "magnet_step_cpu": ("magnet_step_cpu_float32.json", "python -m bench op=magnet arms=torch,repaired"),
    "magnet-memory": ("magnet_memory.json", "python -m bench.memory model=magnet_swin_b counted=float32"),
    "switches": ("switches.json", "python -m bench.studies.switches"),
}
"""Blocks that may wait for their file, which a long command on a quiet machine writes; until then they name it."""


class BlockError(ValueError):
    """A page's marks do not fit each other or the result files; the message says which and how to mend it."""


class Piece(NamedTuple):
    """A stretch of a page as it is, and as it has to be; ``block`` is the name of a block's, None of what stays."""

    block: str | None
    text: str
    wanted: str


def pieces(root: Path, page: Path) -> list[Piece]:
    """A page of the checkout ``root`` cut at its marks, which stay. Raises BlockError, OSError, ValueError."""
    found: list[Piece] = []
    at, name = 0, None
    text, where = page.read_text(encoding="utf-8"), page.relative_to(root)
    images = str(IMAGES) if len(where.parts) == 1 else "images"
    for mark in MARK.finditer(text):
        if name is None and mark["end"] is None and mark["name"]:
            found.append(Piece(None, text[at : mark.end()], text[at : mark.end()]))
            name, at = mark["name"], mark.end()
        elif name is not None and mark["end"]:
            found.append(Piece(name, text[at : mark.start()], f"\n\n{block(root, name, images, str(where))}\n\n"))
            name, at = None, mark.start()
        else:
            line = text.count("\n", 0, mark.start()) + 1
            raise BlockError(
                f"{where}, line {line}: {mark[0]} does not fit the mark before it; a block is "
                "<!-- bench: NAME --> ... <!-- /bench -->"
            )
    if name is not None:
        raise BlockError(f"{where}: block {name} has no end; put <!-- /bench --> behind it")
    return [*found, Piece(None, text[at:], text[at:])]


def differences(root: Path) -> list[str]:
    """What in the checkout is not as the result files say: blocks by name, charts by path. Empty if all agrees."""
    found = []
    for page in pages_of(root):
        for name, text, wanted in pieces(root, page):
            if text != wanted:
                source = RESULTS if name in (FACE, *PLANNED) else _source(root, str(name), "").relative_to(root)
                found.append(f"{page.relative_to(root)}, block {name}: not what {source} says")
    return found + [f"{path.relative_to(root)}: not what the result files say" for path in outdated_charts(root)]


def pages_of(root: Path) -> list[Path]:
    """The pages that may hold blocks: README.md, then docs/ by name."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def block(root: Path, name: str, images: str = str(IMAGES), where: str = "README.md") -> str:
    """The text of one block, with ``images`` the folder of the charts as the page ``where`` sees it.

    Raises BlockError for a name that no result file goes by.
    """
    if name == FACE:
        return _face(root)
    if name in PLANNED and not (root / RESULTS / PLANNED[name][0]).is_file():
        file, command = PLANNED[name]
        return f"Not measured yet: `{command} json={RESULTS / file}`."
    source, kind = _source(root, name, where), SPECIAL.get(name.removesuffix(CHART_ONLY), ("", TIMED))[1]
    content, file = kind.load(source), str(source.relative_to(root))
    picture = f"![{kind.picture}]({images}/{source.stem}.svg)"
    if name.endswith(CHART_ONLY):
        return f"{picture}\n\n<sub>{tables.caption(content)} Raw data: `{file}`.</sub>"
    shown = kind.chart is not None and content.get("cases", True)
    return (f"{picture}\n\n" if shown else "") + kind.page(content, file)


def _face(root: Path) -> str:
    """What a reader sees first: three gains in numbers, each with where it was measured."""
    timed = results.load(_source(root, "cpu", "README.md"))
    memory_file, looked = (_source(root, name, "README.md") for name in ("memory", "look-once"))
    step = next(case for case in timed["cases"] if case["op"] == "model" and "training step" in case["title"])
    own, other = results.best_arms(step)
    faster = results.speedup(step["arms"][step["baseline"]]["ms"], step["arms"][own]["ms"])
    ahead = results.lead(step)
    assert faster is not None and ahead is not None, "the training step was not timed"
    kept = pages.kept_per_image(pages.load_counts(memory_file))
    asked = [case for case in results.load(looked)["cases"] if not case["sizes"]["training"]]
    many = max(asked, key=lambda case: case["sizes"]["expressions"])
    gain = max(found.median for found in results.gains(many).values())
    return "\n".join(
        [
            f"- **The same numbers in less time**: a training step of CRIS-RN50 {results.number(faster.median)}x as "
            f"fast as published and {results.number(ahead.median)}x as fast as the best other way ({other}), on two "
            "CPU cores. No GPU has been measured.",
            f"- **Less memory**: {kept['reference none']:.0f} MiB kept for backward per image as published, "
            f"{kept['torch none']:.0f} with fastris, {kept['torch stages']:.0f} with `recompute=stages`.",
            f"- **Look once, ask many**: {many['sizes']['expressions']} phrases about one image are answered "
            f"{results.number(gain)}x as fast as by the published code, one by one.",
        ]
    )


def _source(root: Path, name: str, where: str) -> Path:
    """The result file of a block."""
    name = name.removesuffix(CHART_ONLY)
    exact = root / RESULTS / (SPECIAL[name][0] if name in SPECIAL else f"{name}.json")
    found = [exact] if name in SPECIAL or exact.is_file() else _timed_files(root, f"{name}_*")
    if len(found) != 1 or not found[0].is_file():
        known = [*SPECIAL, *(path.stem for path in _timed_files(root))]
        raise BlockError(f"{where}: block {name} is not of one result file; blocks can be {', '.join(known)}")
    return found[0]


def _timed_files(root: Path, stem: str = "*") -> list[Path]:
    """The files of ``python -m bench``: those that hold cases."""
    special = {file for file, _ in SPECIAL.values()}
    paths = [path for path in sorted((root / RESULTS).glob(f"{stem}.json")) if path.name not in special]
    return [path for path in paths if "cases" in results.load_json(path)]


def outdated_charts(root: Path) -> dict[Path, charts.Chart]:
    """The charts that the result files give and that are missing, or do not show what these say."""
    sources = [(path, TIMED) for path in _timed_files(root)]
    sources += [(root / RESULTS / file, kind) for file, kind in SPECIAL.values()]
    outdated = {}
    for source, kind in sources:
        content = kind.load(source) if kind.chart is not None and source.is_file() else {"cases": []}
        if kind.chart is not None and content.get("cases", True):
            path, chart = root / IMAGES / f"{source.stem}.svg", kind.chart(content)
            if not path.is_file() or not charts.is_drawn(chart, path.read_text(encoding="utf-8")):
                outdated[path] = chart
    return outdated


def check(root: Path) -> int:
    found = differences(root)
    print("\n".join([*found, f"mend it with: {COMMAND}"] if found else ["README.md, docs and charts agree"]))
    return int(bool(found))


def write(root: Path) -> int:
    wanted = {page: "".join(piece.wanted for piece in pieces(root, page)) for page in pages_of(root)}
    for page, text in wanted.items():
        if page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page.relative_to(root)}")
    for path, chart in outdated_charts(root).items():
        charts.draw(chart, path)
        print(f"drew {path.relative_to(root)}")
    return 0


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    if list(arguments) not in ([], ["--check"]):
        print(f"usage: {COMMAND} [--check]", file=sys.stderr)
        return 2
    try:
        return (check if arguments else write)(root)
    except (OSError, ValueError, KeyError, ModuleNotFoundError) as error:
        print(f"bench.report.docs: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
