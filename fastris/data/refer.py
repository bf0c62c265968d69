"""RefCOCO, RefCOCO+ and RefCOCOg as their authors publish them: a pickle of references, COCO annotations, images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastris.data import annotation
from fastris.data.base import DataError, Reference, ReferringDataset
from fastris.data.refer_files import LAYOUT, Annotated, locate, read_split

if TYPE_CHECKING:
    from PIL import Image

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")  # Pillow's other readers are not for strangers' files
SPLIT_ALIASES = {"val-test": "val"}  # the published configurations' name for scoring all sentences of val

MISSING_IMAGE = "missing image"
UNREADABLE_IMAGE = "unreadable image"
SIZE_MISMATCH = "size mismatch"
EMPTY_MASK = "empty mask"
BAD_ANNOTATION = "bad annotation"
EMPTY_SENTENCE = "empty sentence"

MENDS = {
    MISSING_IMAGE: "put the file there (COCO's train2014 images), or give images=, the folder that holds them",
    UNREADABLE_IMAGE: "download the file again",
    SIZE_MISMATCH: "use the original COCO image, not a resized or turned one, or correct instances.json",
    EMPTY_MASK: "correct its segmentation in instances.json",
    BAD_ANNOTATION: "correct its segmentation in instances.json",
    EMPTY_SENTENCE: "correct the sentence in the refs file",
}
"""Problem of a reference, as it appears in `.skipped` -> what to do about it."""


class UnusableReference(DataError):
    """One reference cannot be used; `problem` is a key of `MENDS`."""

    problem = ""


class ReferDataset(ReferringDataset):
    """One split of RefCOCO, RefCOCO+ or RefCOCOg.

    Expected under `root`: `refcoco/refs(unc).p`, `refcoco+/refs(unc).p`, `refcocog/refs(umd).p` or
    `refcocog/refs(google).p`, with `instances.json` beside, and COCO's images in
    `images/mscoco/images/train2014`, `images/train2014` or `train2014`.

    Opening a split reads the two annotation files and decodes no image and no mask. Sentences are the files' cleaned
    ones (`sent`), stripped, as the published code takes them. Images come as stored: COCO annotates raw pixels, so
    EXIF orientation is not applied; grey and palette images become RGB.

    Args:
        name: a key of `LAYOUT`.
        split: a split of that file: "train", "val", and "testA", "testB" or "test"; "val-test" means "val".
        root: the folder described above.
        images: the folder of the images, if it is none of those.
        on_error: what an unusable reference does. "raise": a missing image file, an empty or malformed segmentation or
            an empty sentence is an error at once; what takes a look into the image or the mask (an unreadable image,
            a size that differs from the annotation's, a mask that encloses no pixel) is an error when that reference
            is read. "skip": all of that is checked at once, by reading image headers and outlining masks, which takes
            some seconds per 10,000 references; such references are left out and listed in `skipped`, and `len` never
            changes later. Either way an image whose pixels are damaged is an error when it is read.

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
        on_error: Literal["raise", "skip"] = "raise",
    ):
        if name not in LAYOUT:
            raise DataError(f"dataset={name!r} is unknown in the REFER layout; choose one of {', '.join(LAYOUT)}")
        files = locate(name, Path(root).expanduser(), images)
        self.name = name
        self.split = SPLIT_ALIASES.get(split, split)
        self.skipped = {}
        self._sized: set[int | str] = set()
        self._items = self._usable(read_split(files, self.split), on_error)

    def __len__(self) -> int:
        return len(self._items)

    def reference(self, index: int) -> Reference:
        return self._items[index].reference

    def image(self, index: int) -> np.ndarray:
        """The image of reference `index`: (H, W, 3) uint8, RGB, EXIF orientation not applied.

        Raises:
            DataError: the file is damaged, or its size is not the annotation's.
        """
        item = self._items[index]
        with self._open(item) as image:
            self._compare_size(item, image)
            try:
                return np.array(image.convert("RGB"))
            except (OSError, ValueError, SyntaxError) as error:
                raise self._unusable(UNREADABLE_IMAGE, item, str(error)) from error

    def mask(self, index: int) -> np.ndarray:
        """The object of reference `index`: (H, W) bool, at its image's size; polygons are merged.

        Raises:
            DataError: the segmentation encloses no pixel, or the image is unreadable or has another size.
        """
        item = self._items[index]
        self._check_size(item)
        return annotation.decode(self._check_mask(item))

    def _usable(self, items: list[Annotated], on_error: str) -> list[Annotated]:
        checks: list[Callable[[Annotated], Any]] = [self._check_sentences, self._check_segmentation]
        if on_error == "skip":
            checks += [self._check_size, self._check_mask]
        present = {path for path in {item.path for item in items} if path.is_file()}
        usable, unusable = [], []
        for item in items:
            try:
                if item.path not in present:
                    raise self._missing(item)
                for check in checks:
                    check(item)
                usable.append(item)
            except UnusableReference as error:
                unusable.append(error)
                self.skipped.setdefault(error.problem, []).append(item.reference.ref_id)
        counts = ", ".join(f"{len(refs)} {problem}" for problem, refs in self.skipped.items())
        if unusable and on_error == "raise":
            raise DataError(f"{unusable[0]} (of {len(items)} references in {self.split}: {counts})")
        if not usable:
            raise DataError(f"{self._title}: every one of its {len(items)} references is unusable: {counts}")
        return usable

    @property
    def _title(self) -> str:
        return f"{self.name} {self.split}"

    def _unusable(self, problem: str, item: Annotated, detail: str) -> UnusableReference:
        error = UnusableReference(
            f"{self._title}: {problem} at ref_id {item.reference.ref_id} (ann_id {item.ann_id}, image {item.path}): "
            f"{detail}. Mend: {MENDS[problem]}; or pass on_error='skip' to leave such references out"
        )
        error.problem = problem
        return error

    def _missing(self, item: Annotated) -> UnusableReference:
        return self._unusable(MISSING_IMAGE, item, f"no file {item.path.name} in {item.path.parent}")

    def _check_sentences(self, item: Annotated) -> None:
        if not all(item.reference.sentences):
            raise self._unusable(EMPTY_SENTENCE, item, f"sentences are {list(item.reference.sentences)}")

    def _check_segmentation(self, item: Annotated) -> None:
        """What can be said about the mask without making it."""
        try:
            empty = not annotation.checked(item.segmentation, item.height, item.width)
        except annotation.BadAnnotation as error:
            problem = SIZE_MISMATCH if isinstance(error, annotation.WrongSize) else BAD_ANNOTATION
            raise self._unusable(problem, item, str(error)) from error
        if empty:
            raise self._unusable(EMPTY_MASK, item, "its segmentation is empty")

    def _check_mask(self, item: Annotated) -> Any:
        code = annotation.encode(item.segmentation, item.height, item.width)
        if code is None:
            raise self._unusable(EMPTY_MASK, item, "its segmentation encloses no pixel")
        return code

    def _check_size(self, item: Annotated) -> None:
        if item.reference.image_id in self._sized:
            return
        with self._open(item) as image:
            self._compare_size(item, image)
        self._sized.add(item.reference.image_id)

    def _compare_size(self, item: Annotated, image: Image.Image) -> None:
        if image.size != (item.width, item.height):
            real, stated = f"{image.width} x {image.height}", f"{item.width} x {item.height}"
            detail = f"the image is {real} pixels (width x height), its annotation was made for {stated}"
            raise self._unusable(SIZE_MISMATCH, item, detail)

    def _open(self, item: Annotated) -> Image.Image:
        """The image with its header read, and no more."""
        from PIL import Image

        try:
            return Image.open(item.path, formats=IMAGE_FORMATS)
        except FileNotFoundError as error:
            raise self._missing(item) from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise self._unusable(UNREADABLE_IMAGE, item, str(error)) from error
