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
from typing import Any

from . import charts, memory, pages, results, tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("bench") / "results"
IMAGES = Path("docs") / "images"
COMMAND = "python -m bench.report.docs"
MARK = re.compile(r"<!-- (?P<end>/)?bench(?:: (?P<name>\S+))? -->")
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


def _demo_page(metrics: dict[str, Any], source: str) -> str:
    """The demo's test of language: how well masks follow the right phrase, and another object's."""
    columns = ("mIoU", "oIoU", "Pr@50")
    names = {"right_phrase": "the right phrase", "other_objects_phrase": "another object's phrase"}
    rows = [(text, *(_percent(metrics[name][column]) for column in columns)) for name, text in names.items()]
    kinds = ", ".join(f"{kind}s {_percent(value)}" for kind, value in metrics["right_phrase_by_kind"].items())
    right = metrics["right_phrase"]
    notes = [
        f"mIoU by kind of phrase: {kinds}.",
        f"{right['expressions']} expressions, rule {right['rule']}, {right['sentences']} sentences;",
        f"seed {metrics['seed']}, {metrics['steps']} steps, {metrics['seconds']:.0f} s",
        f"on {metrics['threads']} CPU cores, PyTorch {metrics['torch']}. Raw data: `{source}`.",
    ]
    return f"{tables.table(('', *columns), rows, aligned=False)}\n\n<sub>{' '.join(notes)}</sub>"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


TIMED = Kind(results.load, tables.page, charts.speed_chart, "times faster than the published formulas")
ASKED = "expressions per second, over expressions per image"
MODELLED = "modelled time of a training step on cards that were not measured"
SPECIAL = {
    "look-once": ("look_once.json", Kind(results.load, pages.look_once_page, charts.look_once_chart, ASKED)),
    "cards": ("modelled_cards.json", Kind(pages.load_model, pages.cards_page, pages.cards_chart, MODELLED)),
    "memory": ("whole_memory.json", Kind(memory.load_counts, memory.memory_page)),
    "demo": ("demo_metrics.json", Kind(results.load_json, _demo_page)),
}
"""Blocks that are no table of cases, with their files; any other block NAME is of NAME.json or NAME_*.json."""


class BlockError(ValueError):
    """A page's marks do not fit each other or the result files; the message says which and how to mend it."""


def pages_of(root: Path) -> list[Path]:
    """The pages that may hold blocks: README.md, then docs/ by name."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def generate(root: Path) -> dict[Path, str]:
    """What the pages of the checkout ``root`` have to be. Raises BlockError, OSError, ValueError."""
    return {page: "".join(text for _, text in _pieces(root, page)) for page in pages_of(root)}


def outdated_charts(root: Path) -> dict[Path, charts.Chart]:
    """The charts of the checkout that are missing, or do not show what the result files say."""
    found = {root / IMAGES / name: chart for name, chart in _charts(root).items()}
    return {
        path: chart
        for path, chart in found.items()
        if not path.is_file() or not charts.is_drawn(chart, path.read_text(encoding="utf-8"))
    }


def differences(root: Path) -> list[str]:
    """What in the checkout is not as the result files say: blocks by name, charts by path. Empty if all agrees."""
    found = []
    for page in pages_of(root):
        text, at = page.read_text(encoding="utf-8"), 0
        for name, wanted in _pieces(root, page):
            if name is None:
                at = text.index(wanted, at) + len(wanted)
                continue
            end = text.index("<!-- /bench -->", at)
            if text[at:end] != wanted:
                found.append(f"{page.relative_to(root)}, block {name}: not what {_sources(root, name)} says")
            at = end
    return found + [f"{path.relative_to(root)}: not what the result files say" for path in outdated_charts(root)]


def _pieces(root: Path, page: Path) -> list[tuple[str | None, str]]:
    """A page cut at its marks: (None, text that stays, marks included) and (name, generated text) in turn."""
    pieces: list[tuple[str | None, str]] = []
    at, name = 0, None
    text, where = page.read_text(encoding="utf-8"), page.relative_to(root)
    images = "../" * (len(where.parts) - 1) + str(IMAGES) if len(where.parts) == 1 else "images"
    for mark in MARK.finditer(text):
        if name is None and mark["end"] is None and mark["name"]:
            pieces.append((None, text[at : mark.end()]))
            name, at = mark["name"], mark.end()
            pieces.append((name, f"\n\n{block(root, name, images, str(where))}\n\n"))
        elif name is not None and mark["end"]:
            name, at = None, mark.start()
        else:
            line = text.count("\n", 0, mark.start()) + 1
            raise BlockError(
                f"{where}, line {line}: {mark[0]} does not fit the mark before it; a block is "
                "<!-- bench: NAME --> ... <!-- /bench -->"
            )
    if name is not None:
        raise BlockError(f"{where}: block {name} has no end; put <!-- /bench --> behind it")
    return [*pieces, (None, text[at:])]


def block(root: Path, name: str, images: str = str(IMAGES), where: str = "README.md") -> str:
    """The text of one block, with ``images`` the folder of the charts as the page ``where`` sees it.

    Raises BlockError for a name that no result file goes by.
    """
    if name == "face":
        return _face(root)
    plain = name.removesuffix(CHART_ONLY)
    source, kind = _source(root, plain, where), SPECIAL[plain][1] if plain in SPECIAL else TIMED
    content = kind.load(source)
    if kind.chart is None or not content.get("cases", True):
        return kind.page(content, str(source.relative_to(root)))
    picture = f"![{kind.picture}]({images}/{source.stem}.svg)"
    if name != plain:
        return f"{picture}\n\n<sub>{tables.caption(content)} Raw data: `{source.relative_to(root)}`.</sub>"
    return f"{picture}\n\n{kind.page(content, str(source.relative_to(root)))}"


def _face(root: Path) -> str:
    """What a reader sees first: three gains in numbers, each with where it was measured."""
    timed = results.load(_source(root, "cpu", "README.md"))
    memory_file, looked = (_source(root, name, "README.md") for name in ("memory", "look-once"))
    step = next(case for case in timed["cases"] if case["op"] == "model" and "training step" in case["title"])
    own, other = results.best_arms(step)
    faster = results.speedup(step["arms"][step["baseline"]]["ms"], step["arms"][own]["ms"])
    ahead = results.lead(step)
    assert faster is not None and ahead is not None, "the training step was not timed"
    kept = memory.kept_per_image(memory.load_counts(memory_file))
    asked = [case for case in results.load(looked)["cases"] if not case["sizes"]["training"]]
    many = max(asked, key=lambda case: case["sizes"]["expressions"])
    _, gain = max(results.gains(many).items(), key=lambda item: item[1].median)
    return "\n".join(
        [
            f"- **The same numbers in less time**: a training step of CRIS-RN50 {results.number(faster.median)}x as "
            f"fast as published and {results.number(ahead.median)}x as fast as the best other way ({other}), on two "
            "CPU cores. No GPU has been measured.",
            f"- **Less memory**: {kept['reference none']:.0f} MiB kept for backward per image as published, "
            f"{kept['torch none']:.0f} with fastris, {kept['torch stages']:.0f} with `recompute=stages`.",
            f"- **Look once, ask many**: {many['sizes']['expressions']} phrases about one image are answered "
            f"{results.number(gain.median)}x as fast as by the published code, one by one.",
        ]
    )


def _sources(root: Path, name: str) -> str:
    if name == "face":
        return f"{RESULTS}"
    return str(_source(root, name.removesuffix(CHART_ONLY), "").relative_to(root))


def _source(root: Path, name: str, where: str) -> Path:
    folder = root / RESULTS
    if name in SPECIAL:
        found = [folder / SPECIAL[name][0]]
    else:
        found = [folder / f"{name}.json"] if (folder / f"{name}.json").is_file() else _timed_files(root, f"{name}_*")
    if len(found) != 1 or not found[0].is_file():
        known = [*SPECIAL, *(path.stem for path in _timed_files(root))]
        raise BlockError(f"{where}: block {name} is not of one result file; blocks can be {', '.join(known)}")
    return found[0]


def _timed_files(root: Path, stem: str = "*") -> list[Path]:
    """The files of ``python -m bench``: those that hold cases."""
    special = {file for file, _ in SPECIAL.values()}
    paths = [path for path in sorted((root / RESULTS).glob(f"{stem}.json")) if path.name not in special]
    return [path for path in paths if "cases" in results.load_json(path)]


def _charts(root: Path) -> dict[str, charts.Chart]:
    """File name -> every chart that the result files give."""
    found = {}
    for path in _timed_files(root):
        result = results.load(path)
        if result["cases"]:
            found[f"{path.stem}.svg"] = charts.speed_chart(result)
        if result.get("memory"):
            found[f"{path.stem}_memory.svg"] = charts.memory_chart(result["memory"])
    for file, kind in SPECIAL.values():
        path = root / RESULTS / file
        if kind.chart is not None and path.is_file():
            found[f"{path.stem}.svg"] = kind.chart(kind.load(path))
    return found


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    if list(arguments) not in ([], ["--check"]):
        print(f"usage: {COMMAND} [--check]", file=sys.stderr)
        return 2
    try:
        if arguments:
            found = differences(root)
            print("\n".join([*found, f"mend it with: {COMMAND}"] if found else ["README.md, docs and charts agree"]))
            return int(bool(found))
        for path, text in generate(root).items():
            if path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")
                print(f"wrote {path.relative_to(root)}")
        for path, chart in outdated_charts(root).items():
            charts.draw(chart, path)
            print(f"drew {path.relative_to(root)}")
    except (OSError, ValueError, KeyError, ModuleNotFoundError) as error:
        print(f"bench.report.docs: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
