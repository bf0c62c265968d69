"""CVAT for images 1.1: `annotations.xml`, with the pictures in `images/`.

An object is named by its text attribute where it has one that is called `phrase`, `caption`, `description` or so
(`pictures.OWN_WORDS`), else by its label. Polygons, boxes, ellipses and masks are taken; polylines, points, skeletons
and cuboids enclose nothing, and tags name no object. An object that is `outside` of the picture is left out and
counted; of an `occluded` one the mask is what was drawn. Shapes with one label and one `group_id` are parts of one
object. Photos are labelled as CVAT shows them: as their EXIF orientation turns them.

XML that declares a document type is refused: entities, which only that can declare, are not needed here and can read
other files or fill the memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from fastris.data.base import DataError, shown
from fastris.data.formats.annotated import BAD_ANNOTATION, AnnotatedDataset, OnError, Record, UnusableReference
from fastris.data.formats.annotation import Patch
from fastris.data.formats.budget import ERROR, LIST, NUMBER, TABLE, Budget, TooMuch
from fastris.data.formats.pictures import (
    OWN_WORDS,
    SPLITS,
    Labelled,
    Picture,
    References,
    Shared,
    own_words,
    picture_folder,
    rooted,
    split_name,
    starts_with,
)
from fastris.data.formats.records import stripped
from fastris.data.formats.shapes import ellipse, polygon, united
from fastris.data.paths import Look, content, is_dir, regular, safe_name

MAX_FILE = 1 << 30  # bytes
MAX_DEPTH = 64  # of elements; CVAT's take 8
MAX_AWAY = 1 << 24  # pixels; no coordinate is larger
OUTSIDE = "object that is outside of its picture"
WITHOUT_AREA = ("polyline", "points", "skeleton", "cuboid")
SHAPES = ("polygon", "box", "ellipse", "mask", *WITHOUT_AREA)
_CVAT = re.compile(rb"<annotations\b")


class CvatDataset(AnnotatedDataset):
    """One split of CVAT's annotations.

    Expected under `root`: XML files in it, or in one folder for each task; `root` may also be one such file. The
    pictures lie in `images` beside the file, in `images/SUBSET`, or beside it. The pictures' `subset`, which CVAT
    writes for projects, is their split; where there is none, the file's name or its folder's, if it tells one, else
    "train".

    Args:
        name: "folder".
        split: of the files there.
        root: the folder, or an XML file.
        images: the folder of the pictures.
        several: "skip" or "merge": what to do about phrases that several objects of a picture share.
        on_error: "raise" or "skip", as `AnnotatedDataset` describes.

    Raises:
        DataError: unknown split, damaged files, a video's annotations, unusable references.
    """

    def __init__(
        self,
        name: str,
        split: str,
        root: str | Path,
        *,
        images: str | Path | None = None,
        several: Shared = "skip",
        on_error: OnError = "raise",
    ):
        root, split = Path(root).expanduser(), split_name(split)
        if images is not None and not is_dir(Path(images).expanduser()):
            raise DataError(f"images={str(images)!r} is no folder; give the one that holds the pictures")
        files = _files(root)
        look, references = Look(), References(several, Budget(root, sum(map(regular, files))))
        records, splits = list[Record](), set[str]()
        for file in files:
            pictures = _pictures(file, references.budget)
            splits |= {_split_of(row, file) for row in pictures}
            wanted = [(number, row) for number, row in enumerate(pictures) if _split_of(row, file) == split]
            records += _read(file, wanted, root, images, references, look)
        if split not in splits:
            known = ", ".join(sorted(splits)) or "no pictures"
            raise DataError(f"split={split!r} is unknown; CVAT's files in {root} have {known}")
        super().__init__(name, split, records, on_error, look, references.left_out)

    @classmethod
    def finds(cls, name: str, root: Path) -> bool:
        """Whether there are CVAT's files; they do not name their data set, so it counts as "folder"."""
        return name == "folder" and bool(_files(root))

    @classmethod
    def splits(cls, name: str, root: Path, images: str | Path | None = None) -> list[str]:
        """The pictures' subsets, or what the files' names tell."""
        budget = Budget(root, sum(map(regular, files := _files(root))))
        found = {_split_of(row, file) for file in files for row in _pictures(file, budget)}
        return sorted(found, key=lambda split: (split != "train", split != "val", split))


def _files(root: Path) -> list[Path]:
    if root.suffix == ".xml" and not is_dir(root):
        return [root] if starts_with(root, _CVAT) else []
    return [path for pattern in ("*.xml", "*/*.xml") for path in sorted(root.glob(pattern)) if starts_with(path, _CVAT)]


def parse_xml(data: bytes, where: str, budget: Budget) -> ElementTree.Element:
    """The root of an XML document without a document type.

    Raises:
        DataError: it is not valid, declares a document type, is nested too deep, or takes more memory than `budget`.
    """
    builder, depth = ElementTree.TreeBuilder(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise DataError(f"{where} has elements in more than {MAX_DEPTH} others; is this a file of CVAT?")
        characters = sum(len(key) + len(value) for key, value in attributes.items())
        budget.spend(2 * TABLE + LIST + len(tag) + 4 * characters + NUMBER * len(attributes))
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def text(value: str) -> None:
        budget.spend(4 * len(value))
        builder.data(value)

    def refuse(*declared: Any) -> None:
        raise DataError(f"{where} declares a document type (<!DOCTYPE>), which CVAT never writes; take it out")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = text, refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where} is not valid XML ({error}); export it again or correct it") from error
    return builder.close()


def _pictures(file: Path, budget: Budget) -> list[ElementTree.Element]:
    """The elements of the pictures of one file."""
    top = parse_xml(content(file, MAX_FILE), str(file), budget)
    if top.tag != "annotations":
        raise DataError(f"{file} holds <{shown(top.tag)[1:-1]}>, not CVAT's <annotations>; export it again")
    if top.find("track") is not None:
        raise DataError(f"{file} holds tracks of a video; export it from CVAT in the format 'CVAT for images 1.1'")
    return top.findall("image")


def _split_of(row: ElementTree.Element, file: Path) -> str:
    told = [split_name(name) for name in (file.stem.removeprefix("annotations_"), file.parent.name)]
    return split_name(row.get("subset", "")) or next((split for split in told if split in SPLITS), "train")


def _read(
    file: Path,
    rows: list[tuple[int, ElementTree.Element]],
    root: Path,
    images: str | Path | None,
    references: References,
    look: Look,
) -> Iterator[Record]:
    base = file.parent
    for number, row in rows:
        where = f"{file}, image {shown(row.get('name', f'number {number}'))},"
        budget = references.budget
        try:
            name = safe_name(row.get("name", "").replace("\\", "/"), where, key="name")
            subset = row.get("subset", "")
            places = [base / "images", *([base / "images" / subset, base / subset] if _is_folder(subset) else []), base]
            places = [Path(images).expanduser()] if images is not None else places
            folder = picture_folder(places, [name], look) or base
            sides = {key: _number(row, key, where, most=1 << 30) for key in ("height", "width")}
            if min(sides.values()) < 1 or any(side % 1 for side in sides.values()):
                raise DataError(f"{where} has height and width {shown(list(sides.values()))}, but both must be pixels")
            if images is None:
                folder, prefix = rooted(root if is_dir(root) else base, folder)
                name = prefix + name
            picture = Picture(name, folder, name, int(sides["height"]), int(sides["width"]), upright=True)
            objects = list(_objects(row, picture.image_id, where, references))
        except TooMuch:
            raise
        except DataError as error:
            budget.spend(ERROR)
            yield UnusableReference(str(error), ref_id=f"image number {number}")
            continue
        yield from references.of(picture, objects)


def _is_folder(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0")


def _objects(
    row: ElementTree.Element, image_id: int | str, where: str, references: References
) -> Iterator[Labelled | UnusableReference]:
    """The objects of a picture: shapes, of which those of one group are one."""
    groups: dict[Any, list[Labelled]] = {}
    for number, shape in enumerate(shape for shape in row if shape.tag in SHAPES):
        named, ref_id = f"{where} shape {number},", f"{image_id}:{number}"
        if shape.get("outside") == "1":
            references.left_out.setdefault(OUTSIDE, []).append(ref_id)
            continue
        try:
            label, group = shape.get("label", ""), shape.get("group_id", "0")
            phrases = _phrases(shape, label, named, references.budget)
            item = Labelled(ref_id, phrases, _outline(shape, named), f"shape {number}, ")
        except TooMuch:
            raise
        except DataError as error:
            references.budget.spend(ERROR)
            yield UnusableReference(str(error), BAD_ANNOTATION, ref_id)
            continue
        groups.setdefault((label, number, None) if group in ("", "0") else (label, group), []).append(item)
    yield from map(united, groups.values())


def _phrases(shape: ElementTree.Element, label: str, where: str, budget: Budget) -> tuple[str, ...]:
    attributes = {item.get("name", "").lower(): (item.text or "").strip() for item in shape.iter("attribute")}
    own = own_words({key: attributes.get(key) for key in OWN_WORDS}, where, budget)
    return own or stripped([label.replace("_", " ")], budget)


def _outline(shape: ElementTree.Element, where: str) -> Any:
    """The segmentation of a shape."""
    if shape.tag in WITHOUT_AREA:
        raise DataError(f"{where} is a {shape.tag}, which encloses nothing; draw a polygon or a mask instead")
    if shape.tag == "polygon":
        return polygon(_points(shape, where), where)
    turned = math.radians(_number(shape, "rotation", where, "0"))
    if shape.tag == "ellipse":
        x, y, across, down = (_number(shape, key, where) for key in ("cx", "cy", "rx", "ry"))
        return ellipse(x, y, across, down, where, turned)
    if shape.tag == "mask":
        place = {key: int(_number(shape, key, where)) for key in ("left", "top", "height", "width")}
        return Patch(shape.get("rle", ""), **place)
    left, top, right, bottom = (_number(shape, key, where) for key in ("xtl", "ytl", "xbr", "ybr"))
    x, y, cosine, sine = (left + right) / 2, (top + bottom) / 2, math.cos(turned), math.sin(turned)
    corners = [(left - x, top - y), (right - x, top - y), (right - x, bottom - y), (left - x, bottom - y)]
    return polygon([(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in corners], where)


def _points(shape: ElementTree.Element, where: str) -> list[tuple[float, float]]:
    text = shape.get("points", "")
    try:
        points = [(float(x), float(y)) for x, y in (point.split(",") for point in text.split(";"))]
    except ValueError as error:
        raise DataError(f"{where} has points {shown(text)}, which must be x,y;x,y;...") from error
    return points


def _number(row: ElementTree.Element, key: str, where: str, default: str = "", *, most: int = MAX_AWAY) -> float:
    """The attribute `key`, a number between `-most` and `most`."""
    text = row.get(key, default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -most <= value <= most:
        raise DataError(f"{where} has {key} {shown(text)}, which must be a number of pixels")
    return value
