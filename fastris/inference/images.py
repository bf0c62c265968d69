"""Read a user's picture (a file, a PIL image or an array) as an RGB array."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fastris.data.letterbox import CV2_LIMIT
from fastris.runtime.plain import check_file

if TYPE_CHECKING:
    from PIL import Image

    ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray

FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""The formats that are read, by Pillow's names. Others are refused: for EPS, Pillow would run another program."""

STRIP_PIXELS = 1 << 20
"""Pixels that are converted to RGB at a time, which limits the memory beside the picture and the result."""

_ORIENTATION = 0x0112  # EXIF's tag
_MAX_8_BIT, _MAX_12_BIT, _MAX_16_BIT = 255, 4095, 65535


class _Undecodable(ValueError):
    """The picture's values cannot be mapped to brightness; the message says which they are, and the mend."""


def read_image(source: ImageSource) -> np.ndarray:
    """Read a picture, upright, as (H, W, 3) uint8, RGB.

    Args:
        source: a path, a PIL image, or a uint8 array (H, W, 3) in RGB, (H, W, 4) in RGBA, (H, W) or (H, W, 1) in grey.

    The EXIF orientation is applied (to PIL images too, so height and width may be swapped against ``image.size``).
    Transparent pixels become white. Grey of 16 bits is mapped from 0..65535, or from 0..255 if it holds nothing
    brighter; floating point from 0..1 or 0..255. An animated file gives its first frame, with a warning.

    Files are read in the formats of :data:`FORMATS`, HEIF where ``pillow_heif`` is registered. A colour picture takes
    at most 7 bytes a pixel: 4 that Pillow decodes, and the 3 of the result.

    Raises:
        FileNotFoundError: no such file, or a folder; PermissionError: a file that may not be read.
        ValueError: a file that is no readable picture, values that cannot be mapped to brightness, or a picture too
            large: more pixels than Pillow's guard against decompression bombs allows, or a side over 32766 pixels.
        TypeError: any other kind of source, or an array that is not uint8.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, "image")
    if isinstance(source, str | os.PathLike):
        return _from_file(Path(source).expanduser())
    raise TypeError(f"image must be a path, a PIL image or a uint8 array (H, W, 3), got {type(source).__name__}")


def _from_array(array: np.ndarray) -> np.ndarray:
    from PIL import Image

    if array.dtype != np.uint8:
        raise TypeError(
            f"image must be uint8, got an array of {array.dtype}; scale it to 0..255 and use .astype('uint8')"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        mend = "; move the channels last: image.transpose(1, 2, 0)" if array.ndim == 3 and array.shape[0] == 3 else ""
        raise ValueError(f"image must be an array (H, W, 3), (H, W, 4) or (H, W), got {array.shape}{mend}")
    _check_size(array.shape[1], array.shape[0], "image")
    if array.ndim == 2 or array.shape[2] == 3:
        return np.array(
            np.broadcast_to(array[..., None] if array.ndim == 2 else array, (*array.shape[:2], 3)), order="C"
        )
    rgb = np.empty((*array.shape[:2], 3), np.uint8)
    for rows in _strips(*array.shape[:2]):
        rgb[rows] = _colours(Image.fromarray(np.ascontiguousarray(array[rows])))
    return rgb


def read_encoded(content: bytes, name: str) -> np.ndarray:
    """:func:`read_image` for the bytes of a file; ``name`` is for messages."""
    return _from_opened(io.BytesIO(content), f"image {name}", len(content))


def encoded_size(content: bytes, name: str) -> tuple[int, int]:
    """Width and height in pixels, as stored, of the picture in these bytes, of which only the beginning is read.

    Raises ValueError as :func:`read_encoded` does where they are no picture.
    """
    with _opened(io.BytesIO(content), f"image {name}", len(content)) as image:
        return image.size


def _from_file(path: Path) -> np.ndarray:
    name = f"image {path}"
    check_file(name, path, "give the path of a picture")
    return _from_opened(path, name, path.stat().st_size)


def _from_opened(file: Path | io.BytesIO, name: str, size: int) -> np.ndarray:
    with _opened(file, name, size) as image:
        if getattr(image, "is_animated", False) and image.format != "MPO":  # phones hide a second view in MPO
            warnings.warn(f"{name} holds several pictures; only the first one is used", stacklevel=4)
        return _decode(image, name)


def _opened(file: Path | io.BytesIO, name: str, size: int) -> Image.Image:
    """The picture in a file of ``size`` bytes, not decoded. Raises ValueError for none, or one of too many pixels."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large photos are welcome, bombs are not
            return _open(file)
    except UnidentifiedImageError:
        why = f"is in none of the formats {', '.join(FORMATS)}" if size else "is an empty file"
        raise ValueError(f"{name} {why}; save the picture as PNG or JPEG") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ValueError(f"{name} has more than {limit} million pixels; shrink or crop it first") from None


def _open(path: Path | io.BytesIO) -> Image.Image:
    """Open a picture in one of :data:`FORMATS` without decoding it; Pillow loads its rarer formats only when needed."""
    from PIL import Image, UnidentifiedImageError

    for load in (Image.preinit, Image.init):
        load()
        with warnings.catch_warnings(), suppress(UnidentifiedImageError):
            warnings.simplefilter("ignore", UserWarning)  # why one format does not fit, where another does
            return Image.open(path, formats=[each for each in FORMATS if each in Image.OPEN])
    raise UnidentifiedImageError


def _decode(image: Image.Image, name: str) -> np.ndarray:
    _check_size(*image.size, name)
    if image.format == "EPS" and getattr(image, "tile", False):
        raise ValueError(f"{name} is EPS, which another program would have to draw; save the picture as PNG or JPEG")
    try:
        image.load()
        return _to_rgb(image, image.getexif().get(_ORIENTATION, 1))
    except _Undecodable as error:
        raise ValueError(f"{name} {error}") from None
    except Exception as error:  # decoders fail in many ways, and each of them says something about this file
        raise ValueError(f"{name} cannot be decoded ({error}); save the picture as PNG or JPEG") from error


def _check_size(width: int, height: int, name: str) -> None:
    if not width or not height:
        raise ValueError(f"{name} has no pixels: it is {width} x {height}")
    if max(width, height) > CV2_LIMIT:
        raise ValueError(
            f"{name} is {width} x {height} pixels; no side may exceed {CV2_LIMIT}: shrink or crop it first"
        )


def _to_rgb(image: Image.Image, orientation: int) -> np.ndarray:
    """Convert a decoded picture to (H, W, 3) uint8, upright, one strip of rows after another."""
    width, height = image.size
    turned = orientation in (5, 6, 7, 8)
    rgb = np.empty((width, height, 3) if turned else (height, width, 3), np.uint8)
    stored = _as_stored(rgb, orientation)
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    white = _white(image) if deep else None
    for rows in _strips(height, width):
        strip = _rows(image, rows)
        stored[rows] = _colours(strip) if white is None else _grey(np.asarray(strip), white)
    return rgb


def _as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """A view of an upright picture in the file's order of rows and columns; ``orientation`` is EXIF's, 1 to 8."""
    views = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    return views.get(orientation, upright)


def _strips(height: int, width: int) -> Iterator[slice]:
    """The rows of a picture in strips of about STRIP_PIXELS."""
    step = max(1, STRIP_PIXELS // width)
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def _rows(image: Image.Image, rows: slice) -> Image.Image:
    return image if rows == slice(0, image.height) else image.crop((0, rows.start, image.width, rows.stop))


def _colours(image: Image.Image) -> np.ndarray:
    """Convert an 8-bit picture to (H, W, 3) uint8, with white behind transparent pixels."""
    from PIL import Image

    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _white(image: Image.Image) -> float:
    """The value of white in grey of 16 or 32 bits or floating point: one of a few fixed values, so pictures compare.

    Raises _Undecodable for values outside of these ranges.
    """
    strips = (np.asarray(_rows(image, rows)) for rows in _strips(image.height, image.width))
    ranges = np.array([(strip.min(), strip.max()) for strip in strips])
    low, high = ranges.min(), ranges.max()
    if not (low >= 0 and high <= _MAX_16_BIT):  # NaN fails too
        raise _Undecodable(f"holds values from {low} to {high}; scale them to 0..255 and save the picture as 8-bit PNG")
    if np.issubdtype(ranges.dtype, np.floating):
        if high > _MAX_8_BIT:
            raise _Undecodable(f"holds values up to {high}; scale them to 0..1 or 0..255")
        return 1.0 if high <= 1 else _MAX_8_BIT
    if high <= _MAX_8_BIT:
        return _MAX_8_BIT
    if high <= _MAX_12_BIT:
        warnings.warn(
            f"the brightest of the 16-bit picture's values is {high} of {_MAX_16_BIT}: stretch it", stacklevel=7
        )
    return _MAX_16_BIT


def _grey(values: np.ndarray, white: float) -> np.ndarray:
    """(H, W) grey of any type to (H, W, 1) uint8."""
    return np.rint(values * (_MAX_8_BIT / white)).astype(np.uint8)[:, :, None]
