"""References whose images and annotations lie in files: what every format on disk has in common."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from fastris.data import annotation
from fastris.data.base import DataError, Reference, ReferringDataset
from fastris.data.paths import leaves_by_link

if TYPE_CHECKING:
    from PIL import Image

OnError = Literal["raise", "skip", "defer"]

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")  # Pillow's other readers are not for strangers' files

MISSING_IMAGE = "missing image"
UNREADABLE_IMAGE = "unreadable image"
SIZE_MISMATCH = "size mismatch"
EMPTY_MASK = "empty mask"
BAD_ANNOTATION = "bad annotation"
EMPTY_SENTENCE = "empty sentence"
BAD_RECORD = "bad record"
DUPLICATE_ID = "duplicate id"
OUTSIDE = "path outside of its folder"

MENDS = {
    MISSING_IMAGE: "put the file there (COCO's train2014 images), or give images=, the folder that holds them",
    UNREADABLE_IMAGE: "download the file again",
    SIZE_MISMATCH: "use the original COCO image, not a resized or turned one, or correct the annotation",
    EMPTY_MASK: "correct its segmentation in the annotation file",
    BAD_ANNOTATION: "correct its segmentation in the annotation file",
    EMPTY_SENTENCE: "correct the sentence in the annotation file",
    BAD_RECORD: "correct the record, or download the file again",
    DUPLICATE_ID: "give every reference an id of its own",
    OUTSIDE: "put the file itself there instead of a link, or give images=, the folder where the files are",
}
"""Problem of a reference, as it appears in `.skipped` -> what to do about it."""


class UnusableReference(DataError):
    """One reference cannot be used.

    Attributes:
        problem: a key of `MENDS`.
        ref_id: of the reference; "record N" where it has none.
        detail: what is wrong, in words.
    """

    def __init__(self, message: str, problem: str = BAD_RECORD, ref_id: int | str = "", detail: str = ""):
        super().__init__(message)
        self.problem, self.ref_id, self.detail = problem, ref_id, detail or message

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes send it back
        return type(self), (str(self), self.problem, self.ref_id, self.detail)


@dataclass(frozen=True)
class Annotated:
    """A reference with its annotation, not decoded.

    Attributes:
        reference: its ids and sentences.
        where: what messages add to its id, such as its annotation's id.
        path: of the image; the image's name only, where `pixels` holds it.
        height, width: of the image in pixels, as the annotation states them; 0 where it does not.
        segmentation: polygons or run lengths of COCO, or `annotation.Several` or `annotation.MaskPicture`.
        root: the folder that `path` must not leave, and the rest of the path.
        pixels: the encoded image, where it is not in a file.
    """

    reference: Reference
    where: str
    path: Path
    height: int
    width: int
    segmentation: Any
    root: tuple[Path, str] | None = None
    pixels: bytes | None = None


Row = TypeVar("Row")
Record = Annotated | UnusableReference


def collect(rows: Iterable[Row], build: Callable[[Row], Annotated], ref_id: Callable[[Row], Any]) -> Iterator[Record]:
    """`build` of each row, or, where that raises DataError, the error as one of this reference."""
    for row in rows:
        if isinstance(row, UnusableReference):
            yield row
            continue
        try:
            yield build(row)
        except UnusableReference as error:
            yield error
        except DataError as error:
            yield UnusableReference(str(error), BAD_RECORD, ref_id(row))


class AnnotatedDataset(ReferringDataset):
    """One split of a data set on disk.

    Opening a split reads its annotation files and decodes no image and no mask. Images come as stored: annotations
    are made for raw pixels, so EXIF orientation is not applied; grey and palette images become RGB.

    Args:
        name, split: of the data set.
        records: its references; those that a reader could not make sense of as errors.
        on_error: what an unusable reference does. "raise": a missing image file, an empty or malformed segmentation or
            an empty sentence is an error at once; what takes a look into the image or the mask (an unreadable image,
            a size that differs from the annotation's, a mask that encloses no pixel) is an error when that reference
            is read. "skip": all of that is checked at once, by reading image headers and outlining masks, which takes
            some seconds per 10,000 references; such references are left out and listed in `skipped`, and `len` never
            changes later. Either way an image whose pixels are damaged is an error when it is read. "defer", for
            tools that check: every reference is kept, and is an error when it is read.

    Raises:
        DataError: unusable references, or none that is usable.
    """

    def __init__(self, name: str, split: str, records: Iterable[Record], on_error: OnError):
        self.name = name
        self.split = split
        self.skipped = {}
        self._sizes: dict[Path, tuple[int, int]] = {}
        self._items: list[Record] = self._usable(list(records), on_error)

    @classmethod
    def finds(cls, name: str, root: Path) -> bool:
        """Whether the data set of this name lies under `root` in this reader's format."""
        raise NotImplementedError

    @classmethod
    def splits(cls, name: str, root: Path, images: str | Path | None = None) -> list[str]:
        """The splits that it has there."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._items)

    def reference(self, index: int) -> Reference:
        return self._item(index).reference

    def image(self, index: int) -> np.ndarray:
        """The image of reference `index`: (H, W, 3) uint8, RGB, EXIF orientation not applied.

        Raises:
            DataError: the file is damaged, or its size is not the annotation's.
        """
        item = self._item(index)
        with self._open(item) as image:
            self._compare_size(item, image.height, image.width)
            try:
                return np.array(image.convert("RGB"))
            except Exception as error:  # decoders fail in many ways
                raise self._unusable(UNREADABLE_IMAGE, item, str(error)) from error

    def mask(self, index: int) -> np.ndarray:
        """The object of reference `index`: (H, W) bool, at its image's size; polygons are merged.

        Raises:
            DataError: the segmentation encloses no pixel, or the image is unreadable or has another size.
        """
        item = self._item(index)
        height, width = self._check_size(item)
        code = self._check_mask(item)
        return np.zeros((height, width), bool) if code is None else annotation.decode(code)

    def run_lengths(self, index: int) -> dict[str, Any] | None:
        """`mask` as COCO's compressed run lengths, `{"size": [H, W], "counts": text}`; None if nothing is named."""
        item = self._item(index)
        height, width = self._check_size(item)
        code = self._check_mask(item)
        return None if code is None else {"size": [height, width], "counts": code["counts"].decode("ascii")}

    def image_folder(self, index: int) -> Path | None:
        """The folder in which the image of reference `index` has the reference's `file_name`; None if in none."""
        root = self._item(index).root
        return root[0] if root else None

    def encoded_image(self, index: int) -> Path | bytes:
        """The file that holds the image of reference `index`, or its bytes where the data set has no such file."""
        item = self._item(index)
        return item.path if item.pixels is None else item.pixels

    def _item(self, index: int) -> Annotated:
        item = self._items[index]
        if isinstance(item, UnusableReference):
            raise item
        return item

    def _usable(self, records: list[Record], on_error: OnError) -> list[Record]:
        checks: list[Callable[[Annotated], Any]] = [self._check_sentences, self._check_segmentation]
        if on_error == "skip":
            checks += [self._check_size, self._check_mask]
        looked: dict[Path, str] = {}
        seen: set[int | str] = set()
        usable: list[Record] = []
        unusable: list[UnusableReference] = []
        for item in records:
            try:
                if isinstance(item, UnusableReference):
                    raise item
                if item.reference.ref_id in seen:
                    raise self._unusable(DUPLICATE_ID, item, "another reference has this id")
                seen.add(item.reference.ref_id)
                self._check_file(item, looked)
                for check in checks:
                    check(item)
                usable.append(item)
            except UnusableReference as error:
                unusable.append(error)
                if on_error == "defer":
                    usable.append(error)
        if on_error != "defer":
            self._account(unusable, len(records), len(usable), on_error)
        return usable

    def _account(self, unusable: list[UnusableReference], total: int, usable: int, on_error: str) -> None:
        """List what is left out, or raise the first of it."""
        for error in unusable:
            self.skipped.setdefault(error.problem, []).append(error.ref_id)
        counts = ", ".join(f"{len(refs)} {problem}" for problem, refs in self.skipped.items())
        if unusable and on_error == "raise":
            raise DataError(f"{unusable[0]} (of {total} references in {self.split}: {counts})")
        if not usable:
            raise DataError(f"{self._title}: every one of its {total} references is unusable: {counts}")

    @property
    def _title(self) -> str:
        return f"{self.name} {self.split}"

    def _unusable(self, problem: str, item: Annotated, detail: str) -> UnusableReference:
        ref_id = item.reference.ref_id
        message = (
            f"{self._title}: {problem} at ref_id {ref_id} ({item.where}image {item.path}): {detail}. "
            f"Mend: {MENDS[problem]}; or pass on_error='skip' to leave such references out"
        )
        return UnusableReference(message, problem, ref_id, f"{item.path.name}: {detail}")

    def _missing(self, item: Annotated) -> UnusableReference:
        return self._unusable(MISSING_IMAGE, item, f"no file {item.path.name} in {item.path.parent}")

    def _check_file(self, item: Annotated, looked: dict[Path, str]) -> None:
        """Whether the image is there and stays in its folder; `looked` keeps what is known about each file."""
        if item.pixels is not None:
            return
        if item.path not in looked:
            leaves = item.root is not None and leaves_by_link(*item.root)
            looked[item.path] = OUTSIDE if leaves else "" if item.path.is_file() else MISSING_IMAGE
        if looked[item.path] == MISSING_IMAGE:
            raise self._missing(item)
        if looked[item.path]:
            raise self._unusable(OUTSIDE, item, f"a symbolic link leads out of {item.path.parent}")

    def _check_sentences(self, item: Annotated) -> None:
        if not all(item.reference.sentences):
            raise self._unusable(EMPTY_SENTENCE, item, f"sentences are {list(item.reference.sentences)}")

    def _check_segmentation(self, item: Annotated) -> None:
        """What can be said about the mask without making it."""
        if isinstance(item.segmentation, annotation.MaskPicture) or not item.height:
            return
        try:
            empty = not annotation.checked(item.segmentation, item.height, item.width)
        except annotation.BadAnnotation as error:
            raise self._bad(item, error) from error
        if empty and not item.reference.no_target:
            raise self._unusable(EMPTY_MASK, item, "its segmentation is empty")

    def _check_mask(self, item: Annotated) -> Any:
        """The mask's code; None where nothing is referred to."""
        try:
            code = annotation.encode(item.segmentation, *self._size(item))
        except annotation.BadAnnotation as error:
            raise self._bad(item, error) from error
        if item.reference.no_target:
            if code is not None:
                raise self._unusable(BAD_ANNOTATION, item, "it is marked no_target, but its mask is not empty")
        elif code is None:
            raise self._unusable(EMPTY_MASK, item, "its segmentation encloses no pixel")
        return code

    def _bad(self, item: Annotated, error: annotation.BadAnnotation) -> UnusableReference:
        problem = SIZE_MISMATCH if isinstance(error, annotation.WrongSize) else BAD_ANNOTATION
        return self._unusable(problem, item, str(error))

    def _size(self, item: Annotated) -> tuple[int, int]:
        """Height and width in pixels, from the image's header where the annotation does not state them."""
        return (item.height, item.width) if item.height else self._check_size(item)

    def _check_size(self, item: Annotated) -> tuple[int, int]:
        """Height and width of the image, checked against the annotation's; one header is read per image."""
        if item.pixels is not None or item.path not in self._sizes:
            with self._open(item) as image:
                size = image.height, image.width
            if item.pixels is None:
                self._sizes[item.path] = size
        else:
            size = self._sizes[item.path]
        self._compare_size(item, *size)
        return size

    def _compare_size(self, item: Annotated, height: int, width: int) -> None:
        if item.height and (height, width) != (item.height, item.width):
            real, stated = f"{width} x {height}", f"{item.width} x {item.height}"
            detail = f"the image is {real} pixels (width x height), its annotation was made for {stated}"
            raise self._unusable(SIZE_MISMATCH, item, detail)

    def _open(self, item: Annotated) -> Image.Image:
        """The image with its header read, and no more."""
        from PIL import Image

        try:
            image = Image.open(item.path if item.pixels is None else io.BytesIO(item.pixels), formats=IMAGE_FORMATS)
        except FileNotFoundError as error:
            raise self._missing(item) from error
        except Exception as error:  # headers are broken in many ways
            raise self._unusable(UNREADABLE_IMAGE, item, str(error)) from error
        if image.width * image.height > annotation.MAX_PIXELS:
            image.close()
            detail = f"{image.width} x {image.height} pixels, over {annotation.MAX_PIXELS}: a decompression bomb?"
            raise self._unusable(UNREADABLE_IMAGE, item, detail)
        return image
