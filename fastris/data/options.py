"""The options that say which data a command reads, declared once for all commands; and the data that they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastris.data.base import DataError, ReferringDataset
from fastris.data.load import DATASETS, check_name, load_dataset
from fastris.options.declare import option


@dataclass(kw_only=True)
class DataOptions:
    """Fields for the options of a command that reads a data set, which inherits them.

    Raises:
        DataError: an unknown data set, or files named for one that has none. A class with a `__post_init__` of its own
            calls this one's.
    """

    dataset: str = option("refcoco", "data set: " + ", ".join(DATASETS))
    data_root: str | None = option(None, "folder of the data set's files; synthetic needs none")
    images: str | None = option(None, "folder of the data set's images, where they are not under data_root")
    format: str | None = option(None, "of its files, where data_root holds several: jsonl, refer, lmdb, parquet")
    on_error: Literal["raise", "skip"] = option("raise", "what to do about references that are unusable")

    def __post_init__(self) -> None:
        check_name(self.dataset)
        _where(self)


def load_split(options: DataOptions, split: str) -> ReferringDataset:
    """One split of the data that a command's options name; see :func:`load_dataset`."""
    return load_dataset(options.dataset, split, options.data_root, on_error=options.on_error, **_where(options))


def _where(options: DataOptions) -> dict[str, str]:
    """What the options say about where the files lie and how, as far as they say it."""
    given = {name: value for name in ("images", "format") if (value := getattr(options, name)) is not None}
    if given and options.dataset == "synthetic":
        raise DataError(f"dataset=synthetic reads no files, so {' and '.join(given)} must be left out")
    return given
