"""RefCOCO, RefCOCO+ and RefCOCOg as their authors publish them: a pickle of references, COCO annotations, images."""

from __future__ import annotations

from pathlib import Path

from fastris.data.base import DataError
from fastris.data.formats.annotated import SPLIT_ALIASES, AnnotatedDataset, OnError
from fastris.data.formats.refer_files import LAYOUT, holds, locate, read_split, splits_of


class ReferDataset(AnnotatedDataset):
    """One split of RefCOCO, RefCOCO+ or RefCOCOg.

    Expected under `root`: `refcoco/refs(unc).p`, `refcoco+/refs(unc).p`, `refcocog/refs(umd).p` or
    `refcocog/refs(google).p`, with `instances.json` beside, and COCO's images in
    `images/mscoco/images/train2014`, `images/train2014` or `train2014`. Sentences are the files' cleaned ones (`sent`),
    stripped, as the published code takes them.

    Args:
        name: a key of `LAYOUT`.
        split: a split of that file: "train", "val", and "testA", "testB" or "test"; "val-test" means "val".
        root: the folder described above.
        images: the folder of the images, if it is none of those.
        on_error: "raise" or "skip", as `AnnotatedDataset` describes.

    Raises:
        DataError: unknown name or split, missing files (all are listed), damaged or inconsistent annotation files,
            unusable references.
    """

    def __init__(
        self,
        name: str,
        split: str,
        root: str | Path,
        *,
        images: str | Path | None = None,
        on_error: OnError = "raise",
    ):
        if name not in LAYOUT:
            raise DataError(f"dataset={name!r} is unknown in the REFER layout; choose one of {', '.join(LAYOUT)}")
        files = locate(name, Path(root).expanduser(), images)
        split = SPLIT_ALIASES.get(split, split)
        super().__init__(name, split, read_split(files, split), on_error)

    @classmethod
    def finds(cls, name: str, root: Path) -> bool:
        """Whether the references of this data set lie under `root` in this format."""
        return name in LAYOUT and holds(name, root)

    @classmethod
    def splits(cls, name: str, root: Path, images: str | Path | None = None) -> list[str]:
        """The splits that the data set has."""
        return splits_of(locate(name, root, images).refs)
