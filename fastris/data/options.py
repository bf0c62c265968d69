"""The options that select a command's data, declared once for all commands, and the function that opens it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastris.data.base import DataError, ReferringDataset
from fastris.data.formats.table import FORMATS, OWN_OPTIONS
from fastris.data.load import DATASETS, check_name, load_dataset
from fastris.options.declare import option


@dataclass(kw_only=True)
class DataOptions:
    """Base class of the options of commands that read a data set.

    Raises:
        DataError: an unknown data set, or files named for one that has none. A class with a `__post_init__` of its own
            calls this one's.
    """

    dataset: str = option("", "data set: " + ", ".join(DATASETS), default_text="what data_root holds, else refcoco")
    data_root: str | None = option(None, "folder of the data set's files, or hf://OWNER/NAME; synthetic needs none")
    images: str | None = option(None, "folder of the data set's images, where they are not under data_root")
    format: str | None = option(None, "of its files, where data_root holds several: " + ", ".join(FORMATS))
    several: Literal["skip", "merge"] | None = option(
        None, "objects of a picture with one label or phrase: left out (skip), or one mask", default_text="skip"
    )
    columns: str | None = option(None, "of a table of the hub, if not as usual: image=...,mask=...,text=...")
    streaming: bool = option(False, "read a data set of the hub row by row, without downloading it first")
    on_error: Literal["raise", "skip"] = option("raise", "what to do about references that are unusable")

    def __post_init__(self) -> None:
        if not self.dataset:
            self.dataset = _held_in(self.data_root, self.format) if self.data_root else "refcoco"
        check_name(self.dataset)
        _reader_options(self)


def load_split(options: DataOptions, split: str) -> ReferringDataset:
    """Open one split of the data that a command's options select; see :func:`load_dataset`."""
    given = _reader_options(options)
    return load_dataset(options.dataset, split, options.data_root, on_error=options.on_error, **given)


def has_split(options: DataOptions, split: str) -> bool:
    """Whether the data has a split of that name; True where only opening it can tell, or says what is wrong."""
    from fastris.data.formats.annotated import SPLIT_ALIASES
    from fastris.data.formats.table import FORMATS, choose_format

    if options.dataset == "synthetic" or options.data_root is None:
        return True
    root = Path(options.data_root).expanduser()
    format = choose_format(options.dataset, root, options.format or "auto")
    if format is None:
        return True
    images = None if options.images is None else Path(options.images)
    return SPLIT_ALIASES.get(split, split) in FORMATS[format].load().splits(options.dataset, root, images)


def _held_in(root: str, format: str | None) -> str:
    """The one data set that a folder holds; refcoco where it is among several, and where nothing is found.

    Raises:
        DataError: several, none of them refcoco.
    """
    from fastris.data.formats.table import discover

    try:
        found = discover(root)
    except DataError:  # opening the data tells it better
        return "refcoco"
    names = list(dict.fromkeys(entry.name for entry in found if format in (None, "auto", entry.format)))
    if len(names) == 1 or "refcoco" in names or not names:
        return "refcoco" if "refcoco" in names or not names else names[0]
    raise DataError(f"data_root={root!r} holds {', '.join(names)}; choose one with dataset=")


def selection(options: DataOptions) -> dict[str, Any]:
    """The options that select the data, without a split, as far as they are given."""
    root = {"data_root": options.data_root} if options.data_root else {}
    return {"dataset": options.dataset, **root, **_reader_options(options)}


def _reader_options(options: DataOptions) -> dict[str, Any]:
    """The options for a data set's reader, as far as they are given."""
    given = {name: getattr(options, name) for name in ("images", "format", *OWN_OPTIONS)}
    given = {name: value for name, value in given.items() if value not in (None, False)}
    if given and options.dataset == "synthetic":
        raise DataError(f"dataset=synthetic reads no files, so {' and '.join(given)} must be left out")
    return given
