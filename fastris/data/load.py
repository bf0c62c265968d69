"""Open one split of a data set by the data set's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastris.data.base import DataError, ReferringDataset

DATASETS = ("synthetic", "refcoco", "refcoco+", "refcocog_u", "refcocog_g", "grefcoco", "refcoco-m", "folder")


def check_name(name: str) -> None:
    """Raise :class:`DataError`, listing the known names, unless there is a data set of that name."""
    if name not in DATASETS:
        raise DataError(f"dataset={name!r} is unknown; choose one of {', '.join(DATASETS)}")


def load_dataset(
    name: str,
    split: str,
    root: str | Path | None = None,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    **options: Any,
) -> ReferringDataset:
    """Open one split of a data set by name.

    Args:
        name: "synthetic" (made on the fly, no files); "refcoco", "refcoco+", "refcocog_u" (the UMD split,
            `refs(umd).p`), "refcocog_g" (the Google split, `refs(google).p`) or "grefcoco"; "refcoco-m", the cleaned
            masks of RefCOCO's validation split; "folder" for your own.
        split: the split's name in that data set, for instance "train", "val", "testA", "testB", "test".
        root: the folder that holds the files, in any of the formats of `fastris.data.formats`, or `hf://OWNER/NAME` for
            the Hugging Face hub; not used by "synthetic", and "refcoco-m" has the hub's for a default.
        on_error: "raise" for an error that names the first unusable reference; "skip" to check every file now, leave
            unusable references out and list them in `.skipped`; see `AnnotatedDataset`.
        options: passed on to `SyntheticExpressions`, or to the reader of the format; those share `images=`, the folder
            of the images, and `format=`, a key of `fastris.data.formats.table.FORMATS` where `root` holds several.

    Raises:
        DataError: unknown name or split, missing `root`, or missing or unusable files.
    """
    check_name(name)
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error={on_error!r} is unknown; choose 'raise' or 'skip'")
    if name == "synthetic":
        from fastris.data.scenes.dataset import SyntheticExpressions

        return SyntheticExpressions(split, **options)
    if root is None and name == "refcoco-m":
        from fastris.data.formats.hub import NAMED

        root = NAMED[name]
    if root is None:
        raise DataError(f"dataset={name!r} needs root= (data_root), the folder that holds its files")
    from fastris.data.formats.table import open_split

    return open_split(name, split, root, on_error=on_error, **options)
