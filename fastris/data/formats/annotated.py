"""The base class of all readers of data sets on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from fastris.data.base import DataError, Reference, ReferringDataset
from fastris.data.formats import annotation
from fastris.data.formats.budget import ERROR, Budget, TooMuch
from fastris.data.formats.usable import (
    BAD_ANNOTATION,
    BAD_RECORD,
    DUPLICATE_ID,
    MENDS,
    Annotated,
    Rule,
    Seen,
    UnusableReference,
    first_of,
)
from fastris.data.paths import Look

__all__ = ["BAD_ANNOTATION", "DUPLICATE_ID", "MENDS", "SPLIT_ALIASES", "Annotated", "AnnotatedDataset", "OnError",
           "Record", "UnusableReference", "collect"]  # fmt: skip

SPLIT_ALIASES = {"val-test": "val"}
"""The published configurations' name for scoring all sentences of val."""

OnError = Literal["raise", "skip", "defer"]
Row = TypeVar("Row")
Record = Annotated | UnusableReference


def collect(
    rows: Iterable[Row], build: Callable[[Row], Annotated], ref_id: Callable[[Row], Any], budget: Budget
) -> Iterator[Record]:
    """Build a reference from each row; where that fails, yield the error in its place.

    Raises:
        TooMuch: the split as a whole takes too much memory.
    """
    for row in rows:
        if isinstance(row, UnusableReference):
            yield row
            continue
        try:
            yield build(row)
        except UnusableReference as error:
            budget.spend(ERROR)
            yield error
        except TooMuch:  # an error of the whole split
            raise
        except (DataError, OSError) as error:  # OSError: the system cannot even look the file's name up
            budget.spend(ERROR)
            yield UnusableReference(str(error), BAD_RECORD, ref_id(row))


class AnnotatedDataset(ReferringDataset):
    """One split of a data set on disk.

    Opening a split reads its annotation files and, unless `on_error="skip"`, decodes no image and no mask. Images are
    returned as stored, since annotations are made for raw pixels: EXIF orientation is applied only to those that were
    annotated turned (`Annotated.upright`). Grey and palette images become RGB, transparency is dropped, and of an
    animation the first frame is used.

    Args:
        name, split: of the data set.
        records: its references, with an error in place of each one that the reader could not build.
        on_error: what to do about references that `usable.py`, the rule of `fastris data check`, calls unusable.
            "raise": annotations, and whether the image's file exists, are checked now, and the first problem raises.
            Problems that only show in the image or the mask (an unreadable, damaged or unsuitable image, a size that
            differs from the annotation's, a mask without pixels) raise when that reference is read.
            "skip": everything is checked now, every image decoded, which takes some 20 s per 10,000 photos of 640 x 480
            pixels. Unusable references are left out and listed in `skipped`; `len` never changes later. A file that
            is damaged or removed afterwards raises when it is read.
            "defer", for tools that check: every reference is kept, and an unusable one raises when it is read.
        left_out: problem -> ids of what the reader left out by its format's rule; they open `skipped`.

    Raises:
        DataError: unusable references, or none that is usable.
    """

    def __init__(
        self,
        name: str,
        split: str,
        records: Iterable[Record],
        on_error: OnError,
        look: Look | None = None,
        left_out: dict[str, list[int | str]] | None = None,
    ):
        self.name = name
        self.split = split
        self.skipped = dict(left_out or {})
        self._items: list[Record] = self._usable(list(records), on_error, look or Look())

    @cached_property
    def _rule(self) -> Rule:
        return Rule(f"{self.name} {self.split}")

    @classmethod
    def finds(cls, name: str, root: Path) -> bool:
        """Whether `root` holds the data set of this name in this reader's format."""
        raise NotImplementedError

    @classmethod
    def splits(cls, name: str, root: Path, images: str | Path | None = None) -> list[str]:
        """The splits that the data set of this name has under `root`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._items)

    def reference(self, index: int) -> Reference:
        return self._item(index).reference

    def image(self, index: int) -> np.ndarray:
        """The image of reference `index`: (H, W, 3) uint8, RGB, by EXIF turned only if it was annotated so.

        Raises:
            DataError: the file is damaged, or its size is not the annotation's.
        """
        return self._rule.image(self._item(index))

    def mask(self, index: int) -> np.ndarray:
        """The mask of reference `index`: (H, W) bool, at its image's size; the union of all polygons.

        Raises:
            DataError: the segmentation encloses no pixel, or the image is unreadable or has another size.
        """
        item = self._item(index)
        height, width = self._rule.size(item)
        code = self._rule.code(item)
        return np.zeros((height, width), bool) if code is None else annotation.decode(code)

    def run_lengths(self, index: int) -> dict[str, Any] | None:
        """`mask` as COCO's compressed run lengths, `{"size": [H, W], "counts": text}`; None for no target."""
        item = self._item(index)
        height, width = self._rule.size(item)
        code = self._rule.code(item)
        return None if code is None else {"size": [height, width], "counts": code["counts"].decode("ascii")}

    def image_folder(self, index: int) -> Path | None:
        """The folder that the `file_name` of reference `index` is relative to; None if the image is not in a folder."""
        root = self._item(index).root
        return root[0] if root else None

    def upright(self, index: int) -> bool:
        """Whether the image of reference `index` is taken as its EXIF orientation turns it."""
        return self._rule.upright(self._item(index))

    def encoded_image(self, index: int) -> Path | bytes:
        """The file that holds the image of reference `index`, or its bytes where the data set has no such file."""
        item = self._item(index)
        return item.path if item.pixels is None else item.pixels

    def _item(self, index: int) -> Annotated:
        item = self._items[index]
        if isinstance(item, UnusableReference):
            raise item
        return self._whole(item)

    def _whole(self, item: Annotated) -> Annotated:
        """The reference with its image's bytes, for readers that keep them in the file until they are needed."""
        return item

    def problems(self, index: int, seen: Seen) -> list[UnusableReference]:
        """All problems of reference `index`; its image is decoded. Pass the same `seen` for every index.

        The split must have been opened with `on_error="defer"`.
        """
        try:
            item = self._item(index)
        except UnusableReference as error:
            return [error, *error.also]
        return self._rule.examined(item, seen, lambda: self.image(index))

    def _usable(self, records: list[Record], on_error: OnError, look: Look) -> list[Record]:
        seen, usable, unusable = Seen(look=look), list[Record](), list[UnusableReference]()
        for item in records:
            error = item if isinstance(item, UnusableReference) else self._first_problem(item, seen, on_error)
            if error is not None:
                unusable.append(error)
            if error is None or on_error == "defer":
                usable.append(item if error is None else error)
        if on_error != "defer":
            self._account(unusable, len(records), len(usable), on_error)
        return usable

    def _first_problem(self, item: Annotated, seen: Seen, on_error: OnError) -> UnusableReference | None:
        """The first problem of a reference, None if it has none; only "skip" looks into image and mask."""
        found = self._rule.stated(item, seen)
        if found or on_error != "skip":
            return first_of(found)
        try:
            return first_of(self._rule.looked(self._whole(item), seen))
        except UnusableReference as error:  # its image's bytes are none
            return error

    def _account(self, unusable: list[UnusableReference], total: int, usable: int, on_error: str) -> None:
        """List the unusable references in `skipped`, or raise the first one; raise if no reference is left."""
        for error in unusable:
            self.skipped.setdefault(error.problem, []).append(error.ref_id)
        counts = ", ".join(f"{len(refs)} {problem}" for problem, refs in self.skipped.items())
        if unusable and on_error == "raise":
            raise DataError(f"{unusable[0]} (of {total} references in {self.split}: {counts})")
        if on_error == "skip":
            self._rule.way_out = "; it was in order when the data set was opened with on_error='skip'"
        if not usable:
            raise DataError(f"{self._rule.title}: every one of its {total} references is unusable: {counts}")
