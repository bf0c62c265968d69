"""Convert annotations to masks: COCO's polygons and run lengths, and image files of masks."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_PIXELS = 89_478_485  # Pillow's limit, beyond which it suspects a decompression bomb; COCO has 0.4 million
MAX_OUTLINE = 1_000_000  # pixels along all polygons of a mask; pycocotools takes 40 bytes for each
MASK_FORMATS = ("PNG", "BMP")  # lossless, and small readers
MASK_MODES = ("1", "L", "P", "I", "I;16", "RGB")


@dataclass(frozen=True)
class Several:
    """The union of several segmentations of one image; without parts it stands for "no target"."""

    parts: tuple[Any, ...]


@dataclass(frozen=True)
class MaskPicture:
    """A mask stored as an image: a file, or the bytes of one. Pixels that are not zero belong to the object."""

    file: Path | bytes


@dataclass(frozen=True)
class Patch:
    """The mask of a part of an image, cropped to the image.

    Attributes:
        content: the bytes of a mask picture; or run lengths "3, 5, 2, ..." of the part's rows, one after another, of
            which the first, third and so on are outside of the object.
        left, top: of the part, in pixels of the image.
        height, width: of the part in pixels; of a mask picture its own.
    """

    content: bytes | str
    left: int
    top: int
    height: int = 0
    width: int = 0


class BadAnnotation(ValueError):
    """A segmentation that cannot be a mask of its image; the message says why."""


class WrongSize(BadAnnotation):
    """A segmentation made for an image of another size."""


def checked(segmentation: Any, height: int, width: int) -> list[Any]:
    """Check the form of a COCO segmentation, in pure Python and without decoding a mask.

    Args:
        segmentation: polygons `[[x1, y1, x2, y2, ...], ...]`, whose union counts; or, for crowds, run lengths
            `{"size": [height, width], "counts": ...}` with counts as a list of ints or as COCO's compressed string;
            or a `Patch`; or `Several` of these.
        height, width: of the image, in pixels.

    Returns:
        the polygons of at least three points, or the run lengths, or the parts of `Several` that are not empty; [] for
        an empty segmentation.

    Raises:
        BadAnnotation: another form; `WrongSize` if it was made for an image of another size.
    """
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise BadAnnotation(f"an image of {height} x {width} pixels (height x width) is out of bounds")
    if isinstance(segmentation, Several):
        return [part for part in segmentation.parts if checked(part, height, width)]
    if isinstance(segmentation, Patch):
        _check_patch(segmentation, height, width)
        return [segmentation]
    if not segmentation:
        return []
    if isinstance(segmentation, dict):
        return _checked_counts(segmentation, height, width)
    if isinstance(segmentation, list):
        return _checked_polygons(segmentation, height, width)
    raise BadAnnotation(f"the segmentation is {type(segmentation).__name__}, neither polygons nor run lengths")


def encode(segmentation: Any, height: int, width: int) -> Any:
    """Encode a segmentation as one run-length code of pycocotools; only a `MaskPicture` is decoded to pixels.

    Polygons, and the parts of `Several`, are united; the published loader adds them up, so that overlaps wrap around.
    Arguments and errors are those of `checked`; `MaskPicture` is accepted too.

    Returns:
        the code, or None where no pixel is enclosed.
    """
    from pycocotools import mask

    if isinstance(segmentation, MaskPicture):
        code = mask.encode(np.asfortranarray(_read_picture(segmentation.file, height, width), np.uint8))
        return code if mask.area(code) else None
    parts = checked(segmentation, height, width)
    if not parts:
        return None
    if isinstance(segmentation, Several):
        codes = [code for code in (encode(part, height, width) for part in parts) if code]
        return mask.merge(codes) if codes else None
    if isinstance(segmentation, Patch):
        code = mask.encode(_whole(segmentation, height, width))
    elif isinstance(segmentation, dict):
        code = mask.frPyObjects({"size": [height, width], "counts": parts}, height, width)
    else:
        code = mask.merge(mask.frPyObjects(parts, height, width))
    return code if mask.area(code) else None


def decode(code: Any) -> np.ndarray:
    """The mask of a code that `encode` returned: (H, W) bool."""
    from pycocotools import mask

    return mask.decode(code).astype(bool, order="C")


def _check_patch(patch: Patch, height: int, width: int) -> None:
    if not (-height <= patch.top <= 2 * height and -width <= patch.left <= 2 * width):
        raise BadAnnotation(
            f"the mask begins at {patch.left}, {patch.top}, far outside of its {height} x {width} image"
        )
    if isinstance(patch.content, str):
        _runs_of(patch)


def _runs_of(patch: Patch) -> list[int]:
    """The run lengths of a patch, which must cover it exactly."""
    area = patch.height * patch.width
    if patch.height < 1 or patch.width < 1 or area > MAX_PIXELS:
        raise BadAnnotation(f"a mask of {patch.height} x {patch.width} pixels (height x width) is out of bounds")
    try:
        runs = [int(run) for run in str(patch.content).split(",", area + 2)]
    except ValueError as error:
        raise BadAnnotation("the mask's run lengths are not numbers between commas, or too many") from error
    if min(runs) < 0 or sum(runs) != area:
        raise BadAnnotation(f"the mask's run lengths do not add up to its {area} pixels")
    return runs


def _whole(patch: Patch, height: int, width: int) -> np.ndarray:
    """A patch in its image: (H, W) uint8, in the memory order that pycocotools takes."""
    if isinstance(patch.content, bytes):
        part = _read_picture(patch.content)
    else:
        runs = _runs_of(patch)
        part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(patch.height, patch.width)
    whole = np.zeros((height, width), np.uint8, order="F")
    top, left = max(patch.top, 0), max(patch.left, 0)
    inner = part[top - patch.top : height - patch.top, left - patch.left : width - patch.left]
    whole[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return whole


def _read_picture(file: Path | bytes, height: int = 0, width: int = 0) -> np.ndarray:
    """Read a mask image, of this size if it is given: (H, W) bool. Of a palette the indices count, not the colours."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=MASK_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadAnnotation(f"the mask has {image.width} x {image.height} pixels, over {MAX_PIXELS}")
            if height and image.size != (width, height):
                real, wanted = f"{image.width} x {image.height}", f"{width} x {height}"
                raise WrongSize(f"the mask is {real} pixels (width x height), its image {wanted}")
            if image.mode not in MASK_MODES:
                raise BadAnnotation(f"the mask has colour mode {image.mode}; save it as grey, 0 outside the object")
            values = np.asarray(image)
    except BadAnnotation:
        raise
    except PermissionError as error:
        raise BadAnnotation(f"the mask cannot be read ({error.strerror})") from error
    except Exception as error:  # decoders fail in many ways
        raise BadAnnotation(f"the mask cannot be decoded as {' or '.join(MASK_FORMATS)} ({error})") from error
    return np.asarray(values.any(axis=2) if values.ndim == 3 else values != 0)


def _checked_polygons(polygons: list[Any], height: int, width: int) -> list[list[float]]:
    """Check the form of polygons; return those of at least three points."""
    for number, polygon in enumerate(polygons):
        if not isinstance(polygon, list):
            raise BadAnnotation(f"polygon {number} is {type(polygon).__name__}, but must be a list of numbers")
        if len(polygon) % 2 or not all(type(value) in (int, float) for value in polygon):
            raise BadAnnotation(f"polygon {number} is not a list x1, y1, x2, y2, ... of numbers")
        for name, values, side in (("x", polygon[::2], width), ("y", polygon[1::2], height)):
            if not all(-side <= value <= 2 * side for value in values):
                raise BadAnnotation(f"polygon {number} lies outside of its {height} x {width} image ({name})")
    if sum(map(_outline, polygons)) > MAX_OUTLINE:
        raise BadAnnotation(f"the polygons' outlines are longer than {MAX_OUTLINE} pixels")
    return [polygon for polygon in polygons if len(polygon) >= 6]


def _outline(polygon: list[float]) -> float:
    """The length of a polygon's outline in pixels, as it is drawn: for each side its longer extent, plus one."""
    xs, ys = polygon[::2], polygon[1::2]
    sides = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    return sum(max(abs(x2 - x1), abs(y2 - y1)) + 1 for x1, y1, x2, y2 in sides)


def _checked_counts(runs: dict[Any, Any], height: int, width: int) -> list[int]:
    """Run lengths as a list. They must cover the image exactly: pycocotools leaves the rest of the memory unset."""
    size, counts = runs.get("size"), runs.get("counts")
    if size != [height, width]:
        raise WrongSize(f"run lengths for size {size!r}, but the image is {[height, width]} (height, width)")
    most = height * width + 2  # runs of one pixel, and an empty one at either end
    if isinstance(counts, str):
        counts = _decompress(counts, most)
    elif not isinstance(counts, list) or not all(type(count) is int for count in counts):
        raise BadAnnotation("the run lengths' counts are neither a list of ints nor a compressed string")
    if len(counts) > most or min(counts, default=0) < 0 or sum(counts) != height * width:
        raise BadAnnotation(f"the run lengths do not add up to the image's {height * width} pixels")
    return counts


def _decompress(text: str, most: int) -> list[int]:
    """Decode COCO's compressed counts; about `most` of them are allowed.

    Each number is written in digits of 5 bits, lowest first, as characters from "0" on; 32 marks that more digits
    follow, and the last digit's 16 is the sign. From the fourth on, numbers are differences to the one two before.
    """
    counts: list[int] = []
    number = shift = 0
    for character in text:
        digit = ord(character) - ord("0")
        if not 0 <= digit < 64 or shift > 30 or len(counts) > most:
            raise BadAnnotation("the run lengths' compressed counts are damaged")
        number |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
    if shift:
        raise BadAnnotation("the run lengths' compressed counts end inside a number")
    return counts
