"""A user's own picture, in whatever form it comes, as RGB bytes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fastris.data.letterbox import CV2_LIMIT

if TYPE_CHECKING:
    from PIL import Image

    ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray

_MAX_8_BIT, _MAX_12_BIT, _MAX_16_BIT = 255, 4095, 65535


class _Undecodable(ValueError):
    """The picture was read, but its values have no obvious brightness; the text says which, and the mend."""


def read_image(source: ImageSource) -> np.ndarray:
    """The picture as it is meant to be seen: (H, W, 3) uint8, RGB.

    Args:
        source: a path, a PIL image, or a uint8 array (H, W, 3) in RGB, (H, W, 4) in RGBA, (H, W) or (H, W, 1) in grey.

    The orientation that a camera notes in EXIF is applied (to PIL images too, so the result may be turned against
    ``image.size``). What is transparent shows white. Grey of 16 bits is mapped from 0..65535, or from 0..255 if it
    holds nothing brighter; floating point from 0..1 or 0..255. An animated file gives its first frame, with a warning.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no readable picture, values without an obvious brightness, or a picture too large:
            more pixels than Pillow's guard against decompression bombs allows, or a side over 32766 pixels.
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
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def _from_file(path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    name = f"image {path}"
    if not path.is_file():
        what = "is a folder; give one picture" if path.is_dir() else "does not exist; give the path of a picture"
        raise FileNotFoundError(f"{name} {what}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large photos are welcome, bombs are not
            image = Image.open(path)
    except UnidentifiedImageError:
        why = "is in no format that Pillow reads" if path.stat().st_size else "is an empty file"
        raise ValueError(f"{name} {why}; save the picture as PNG or JPEG") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ValueError(f"{name} has more than {limit} million pixels; shrink or crop it first") from None
    with image:
        if getattr(image, "is_animated", False) and image.format != "MPO":  # phones hide a second view in MPO
            warnings.warn(f"{name} holds several pictures; only the first one is used", stacklevel=3)
        return _decode(image, name)


def _decode(image: Image.Image, name: str) -> np.ndarray:
    from PIL import ImageOps

    _check_size(*image.size, name)
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
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


def _to_rgb(image: Image.Image) -> np.ndarray:
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_to_grey(np.asarray(image))[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _to_grey(values: np.ndarray) -> np.ndarray:
    """(H, W) of 16 or 32 bits, or floating point, to (H, W) uint8; by fixed ranges, so pictures stay comparable."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= _MAX_16_BIT):  # NaN fails too
        raise _Undecodable(f"holds values from {low} to {high}; scale them to 0..255 and save the picture as 8-bit PNG")
    if np.issubdtype(values.dtype, np.floating):
        if high > _MAX_8_BIT:
            raise _Undecodable(f"holds values up to {high}; scale them to 0..1 or 0..255")
        top = 1.0 if high <= 1 else _MAX_8_BIT
    else:
        top = _MAX_8_BIT if high <= _MAX_8_BIT else _MAX_16_BIT
        if top == _MAX_16_BIT and high <= _MAX_12_BIT:
            warnings.warn(f"the brightest of the 16-bit picture's values is {high} of {top}: stretch it", stacklevel=6)
    return np.rint(values * (_MAX_8_BIT / top)).astype(np.uint8)
