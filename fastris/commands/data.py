"""``fastris data``: what a folder holds, whether all of it can be used, and all of it in one safe format."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastris.data.base import DataError, printable
from fastris.data.formats.check import MENDS_OF_CHECK, UNREADABLE_FILE, SplitReport, check_split, count_split
from fastris.data.formats.convert import convert
from fastris.data.formats.extras import MissingLibrary
from fastris.data.formats.published import compare
from fastris.data.formats.table import FORMATS, NAMES, OWN_OPTIONS, Found, choose_format, discover, open_split
from fastris.options.declare import REQUIRED, option

WORD_LEN = {"refcocog_u": 22, "refcocog_g": 22}  # as published; 17 for the others
MOST_NAMED = 5  # references, for each problem


@dataclass
class DataConfig:
    """Looks at, checks or converts a data set.

    inspect: what the folder holds, from the annotation files alone, beside the published numbers of references
    check:   reads every phrase, image and mask once; says per problem how many and which; exit code 1 if there are any
    convert: writes the data set to the folder out= as JSON lines with run lengths, which every command reads
    """

    action: Literal["inspect", "check", "convert"] = option(REQUIRED, "what to do", positional=True)
    root: Path = option(REQUIRED, "folder with the files, an .lmdb file, or hf://OWNER/NAME", positional=True)
    dataset: str = option("auto", "which data set of the folder: " + ", ".join(NAMES) + "; auto: what is found there")
    format: Literal["auto", "jsonl", "refer", "lmdb", "parquet", "coco", "labelme", "cvat", "hub"] = option(
        "auto", "how it lies there; auto: as found"
    )
    split: str = option("all", "one split, such as val; all: every one")
    images: Path | None = option(None, "folder of the images, if it is not in its usual place")
    out: Path | None = option(None, "new folder that convert writes")
    copy_images: bool = option(False, "convert: copy the images instead of a link to their folder")
    several: Literal["skip", "merge"] | None = option(
        None, "objects of a picture with one label or phrase: left out (skip), or one mask", default_text="skip"
    )
    columns: str | None = option(None, "of a table of the hub, if not as usual: image=...,mask=...,text=...")
    streaming: bool = option(False, "read a data set of the hub row by row, without downloading it first")
    on_error: Literal["raise", "skip"] = option("raise", "convert: what to do about references that are unusable")
    word_len: int | None = option(
        None, "check: longer phrases are reported; none: as published, 17 or 22; 0: at no length", "tokens"
    )
    json: bool | str = option(False, "inspect, check: the report as JSON, on the console or in the file of this name")
    progress: bool = option(True, "show a progress bar on a terminal")

    def __post_init__(self) -> None:
        if self.dataset not in ("auto", *NAMES):
            raise ValueError(f"dataset={self.dataset!r} is unknown; choose auto or one of {', '.join(NAMES)}")
        if self.word_len is not None and self.word_len and not 3 <= self.word_len <= 77:
            raise ValueError(f"word_len={self.word_len} must lie in 3..77, or be 0 to report none as too long")
        if (self.action == "convert") != (self.out is not None):
            raise ValueError(
                "convert needs out=, the new folder" if self.out is None else f"{self.action} writes no out="
            )
        self.root = self.root.expanduser()


def run(config: DataConfig) -> int:
    """`fastris data`; returns the exit code."""
    found = _choose(config)
    if config.action == "convert":
        return _convert(config, found)
    reports = {entry: _reports(config, entry) for entry in found}
    troubles = sum(len(cases) for splits in reports.values() for r in splits.values() for cases in r.problems.values())
    if config.json:
        _write_json(config, reports)
    if config.json is not True:
        for entry, splits in reports.items():
            _print(config, entry, splits)
    if config.action == "inspect":
        return int(any(UNREADABLE_FILE in report.problems for splits in reports.values() for report in splits.values()))
    print(f"{troubles} problems" if troubles else "no problems", file=sys.stderr if config.json is True else sys.stdout)
    return int(troubles > 0)


def _choose(config: DataConfig) -> list[Found]:
    """The data sets that are meant."""
    if config.dataset != "auto":
        format = choose_format(config.dataset, config.root, config.format)
        if format is None:
            open_split(config.dataset, "", config.root)  # raises, and says what is looked for
        found = [Found(config.dataset, str(format))]
    else:
        found = [entry for entry in discover(config.root) if config.format in ("auto", entry.format)]
    listed = ", ".join(f"{entry.name} ({entry.format})" for entry in found)
    if not found:
        raise DataError(f"root={str(config.root)!r} holds nothing in format={config.format!r}")
    if config.action == "convert" and len(found) > 1:
        raise DataError(f"root={str(config.root)!r} holds {listed}; choose one with dataset= (and format=)")
    return found


def _splits(config: DataConfig, entry: Found) -> list[str]:
    splits = FORMATS[entry.format].load().splits(entry.name, config.root, config.images)
    if config.split == "all":
        return splits
    if config.split not in splits:
        raise DataError(f"split={config.split!r} is unknown; {entry.name} has {', '.join(splits)}")
    return [config.split]


def _own_options(config: DataConfig) -> dict[str, Any]:
    return {name: value for name in OWN_OPTIONS if (value := getattr(config, name)) not in (None, False)}


def _reports(config: DataConfig, entry: Found) -> dict[str, SplitReport]:
    """Split -> what was found; a file that cannot be read at all is a problem of its split."""
    reports: dict[str, SplitReport] = {}
    try:
        splits = _splits(config, entry)
    except DataError as error:
        if config.split != "all" or isinstance(error, MissingLibrary):
            raise
        reports["all"] = _unreadable(error)
        return reports
    word_len = WORD_LEN.get(entry.name, 17) if config.word_len is None else config.word_len
    with _ProgressBars(config.progress) as bars:
        for split in splits:
            try:
                dataset: Any = open_split(
                    entry.name,
                    split,
                    config.root,
                    format=entry.format,
                    images=config.images,
                    on_error="defer",
                    **_own_options(config),
                )
                if config.action == "inspect":
                    reports[split] = count_split(dataset, bars)
                else:
                    reports[split] = check_split(dataset, word_len, bars)
            except MissingLibrary:
                raise
            except DataError as error:
                reports[split] = _unreadable(error)
    return reports


def _unreadable(error: DataError) -> SplitReport:
    report = SplitReport()
    report.note(UNREADABLE_FILE, "", str(error))
    return report


def _print(config: DataConfig, entry: Found, splits: dict[str, SplitReport]) -> None:
    print(f"{printable(entry.name)} ({entry.format}) in {config.root}")
    for split, report in splits.items():
        kinds = [f"{report.references} references", f"{report.sentences} sentences", f"{report.images} images"]
        kinds += [f"{report.no_target} without a target"] if report.no_target else []
        compared = compare(entry.name, split, report.references, report.images, report.sentences)
        print(f"  {printable(split):<6} {', '.join(kinds)}; {compared}")
        for why, count in report.left_out.items():
            print(f"    {count} left out: {why}")
        for problem, cases in report.problems.items():
            ids = ", ".join(printable(ref_id) for ref_id, _ in cases[:MOST_NAMED] if ref_id != "")
            more = ", ..." if len(cases) > MOST_NAMED else ""
            print(f"    {len(cases)} x {problem}" + (f": ref_id {ids}{more}" if ids else ""))
            print("      first: " + "\n".join(map(printable, cases[0][1].split("\n"))))
            print(f"      mend: {MENDS_OF_CHECK[problem]}")
    if entry.name == "folder" and entry.format in ("lmdb", "parquet"):
        print("  these files do not name their data set: pass dataset=refcoco, ... to compare with published counts")


def _write_json(config: DataConfig, reports: dict[Found, dict[str, SplitReport]]) -> None:
    datasets = [
        {
            "dataset": entry.name,
            "format": entry.format,
            "splits": {
                split: report.as_dict()
                | {"published": compare(entry.name, split, report.references, report.images, report.sentences)}
                for split, report in splits.items()
            },
        }
        for entry, splits in reports.items()
    ]
    text = json.dumps({"root": str(config.root), "datasets": datasets}, indent=1)
    if config.json is True:
        print(text)
        return
    from fastris.runtime.storage import replacing

    with replacing(Path(str(config.json))) as path:
        path.write_text(text + "\n", encoding="utf-8")


def _convert(config: DataConfig, found: list[Found]) -> int:
    entry = found[0]
    assert config.out is not None
    with _ProgressBars(config.progress) as bars:
        manifest = convert(
            entry.name,
            config.root,
            config.out,
            format=entry.format,
            splits=_splits(config, entry),
            images=config.images,
            on_error=config.on_error,
            copy_images=config.copy_images,
            track=bars,
            **_own_options(config),
        )
    print(f"wrote {config.out}: {printable(entry.name)}, from {entry.format}")
    for split, counts in manifest["splits"].items():
        count = counts["references"]
        print(f"  {printable(split):<6} {count} references; {compare(entry.name, split, count)}")
        for problem, left_out in counts["left_out"].items():
            print(f"         {left_out} left out: {problem}")
    print(f"use it:  dataset={printable(entry.name)} data_root={config.out}")
    return 0


class _ProgressBars:
    """Progress bars, one after another, on a terminal; passes items on elsewhere."""

    def __init__(self, show: bool):
        self._show = show
        self._stack = ExitStack()
        self._bar: Any = None

    def __enter__(self) -> _ProgressBars:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        disable = not (self._show and console.is_terminal)
        self._bar = self._stack.enter_context(Progress(*columns, console=console, transient=True, disable=disable))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def __call__(self, items: Iterable[int], total: int, title: str) -> Iterator[int]:
        task = self._bar.add_task(printable(title), total=total)
        for item in items:
            yield item
            self._bar.advance(task)
        self._bar.remove_task(task)
