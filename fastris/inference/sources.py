"""What a user may ask about: a picture, several, a folder, a glob, an address, a list, or what comes on stdin.

Nothing is decoded here, and no PyTorch is imported.
"""

from __future__ import annotations

import glob
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np

from fastris.inference.fetch import fetch, is_url
from fastris.inference.images import FORMATS, read_encoded, read_image
from fastris.inference.lists import LISTS, read_list, rows_of_text
from fastris.inference.phrases import check_phrases

STDIN = "-"


class Question(NamedTuple):
    """A picture and its phrases.

    Attributes:
        image: its path or address as it was given; "stdin" for one that came there.
        phrases: what to look for.
        stem: what its files' names begin with, of no other question's.
        content: its bytes, where they came on stdin.
    """

    image: str
    phrases: tuple[str, ...]
    stem: str
    content: bytes | None = None

    def read(self) -> np.ndarray:
        """The picture, as :func:`fastris.inference.images.read_image` reads it; its errors, or those of a fetch."""
        if self.content is not None:
            return read_encoded(self.content, self.image)
        return read_encoded(fetch(self.image), self.image) if is_url(self.image) else read_image(self.image)


def split_pictures(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The pictures, folders and lists at the beginning of the phrases, and the phrases.

    They are there where a shell makes several arguments of ``*.jpg`` or ``*/``. Warns of a phrase that is the name of a
    file or folder, too.
    """
    pictures = list(takewhile(_is_source, arguments))
    phrases = tuple(arguments[len(pictures) :])
    for phrase in phrases:
        if isinstance(phrase, str) and os.path.exists(phrase):
            kind = "folder" if os.path.isdir(phrase) else "file"
            warnings.warn(f"phrase {phrase!r} is also the name of a {kind}; pictures come before phrases", stacklevel=3)
    return pictures, phrases


def _is_source(argument: str) -> bool:
    """Whether an argument can hardly be a phrase: a picture or list that exists, a folder that is written as one."""
    if os.path.isfile(argument):
        return _is_picture(argument) or argument.lower().endswith(LISTS)
    return os.sep in argument and os.path.isdir(argument)


def questions(images: Iterable[str], phrases: Sequence[str], urls: bool = False) -> list[Question]:
    """What is asked about each picture; see the module. Every picture appears once, with all of its phrases.

    Args:
        images: paths, folders, globs, addresses, lists (:mod:`fastris.inference.lists`), or "-" for stdin: the bytes of
            a picture, or one name a line, or a list's JSON lines.
        phrases: for all pictures that no list has phrases for.
        urls: whether addresses may be fetched.

    Raises:
        ValueError: an address without ``urls``, a picture without phrases, phrases that are not usable, a broken list.
        FileNotFoundError: no such file, or a folder or glob without pictures.
    """
    asked: dict[str, list[str]] = {}
    content = None
    given = check_phrases(phrases) if phrases else ()
    for image in images:
        if image == STDIN:
            content = sys.stdin.buffer.read()
            if _is_binary(content):
                asked.setdefault("stdin", []).extend(_needed(given, "stdin"))
                continue
            found = rows_of_text(content, "stdin", Path())
            content = None
        else:
            found = _found(image)
        for name, own in found:
            if own and given:
                raise ValueError(f"{image} has phrases of its own, and phrases are given, too; leave one of them out")
            if is_url(name) and not urls:
                raise ValueError(f"image {name} is on the web, and nothing is fetched unasked; give urls=true")
            asked.setdefault(name, []).extend(own or _needed(given, name))
    taken: set[str] = set()
    return [
        Question(name, tuple(own), _stem(name, taken), content if name == "stdin" else None)
        for name, own in asked.items()
    ]


def _found(image: str) -> list[tuple[str, tuple[str, ...]]]:
    """The pictures that an argument stands for, each with the phrases that come with it."""
    path = Path(image).expanduser()
    if is_url(image):
        return [(image, ())]
    if path.is_dir():
        return [(str(file), ()) for file in _pictures_in(path)]
    if os.path.isfile(path):
        return read_list(path) if path.suffix.lower() in LISTS else [(image, ())]
    if glob.has_magic(image):
        matches = sorted(glob.glob(str(path), recursive=True))
        pictures = [match for match in matches if os.path.isfile(match) and _is_picture(match)]
        if not pictures:
            what = f"the {len(matches)} matches are no pictures" if matches else "nothing matches"
            raise FileNotFoundError(f"image {image}: {what}; quote the pattern, as in 'photos/*.jpg'")
        return [(picture, ()) for picture in pictures]
    return [(image, ())]


def _pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder in order of their names, without those of its folders."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith(".") and file.is_file())
    pictures = [file for file in files if _is_picture(file.name)]
    others = len(files) - len(pictures)
    if not pictures:
        raise FileNotFoundError(
            f"image {folder}: the folder has no picture ({others} other files); for those in its folders write "
            f"'{folder}/**/*.jpg'"
        )
    if others:
        warnings.warn(f"{folder}: {others} files are no pictures by their names and are left out", stacklevel=5)
    return pictures


@cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes of :data:`.images.FORMATS`, in lower case."""
    from PIL import Image

    Image.init()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in picture_suffixes()


def _is_binary(content: bytes) -> bool:
    """Whether these bytes are a picture's, and no text."""
    try:
        return not content or b"\0" in content or not content.decode("utf-8").strip()
    except UnicodeDecodeError:
        return True


def _needed(phrases: tuple[str, ...], name: str) -> tuple[str, ...]:
    if not phrases:
        raise ValueError(
            f"PHRASES is missing (what to look for in {name}; quote each phrase); --help lists the options"
        )
    return phrases


def _stem(name: str, taken: set[str]) -> str:
    """What the names of a picture's files begin with: its own, numbered where another picture has the same."""
    own = Path(unquote(urlsplit(name).path) if is_url(name) else name).stem or "picture"
    stem, number = own, 1
    while stem in taken:
        number += 1
        stem = f"{own}-{number}"
    taken.add(stem)
    return stem
