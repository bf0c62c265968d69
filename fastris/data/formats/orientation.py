"""EXIF's orientation: whether a stored picture is to be turned to be the one that was annotated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

TAG = 0x0112  # EXIF's
TURNED = range(2, 9)  # orientations that are not as stored
SIDEWAYS = range(5, 9)  # those of them that swap height and width


def turns(image: Image.Image, upright: bool | None, stated: tuple[int, int]) -> bool:
    """Whether an opened picture is to be turned.

    Args:
        image: its header has been read.
        upright: as `usable.Annotated.upright`.
        stated: height and width that the annotation was made for; zeros where they are not known.
    """
    if upright is False:
        return False
    orientation, stored = _orientation(image), (image.height, image.width)
    if upright:
        as_stored = orientation in SIDEWAYS and stated == stored and stated != stored[::-1]
        return orientation in TURNED and not as_stored
    return orientation in SIDEWAYS and stated != stored and stated == stored[::-1]


def size(image: Image.Image, upright: bool | None, stated: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an opened picture, turned if it is to be."""
    sideways = turns(image, upright, stated) and _orientation(image) in SIDEWAYS
    return (image.width, image.height) if sideways else (image.height, image.width)


def _orientation(image: Image.Image) -> Any:
    """EXIF's orientation; 1, which means as stored, where there is none that can be read."""
    try:
        return image.getexif().get(TAG, 1)
    except Exception:  # forged EXIF breaks in many ways
        return 1
