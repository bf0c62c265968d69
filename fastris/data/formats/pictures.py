"""Labelled pictures, as tools for drawing masks save them, and the references that they make.

Such tools label objects, mostly with the name of a class, and nothing forbids two objects of one label in a picture. A
referring expression names one thing, though. So a phrase that several objects of a picture share refers to none of
them: by default it is left out and counted, and `several="merge"` makes it refer to all of them, as one mask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastris.data.base import DataError, Reference, shown
from fastris.data.formats.annotated import Annotated, Record, UnusableReference
from fastris.data.formats.annotation import Several
from fastris.data.formats.budget import TABLE, Budget
from fastris.data.formats.records import stripped
from fastris.data.paths import Look, is_dir, opened, safe_name

Shared = Literal["skip", "merge"]

SHARED = "phrase of several objects in its picture (several=merge: one mask of all)"
SHARED_IN_PART = "phrase dropped, which other objects of its picture share, from one that keeps others"

OWN_WORDS = (
    "sentences", "sentence", "phrases", "phrase", "expressions", "expression", "captions", "caption", "description",
)  # fmt: skip
"""Fields of an object that hold a phrase in an annotator's own words; the first that is not empty counts."""

SPLITS = ("train", "val", "test", "testA", "testB", "minival")
_SAME = {"valid": "val", "validation": "val", "training": "train", "testing": "test", "val-test": "val"}
HEAD = 1 << 16  # bytes of a file that show what it is


@dataclass(frozen=True)
class Picture:
    """A labelled picture.

    Attributes:
        image_id: its id; no other picture's.
        folder, name: the folder that its file must stay in, and its path there.
        height, width: in pixels, as labelled; 0 where it is not stated.
        upright: as `Annotated.upright`.
    """

    image_id: int | str
    folder: Path
    name: str
    height: int
    width: int
    upright: bool | None = None


@dataclass(frozen=True)
class Labelled:
    """An object of a picture.

    Attributes:
        ref_id: its id; no other object's.
        phrases: what names it.
        segmentation: as `Annotated.segmentation`.
        where: as `Annotated.where`.
        crowd: it covers several objects of one label.
    """

    ref_id: int | str
    phrases: tuple[str, ...]
    segmentation: Any
    where: str
    crowd: bool = False


@dataclass
class References:
    """Makes references of labelled pictures.

    Attributes:
        several: "skip" or "merge", for phrases that objects share.
        left_out: reason -> ids of the objects that lost a phrase.
    """

    several: Shared
    budget: Budget
    left_out: dict[str, list[int | str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.several not in ("skip", "merge"):
            raise DataError(f"several={self.several!r} is unknown; choose 'skip' or 'merge'")

    def of(self, picture: Picture, objects: Iterable[Labelled | UnusableReference]) -> Iterator[Record]:
        """The references of one picture; errors are passed on."""
        whole: list[Labelled] = []
        for item in objects:
            if isinstance(item, UnusableReference):
                yield item
            else:
                whole.append(item)
        named: dict[str, list[Labelled]] = {}
        for item in whole:
            for phrase in dict.fromkeys(map(str.casefold, item.phrases)):
                named.setdefault(phrase, []).append(item)
        shared = {phrase for phrase, items in named.items() if phrase and (len(items) > 1 or items[0].crowd)}
        for item in whole:
            own = tuple(phrase for phrase in item.phrases if phrase.casefold() not in shared)
            if own:
                yield self._reference(picture, item.ref_id, own, item.segmentation, item.where)
            if len(own) < len(item.phrases) and self.several == "skip":
                self.left_out.setdefault(SHARED_IN_PART if own else SHARED, []).append(item.ref_id)
        if self.several == "merge":
            yield from self._merged(picture, {phrase: named[phrase] for phrase in named if phrase in shared})

    def _merged(self, picture: Picture, shared: dict[str, list[Labelled]]) -> Iterator[Record]:
        """One reference for each set of objects with the same shared phrases."""
        groups: dict[tuple[int | str, ...], tuple[list[str], list[Labelled]]] = {}
        for phrase, items in shared.items():
            spelled = next(text for text in items[0].phrases if text.casefold() == phrase)
            groups.setdefault(tuple(item.ref_id for item in items), ([], items))[0].append(spelled)
        for ids, (phrases, items) in groups.items():
            ref_id = "+".join(map(str, ids)) if len(ids) <= 20 else f"{ids[0]}+{len(ids) - 1} others, {phrases[0]}"
            united = items[0].segmentation if len(ids) == 1 else Several(tuple(item.segmentation for item in items))
            where = items[0].where if len(ids) == 1 else f"{len(ids)} objects, "
            yield self._reference(picture, ref_id[:1000], tuple(phrases), united, where)

    def _reference(
        self, picture: Picture, ref_id: int | str, phrases: tuple[str, ...], segmentation: Any, where: str
    ) -> Annotated:
        self.budget.spend(4 * TABLE)
        return Annotated(
            Reference(ref_id, picture.image_id, phrases, picture.name),
            where,
            picture.folder / picture.name,
            picture.height,
            picture.width,
            segmentation,
            (picture.folder, picture.name),
            upright=picture.upright,
        )


def own_words(record: dict[str, Any], where: str, budget: Budget) -> tuple[str, ...]:
    """The phrases in the annotator's own words: of the first field of `OWN_WORDS` that is not empty; () for none.

    A field holds a text, each line of which is a phrase, or a list of texts or of REFER's `{"sent": text}`.

    Raises:
        DataError: it holds something else; the message begins with `where`.
    """
    key = next((key for key in OWN_WORDS if record.get(key)), None)
    if key is None:
        return ()
    value = record[key]
    texts = [line for line in value.splitlines() if line.strip()] if type(value) is str else value
    if type(texts) is list:
        texts = [text.get("sent", text.get("raw")) if type(text) is dict else text for text in texts]
    if type(texts) is not list or not all(type(text) is str for text in texts):
        raise DataError(f"{where} has {key} {shown(value)}, which must be a text or a list of texts")
    return stripped(texts, budget)


def split_name(text: str) -> str:
    """The split that a file's or folder's name tells: "train" for "instances_train2017"; the name itself if none."""
    text = re.sub(r"^instances[_-]|[_-]?20\d\d$", "", text)
    lower = {name.lower(): name for name in (*SPLITS, *_SAME)}
    return _SAME.get(name := lower.get(text.lower(), text), name)


def starts_with(path: Path, pattern: re.Pattern[bytes]) -> bool:
    """Whether the pattern occurs in the first `HEAD` bytes of a regular file; no file that cannot be read does."""
    try:
        with opened(path, 1 << 40) as file:
            return pattern.search(file.read(HEAD)) is not None
    except DataError:
        return False


def picture_folder(candidates: Sequence[Path], names: Iterable[str], look: Look) -> Path | None:
    """The first folder that holds one of the named files; else the first that is there; None if none is."""
    folders = [folder for folder in dict.fromkeys(candidates) if is_dir(folder)]
    names = list(names)
    return next(
        (folder for folder in folders if any(not look(folder, name) for name in names)), folders[0] if folders else None
    )


def rooted(root: Path, folder: Path) -> tuple[Path, str]:
    """`folder` as a folder, and what precedes a picture's name there: from `root/images` or `root` if it is below that.

    Pictures of several folders then have names of their own. A folder that is a link is kept: it may lie anywhere.
    """
    for base in (root / "images", root):
        if folder == base:
            break
        if folder.is_relative_to(base):
            inner = folder.relative_to(base)
            if not any((base / part).is_symlink() for part in (inner, *inner.parents[:-1])):
                return base, f"{inner.as_posix()}/"
    return folder, ""


def inside(name: str, start: str, where: str) -> str:
    """The path of a picture from the data set's folder, of a name that is relative to the folder `start` in that one.

    Both kinds of slashes separate folders: the tools run on every system.

    Raises:
        DataError: it leaves the data set's folder; the message begins with `where`.
    """
    parts: list[str] = []
    text = name.replace("\\", "/")
    for part in f"{start}/{text}".split("/"):
        if part == ".." and not parts:
            break
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    else:
        if not text.startswith("/"):
            name = "/".join(parts)
    return safe_name(name, where, key="picture", folder="the data set's folder")
