"""The one rule for which references are usable: `data check`, `on_error` and every reader apply it.

Its checks, in this order; `MENDS` names each problem and says what to do about it:

- the annotation (`Rule.stated`): a unique id, and one image to one `image_id`; an image that is a file and stays in its
  folder; sentences that hold a word, in at most 1000 characters; a segmentation of COCO's form;
- the files (`Rule.looked`): an image whose header can be read, of a colour mode that becomes RGB without clipping, with
  sides that the letterbox takes and of the size that the annotation was made for; a mask with at least one pixel; and
  pixels that can be decoded.

A reference that passes goes through training and evaluation. The rule cannot see what no decoder reports: flipped bits
inside of a JPEG that still decodes, and files that change later.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from dataclasses import field as default
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastris.data.base import MAX_CHARACTERS, DataError, Reference, printable
from fastris.data.formats import annotation, orientation
from fastris.data.paths import GONE, IRREGULAR, OUT, Look

if TYPE_CHECKING:
    from PIL import Image

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")  # Pillow's other readers are not for untrusted files
IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")  # of 8 bits
MAX_SIDE = 32766  # pixels; OpenCV 4 warps no image with a longer side

MISSING_IMAGE = "missing image"
UNREADABLE_IMAGE = "unreadable image"
UNSUITABLE_IMAGE = "unsuitable image"
SIZE_MISMATCH = "size mismatch"
EMPTY_MASK = "empty mask"
BAD_ANNOTATION = "bad annotation"
EMPTY_SENTENCE = "empty sentence"
BAD_PHRASE = "phrase without a word"
ENDLESS_PHRASE = "phrase over 1000 characters"
BAD_RECORD = "bad record"
DUPLICATE_ID = "duplicate id"
TWO_IMAGES = "image id of two images"
OUTSIDE = "path outside of its folder"

MENDS = {
    MISSING_IMAGE: "put the file there (COCO's train2014 images), or give images=, the folder that holds them",
    UNREADABLE_IMAGE: "download the file again",
    UNSUITABLE_IMAGE: f"shrink, crop or convert it (and its mask) to 8-bit RGB with sides of at most {MAX_SIDE} pixels",
    SIZE_MISMATCH: "use the original COCO image, not a resized or turned one, or correct the annotation",
    EMPTY_MASK: "correct its segmentation in the annotation file",
    BAD_ANNOTATION: "correct its segmentation in the annotation file",
    EMPTY_SENTENCE: "correct the sentence in the annotation file",
    BAD_PHRASE: f"write a phrase that names the object, of at most {MAX_CHARACTERS} characters",
    ENDLESS_PHRASE: f"write a phrase that names the object, of at most {MAX_CHARACTERS} characters",
    BAD_RECORD: "correct the record, or download the file again",
    DUPLICATE_ID: "give every reference an id of its own",
    TWO_IMAGES: "give every image an image_id of its own",
    OUTSIDE: "put the file itself there instead of a link, or give images=, the folder where the files are",
}
"""Problem of a reference, as it appears in `.skipped` -> what to do about it."""

PLAIN = re.compile(r"(?=[^0-9A-Za-z]*[0-9A-Za-z])[ -%'-;=-~]+")  # a word in ASCII; neither "&" (HTML) nor "<" (marks)


class UnusableReference(DataError):
    """One reference cannot be used.

    Attributes:
        problem: a key of `MENDS`.
        ref_id: the reference's id; "record N" where it has none.
        detail: what is wrong, in words, with the image's name.
        reason: `detail` without the image's name.
        also: the reference's other problems.
    """

    reason: str = ""
    also: tuple[UnusableReference, ...] = ()

    def __init__(self, message: str, problem: str = BAD_RECORD, ref_id: int | str = "", detail: str = ""):
        super().__init__(message)
        self.problem, self.detail = problem, printable(detail or message)
        self.ref_id = _writable(ref_id) if isinstance(ref_id, str) else ref_id

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes send it back
        return type(self), (str(self), self.problem, self.ref_id, self.detail)


@dataclass(frozen=True)
class Annotated:
    """A reference with its annotation, not yet decoded.

    Attributes:
        reference: its ids and sentences.
        where: what messages add to its id, such as its annotation's id.
        path: the image's file; only its name where `pixels` holds the image.
        height, width: of the image in pixels, as the annotation states them; 0 where it does not.
        segmentation: polygons or run lengths of COCO, or `annotation.Several` or `annotation.MaskPicture`.
        root: the folder that `path` must stay in, and the path relative to it.
        pixels: the encoded image, where it is not in a file.
        upright: whether it was annotated as its EXIF orientation turns it, unless the stated size says that it was
            annotated as stored; None: only where the stated size says so.
    """

    reference: Reference
    where: str
    path: Path
    height: int
    width: int
    segmentation: Any
    root: tuple[Path, str] | None = None
    pixels: bytes | None = None
    upright: bool | None = False


@dataclass
class Seen:
    """What the checks of earlier references found: it avoids repeated reads, and shows ids that are used twice.

    Attributes:
        ids: the references' ids.
        images: image_id -> its image, as a path or a digest of the bytes.
        look: checks the files of images and masks.
        damage: image -> why its pixels cannot be decoded; None if they can.
    """

    ids: set[int | str] = default(default_factory=set)
    images: dict[int | str, Path | bytes] = default(default_factory=dict)
    look: Look = default(default_factory=Look)
    damage: dict[Path | bytes, UnusableReference | None] = default(default_factory=dict)


class Rule:
    """The rule for the references of one split, whose messages begin with `title`.

    Attributes:
        way_out: the end of every message, which says what the user can do.
    """

    def __init__(self, title: str):
        self.title = title
        self.way_out = "; or pass on_error='skip' to leave such references out"
        self._sizes: dict[Path, tuple[int, int]] = {}
        self._spelled: dict[Path, dict[str, str]] = {}

    def unusable(self, problem: str, item: Annotated, detail: str) -> UnusableReference:
        """The error for a problem of a reference: its message, with the mend, and its detail."""
        ref_id = item.reference.ref_id
        message = (
            f"{self.title}: {problem} at ref_id {ref_id} ({item.where}image {item.path}): {detail}. "
            f"Mend: {MENDS[problem]}{self.way_out}"
        )
        error = UnusableReference(message, problem, ref_id, f"{item.path.name}: {detail}")
        error.reason = detail
        return error

    def stated(self, item: Annotated, seen: Seen) -> list[UnusableReference]:
        """The problems of the annotation; opens no image and no mask."""
        return _failures(
            lambda: self.alone(item, seen),
            lambda: self._place(item, seen),
            lambda: self.sentences(item),
            lambda: self._segmentation(item),
        )

    def looked(self, item: Annotated, seen: Seen, decode: Callable[[], Any] | None = None) -> list[UnusableReference]:
        """The problems of the image and the mask, for a reference without problems in `stated`; decodes an image once.

        Args:
            item, seen: the reference, and what earlier checks found.
            decode: decodes its image; the default is faster for a JPEG, and finds the same errors.
        """
        return _failures(lambda: self.size(item)) or _failures(
            lambda: self.code(item), lambda: self._pixels(item, seen, decode or (lambda: self._decode(item)))
        )

    def examined(self, item: Annotated, seen: Seen, decode: Callable[[], Any]) -> list[UnusableReference]:
        """All problems of a reference whose annotation `stated`, or its reader, has found in order."""
        return _failures(lambda: self.alone(item, seen)) + self.looked(item, seen, decode)

    def alone(self, item: Annotated, seen: Seen) -> None:
        """Raise UnusableReference if another reference has its id, or another image its image's id."""
        reference, image = item.reference, _image_key(item)
        if reference.ref_id in seen.ids:
            raise self.unusable(DUPLICATE_ID, item, "another reference has this id")
        seen.ids.add(reference.ref_id)
        other = seen.images.setdefault(reference.image_id, image)
        if other is not image and other != image:
            what = f"{other.name} has its image_id" if isinstance(other, Path) else "another image has its image_id"
            raise self.unusable(TWO_IMAGES, item, f"{what}, {reference.image_id!r}, too")

    def _place(self, item: Annotated, seen: Seen) -> None:
        """Raise UnusableReference unless the image is a regular file in its folder."""
        if item.pixels is not None or item.root is None:
            return
        found = seen.look(*item.root)
        if found == GONE:
            raise self._missing(item)
        if found == OUT:
            raise self.unusable(OUTSIDE, item, f"a symbolic link leads out of {item.root[0]}")
        if found == IRREGULAR:
            raise self.unusable(MISSING_IMAGE, item, f"{item.path.name} is {IRREGULAR}")
        if found:
            raise self.unusable(UNREADABLE_IMAGE, item, found)

    def _missing(self, item: Annotated) -> UnusableReference:
        folder, name = item.path.parent, item.path.name
        if folder not in self._spelled:
            try:
                self._spelled[folder] = {other.casefold(): other for other in os.listdir(folder)}
            except OSError:
                self._spelled[folder] = {}
        other = self._spelled[folder].get(name.casefold())
        hint = "" if other is None else f", but {other}, and upper and lower case differ"
        return self.unusable(MISSING_IMAGE, item, f"no file {name} in {folder}{hint}")

    def sentences(self, item: Annotated) -> None:
        """Raise UnusableReference unless `tokenize` takes every sentence.

        The vocabulary is loaded only for sentences that need it.
        """
        for sentence in item.reference.sentences:
            if len(sentence) <= MAX_CHARACTERS and PLAIN.fullmatch(sentence):
                continue
            if not sentence:
                raise self.unusable(EMPTY_SENTENCE, item, f"sentences are {str(item.reference.sentences)[:300]}")
            if len(sentence) > MAX_CHARACTERS:
                detail = f"{sentence[:60]!r}... has {len(sentence)} characters"
                raise self.unusable(ENDLESS_PHRASE, item, detail)
            from fastris.data.tokens import check_sentence

            try:
                check_sentence(sentence)
            except ValueError as error:
                raise self.unusable(BAD_PHRASE, item, str(error)[:300]) from error

    def _segmentation(self, item: Annotated) -> None:
        """Check the stated size, and the segmentation as far as possible without decoding it."""
        if item.height and item.height * item.width <= annotation.MAX_PIXELS:
            self._check_sides(item, item.height, item.width)
        if isinstance(item.segmentation, annotation.MaskPicture) or not item.height:
            return
        try:
            empty = not annotation.checked(item.segmentation, item.height, item.width)
        except annotation.BadAnnotation as error:
            raise self._bad(item, error) from error
        if empty and not item.reference.no_target:
            raise self.unusable(EMPTY_MASK, item, "its segmentation is empty")

    def code(self, item: Annotated) -> Any:
        """The mask's run-length code, None for no target. Raises UnusableReference for a bad or empty mask."""
        height, width = (item.height, item.width) if item.height else self.size(item)
        try:
            code = annotation.encode(item.segmentation, height, width)
        except annotation.BadAnnotation as error:
            raise self._bad(item, error) from error
        if item.reference.no_target:
            if code is not None:
                raise self.unusable(BAD_ANNOTATION, item, "it is marked no_target, but its mask is not empty")
        elif code is None:
            raise self.unusable(EMPTY_MASK, item, "its segmentation encloses no pixel")
        return code

    def _bad(self, item: Annotated, error: annotation.BadAnnotation) -> UnusableReference:
        problem = SIZE_MISMATCH if isinstance(error, annotation.WrongSize) else BAD_ANNOTATION
        return self.unusable(problem, item, str(error))

    def size(self, item: Annotated) -> tuple[int, int]:
        """Height and width from the image's header, checked; the header of each file is read once."""
        if item.pixels is not None or item.path not in self._sizes:
            with self._open(item) as image:
                size = orientation.size(image, *_labelled(item))
            if item.pixels is None:
                self._sizes[item.path] = size
        else:
            size = self._sizes[item.path]
        self._check_size(item, *size)
        return size

    def image(self, item: Annotated) -> np.ndarray:
        """The image: (H, W, 3) uint8, RGB; the first frame of an animation, and transparent pixels as opaque ones."""
        with self._open(item) as image:
            self._check_size(item, *orientation.size(image, *_labelled(item)))
            try:
                if orientation.turns(image, *_labelled(item)):
                    from PIL import ImageOps

                    image = ImageOps.exif_transpose(image)
                if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
                    return np.array(image.convert("RGBA").convert("RGB"))  # the same pixels, without Pillow's warning
                return np.array(image.convert("RGB"))
            except Exception as error:  # decoders fail in many ways
                raise self.unusable(UNREADABLE_IMAGE, item, str(error)) from error

    def upright(self, item: Annotated) -> bool:
        """Whether the image is taken as its EXIF orientation turns it."""
        if item.upright is False:
            return False
        with self._open(item) as image:
            return orientation.turns(image, *_labelled(item))

    def _decode(self, item: Annotated) -> None:
        """Decode the pixels only to find errors: a JPEG in grey at an eighth of its size, which reads every byte."""
        with self._open(item) as image:
            try:
                image.draft("L", (1, 1))
                image.load()
            except Exception as error:
                raise self.unusable(UNREADABLE_IMAGE, item, str(error)) from error

    def _pixels(self, item: Annotated, seen: Seen, decode: Callable[[], Any]) -> None:
        key = _image_key(item)
        if key not in seen.damage:
            seen.damage[key] = next(iter(_failures(decode)), None)
        found = seen.damage[key]
        if found is not None:
            raise self.unusable(found.problem, item, found.reason)

    def _check_size(self, item: Annotated, height: int, width: int) -> None:
        if item.height and (height, width) != (item.height, item.width):
            real, stated = f"{width} x {height}", f"{item.width} x {item.height}"
            detail = f"the image is {real} pixels (width x height), its annotation was made for {stated}"
            raise self.unusable(SIZE_MISMATCH, item, detail)
        self._check_sides(item, height, width)

    def _check_sides(self, item: Annotated, height: int, width: int) -> None:
        if max(height, width) > MAX_SIDE:
            detail = f"the image is {width} x {height} pixels (width x height), and OpenCV warps no longer side"
            raise self.unusable(UNSUITABLE_IMAGE, item, f"{detail} than {MAX_SIDE}")

    def _open(self, item: Annotated) -> Image.Image:
        """Open the image: its header is read and checked, its pixels are not decoded."""
        from PIL import Image

        try:
            image = Image.open(item.path if item.pixels is None else io.BytesIO(item.pixels), formats=IMAGE_FORMATS)
        except FileNotFoundError as error:
            raise self._missing(item) from error
        except Exception as error:  # headers are broken in many ways
            raise self.unusable(UNREADABLE_IMAGE, item, str(error)) from error
        detail = ""
        if image.width * image.height > annotation.MAX_PIXELS:
            detail = f"{image.width} x {image.height} pixels, over {annotation.MAX_PIXELS}: a decompression bomb?"
        elif image.mode not in IMAGE_MODES:
            detail = f"its colour mode {image.mode} holds more than 8 bits, which RGB would clip"
        if detail:
            image.close()
            raise self.unusable(UNSUITABLE_IMAGE, item, detail)
        return image


def _labelled(item: Annotated) -> tuple[bool | None, tuple[int, int]]:
    return item.upright, (item.height, item.width)


def _failures(*steps: Callable[[], Any]) -> list[UnusableReference]:
    """Run all steps; return the UnusableReference errors that they raise."""
    found = []
    for step in steps:
        try:
            step()
        except UnusableReference as error:
            found.append(error)
    return found


def first_of(found: Iterable[UnusableReference]) -> UnusableReference | None:
    """The first problem of a reference, with the others in its `also`; None if there is none."""
    found = tuple(found)
    if found:
        found[0].also = found[1:]
    return next(iter(found), None)


def _image_key(item: Annotated) -> Path | bytes:
    """A key that identifies the image: its path, or a digest of its bytes."""
    return item.path if item.pixels is None else hashlib.blake2b(item.pixels, digest_size=16).digest()


def _writable(text: str) -> str:
    """Escape lone surrogates (halves of characters), which no file can hold."""
    return text.encode("utf-8", "backslashreplace").decode()
