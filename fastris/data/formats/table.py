"""The table of formats on disk, and the search for the one that a folder holds."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from fastris.data.base import DataError
from fastris.data.formats.annotated import AnnotatedDataset
from fastris.data.paths import unreadable

NAMES = ("refcoco", "refcoco+", "refcocog_u", "refcocog_g", "grefcoco", "refcoco-m", "folder")
"""Data sets that are read from files; "folder" is your own data."""


OWN_OPTIONS = ("several", "columns", "streaming")
"""Options of commands that only some formats have."""


class Format(NamedTuple):
    """A format: the module and class of its reader, imported only when needed, its layout in words, and which of
    `OWN_OPTIONS` the reader takes."""

    module: str
    reader: str
    layout: str
    options: tuple[str, ...] = ()

    def load(self) -> type[AnnotatedDataset]:
        return getattr(importlib.import_module(self.module), self.reader)


FORMATS = {
    "jsonl": Format("fastris.data.formats.jsonl", "FolderDataset", "*.jsonl with images/ and masks/ (or converted)"),
    "refer": Format(
        "fastris.data.formats.refer",
        "ReferDataset",
        "refcoco/refs(unc).p or grefcoco/grefs(unc).json, instances.json beside, images/train2014/",
    ),
    "lmdb": Format(
        "fastris.data.formats.lmdb_files", "LmdbDataset", "lmdb/NAME/SPLIT.lmdb and masks/NAME/ of CRIS, ETRIS"
    ),
    "parquet": Format(
        "fastris.data.formats.parquet", "ParquetDataset", "data/*.parquet of jxu124/refcoco, coco/train2014/"
    ),
    "coco": Format(
        "fastris.data.formats.coco",
        "CocoDataset",
        "COCO's instances as annotations/*.json, *.json or train/_annotations.coco.json",
        ("several",),
    ),
    "labelme": Format(
        "fastris.data.formats.labelme",
        "LabelmeDataset",
        "LabelMe's *.json beside its pictures, or in train/, val/",
        ("several",),
    ),
    "cvat": Format(
        "fastris.data.formats.cvat",
        "CvatDataset",
        "annotations.xml of CVAT for images 1.1, images/",
        ("several",),
    ),
    "hub": Format(
        "fastris.data.formats.hub",
        "HubDataset",
        "hf://OWNER/NAME of the Hugging Face hub, or its files with pictures in them",
        ("columns", "streaming"),
    ),
}
"""Formats by name, in the order in which a folder is searched for them."""


LABELS = ("coco", "labelme", "cvat", "hub")
"""Formats of labels and tables in general, which may lie beside data in one of the others; `discover` prefers those."""


class Found(NamedTuple):
    """A data set that a folder holds, and its format."""

    name: str
    format: str


def choose_format(name: str, root: Path, format: str = "auto") -> str | None:
    """The first format in which `root` holds the data set, or None; a `format` that is not "auto" is returned as is.

    Raises:
        DataError: unknown format.
    """
    if format != "auto":
        if format not in FORMATS:
            raise DataError(f"format={format!r} is unknown; choose auto or one of {', '.join(FORMATS)}")
        return format
    return next((key for key, entry in FORMATS.items() if entry.load().finds(name, root)), None)


def open_split(
    name: str, split: str, root: str | Path, *, format: str = "auto", images: str | Path | None = None, **options: Any
) -> AnnotatedDataset:
    """Open one split of a data set on disk, in the format that is found; see `fastris.data.load_dataset`.

    Raises:
        DataError: unknown format, nothing of that name under `root`, or what the format's reader raises.
    """
    root = Path(root).expanduser()
    chosen = choose_format(name, root, format)
    if chosen is None:
        raise DataError(_nothing(name, root))
    for option in OWN_OPTIONS:
        if option in options and option not in FORMATS[chosen].options:
            takers = ", ".join(key for key, entry in FORMATS.items() if option in entry.options)
            raise DataError(f"{option}= is for the formats {takers}, but {root} is read as {chosen}; leave it out")
    reader: Any = FORMATS[chosen].load()
    return reader(name, split, root, images=images, **options)


def discover(root: str | Path) -> list[Found]:
    """The data sets in a folder. Files that do not name their data set count as "folder".

    Raises:
        DataError: there is no such folder, or nothing in it.
    """
    root = Path(root).expanduser()
    everything = _discovered(root, [key for key in FORMATS if key not in LABELS]) or _discovered(root, list(LABELS))
    if not everything:
        raise DataError(_nothing("folder", root))
    return everything


def _discovered(root: Path, formats: list[str]) -> list[Found]:
    """The data sets in a folder in these formats."""
    readers = {key: FORMATS[key].load() for key in formats}
    nameless = [key for key, reader in readers.items() if reader.finds("folder", root)]
    found = [
        Found(name, key)
        for name in NAMES[:-1]
        for key, reader in readers.items()
        if key not in nameless and reader.finds(name, root)
    ]
    return found + [Found(_stated_name(root, key), key) for key in nameless]


def _stated_name(root: Path, format: str) -> str:
    if format == "hub":
        from fastris.data.formats.hub import NAMED, source_of

        repo = f"hf://{source_of(root).repo}"
        return next((name for name, place in NAMED.items() if place == repo), "folder")
    if format != "jsonl":
        return "folder"
    from fastris.data.formats.jsonl import read_manifest

    return read_manifest(root).get("name", "folder")


def _nothing(name: str, root: Path) -> str:
    try:
        if root.is_dir():
            os.listdir(root)
    except OSError as error:  # searching a folder without permission finds nothing and raises nothing
        return str(unreadable(root, error))
    layouts = "; ".join(f"{key}: {entry.layout}" for key, entry in FORMATS.items())
    if name not in ("folder", "refcoco-m"):
        from fastris.data.formats.refer_files import locate

        try:
            locate(name, root, None)
        except DataError as error:
            own = next((key for key, entry in FORMATS.items() if entry.load().finds("folder", root)), None)
            hint = f". It does hold data of your own ({own}): pass dataset=folder" if own else ""
            return f"{error}{hint}. Other formats are looked for, too: {layouts}"
    what = "holds no data set" if root.is_dir() else "is no folder" if root.exists() else "does not exist"
    return f"root={str(root)!r} {what}. Formats that are looked for: {layouts}"
