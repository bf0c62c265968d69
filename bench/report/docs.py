"""``python -m bench.report.docs``: README's measured blocks and charts, generated from bench/results.

A block lies between ``<!-- bench: NAME -->`` and ``<!-- /bench -->``; all other text is left as it is. ``--check``
writes nothing and fails when a block or a chart is not what the result files say.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..memory import command as recompute
from ..modelled import cards
from ..studies import look_once
from . import charts
from . import tables as report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("bench") / "results"
COMMAND = "python -m bench.report.docs"
MARK = re.compile(r"<!-- (?P<end>/)?bench(?:: (?P<name>\S+))? -->")


@dataclass(frozen=True)
class Kind:
    """What a result file becomes: how it is read, the text of its block, and its chart, if it has one.

    ``page`` gets the content and the file's name; ``picture`` is the chart's alternative text.
    """

    load: Callable[[Path], Any]
    page: Callable[[Any, str], str]
    chart: Callable[[Any], str] | None = None
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
    return f"{report.table(('', *columns), rows, aligned=False)}\n\n<sub>{' '.join(notes)}</sub>"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


TIMED = Kind(report.load, report.page, charts.speed_chart, "times faster than the published formulas")
SPECIAL = {
    "look-once": (
        "look_once.json",
        Kind(report.load, look_once.page, charts.look_once_chart, "expressions per second, over expressions per image"),
    ),
    "cards": (
        "modelled_cards.json",
        Kind(cards.load, cards.page, cards.chart, "modelled time of a training step on cards that were not measured"),
    ),
    "memory": ("whole_memory.json", Kind(recompute.load, recompute.page)),
    "demo": ("demo_metrics.json", Kind(_load_json, _demo_page)),
}
"""Blocks that are no table of cases, with their files; any other block NAME is of NAME.json or NAME_*.json."""


class BlockError(ValueError):
    """README's marks do not fit each other or the result files; the message says which and how to mend it."""


def generate(root: Path) -> dict[Path, str]:
    """What README.md and the charts of the checkout ``root`` have to be. Raises BlockError, OSError, ValueError."""
    files = {root / RESULTS / name: text for name, text in _charts(root).items()}
    readme = root / "README.md"
    files[readme] = "".join(text for _, text in _pieces(root, readme.read_text(encoding="utf-8")))
    return files


def differences(root: Path) -> list[str]:
    """What in the checkout is not as the result files say: blocks by name, charts by path. Empty if all agrees."""
    found = []
    text = (root / "README.md").read_text(encoding="utf-8")
    at = 0
    for name, wanted in _pieces(root, text):
        if name is None:
            at = text.index(wanted, at) + len(wanted)
            continue
        end = text.index("<!-- /bench -->", at)
        if text[at:end] != wanted:
            found.append(f"README.md, block {name}: not what {_source(root, name).relative_to(root)} says")
        at = end
    for name, wanted in _charts(root).items():
        path = root / RESULTS / name
        if not path.is_file() or path.read_text(encoding="utf-8") != wanted:
            found.append(f"{RESULTS / name}: not what the result files say")
    return found


def _pieces(root: Path, text: str) -> list[tuple[str | None, str]]:
    """README cut at its marks: (None, text that stays, marks included) and (name, generated text) in turn."""
    pieces: list[tuple[str | None, str]] = []
    at, name = 0, None
    for mark in MARK.finditer(text):
        if name is None and mark["end"] is None and mark["name"]:
            pieces.append((None, text[at : mark.end()]))
            name, at = mark["name"], mark.end()
            pieces.append((name, f"\n\n{block(root, name)}\n\n"))
        elif name is not None and mark["end"]:
            name, at = None, mark.start()
        else:
            line = text.count("\n", 0, mark.start()) + 1
            raise BlockError(
                f"README.md, line {line}: {mark[0]} does not fit the mark before it; a block is "
                "<!-- bench: NAME --> ... <!-- /bench -->"
            )
    if name is not None:
        raise BlockError(f"README.md: block {name} has no end; put <!-- /bench --> behind it")
    return [*pieces, (None, text[at:])]


def block(root: Path, name: str) -> str:
    """The text of one block. Raises BlockError for a name that no result file goes by."""
    source, kind = _source(root, name), SPECIAL[name][1] if name in SPECIAL else TIMED
    content = kind.load(source)
    text = kind.page(content, str(source.relative_to(root)))
    if kind.chart is None or not content.get("cases", True):
        return text
    return f"![{kind.picture}]({RESULTS / source.stem}.svg)\n\n{text}"


def _source(root: Path, name: str) -> Path:
    folder = root / RESULTS
    if name in SPECIAL:
        found = [folder / SPECIAL[name][0]]
    else:
        found = [folder / f"{name}.json"] if (folder / f"{name}.json").is_file() else _timed_files(root, f"{name}_*")
    if len(found) != 1 or not found[0].is_file():
        known = [*SPECIAL, *(path.stem for path in _timed_files(root))]
        raise BlockError(f"README.md: block {name} is not of one result file; blocks can be {', '.join(known)}")
    return found[0]


def _timed_files(root: Path, stem: str = "*") -> list[Path]:
    """The files of ``python -m bench``: those that hold cases."""
    special = {file for file, _ in SPECIAL.values()}
    paths = [path for path in sorted((root / RESULTS).glob(f"{stem}.json")) if path.name not in special]
    return [path for path in paths if "cases" in _load_json(path)]


def _charts(root: Path) -> dict[str, str]:
    """Name -> content of every chart that the result files give."""
    found = {}
    for path in _timed_files(root):
        result = report.load(path)
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
            print("\n".join([*found, f"mend it with: {COMMAND}"] if found else ["README.md and the charts agree"]))
            return int(bool(found))
        for path, text in generate(root).items():
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")
                print(f"wrote {path.relative_to(root)}")
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.report.docs: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
