"""The interface of every data set of referring expressions, and the error that bad data raises."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from fastris.runtime import plain

SHOWN = 200  # characters of one value in a message
LONGEST = 4000  # characters of a message
MAX_CHARACTERS = 1000  # of a sentence; the time of byte-pair encoding grows with the square of a word's length


class DataError(ValueError):
    """Something in the user's data is wrong; the message names the reference or file and says what to do.

    Messages quote untrusted files, so characters that could control a terminal are escaped.

    Args:
        message: what went wrong; it passes through `printable`.
        lines: keep the message's line breaks. Only for messages that quote no file.
    """

    def __init__(self, message: str = "", *, lines: bool = False):
        super().__init__("\n".join(map(printable, message.split("\n"))) if lines else printable(message))


def printable(text: object) -> str:
    """`fastris.runtime.plain.printable` of at most `LONGEST` characters; a longer text is cut and ends in "..."."""
    text = str(text)
    return plain.printable(text if len(text) <= LONGEST else text[:LONGEST] + "...")


def shown(value: object) -> str:
    """The repr of a value from an untrusted file, for a message: cut to about `SHOWN` characters, however large."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = SHOWN
    short.maxlist = short.maxtuple = short.maxdict = 10
    if type(value) is str and len(value) > SHOWN:
        return repr(value[:SHOWN] + "...")
    return repr(value) if type(value) is str else short.repr(value)[: 2 * SHOWN]


@dataclass(frozen=True)
class Reference:
    """One object of one image, and the sentences that refer to it.

    Attributes:
        ref_id: the reference's id in its data set.
        image_id: the image's id; references with equal ids share the image.
        sentences: the referring expressions, as the data set spells them; at least one.
        file_name: the image's file name, or "" where there is no file.
        no_target: the sentences name nothing in the image; its mask is empty on purpose.
    """

    ref_id: int | str
    image_id: int | str
    sentences: tuple[str, ...]
    file_name: str = ""
    no_target: bool = False


class ReferringDataset(ABC):
    """References by index: the expressions, the image and the mask of the object that they refer to.

    Subclasses set `name` and `split`, and implement `__len__`, `reference`, `image` and `mask`. Nothing is
    normalised or resized here: images and masks come at the image's own size.

    Attributes:
        name: the data set's name, as `load_dataset` takes it.
        split: the split's name.
        skipped: problem -> ids of the references that were left out because of it; empty unless the user asked
            for `on_error="skip"`.
    """

    name: str
    split: str
    skipped: dict[str, list[int | str]]

    @abstractmethod
    def __len__(self) -> int:
        """Number of references, that is of objects (the counts that papers give), not of sentences."""

    @abstractmethod
    def reference(self, index: int) -> Reference:
        """The sentences and ids of reference `index`; decodes nothing."""

    @abstractmethod
    def image(self, index: int) -> np.ndarray:
        """The image of reference `index`: (H, W, 3) uint8, RGB."""

    @abstractmethod
    def mask(self, index: int) -> np.ndarray:
        """The object of reference `index`: (H, W) bool, at the size of its image."""

    def by_image(self) -> list[list[int]]:
        """Indices of the references, grouped by image, images and references in order of first appearance."""
        groups: dict[int | str, list[int]] = {}
        for index in range(len(self)):
            groups.setdefault(self.reference(index).image_id, []).append(index)
        return list(groups.values())
