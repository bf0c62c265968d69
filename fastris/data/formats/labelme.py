"""LabelMe: one JSON file beside each picture, with its shapes. (X-AnyLabeling and others write it, too.)

An object is named by its `description` if it has one, else by its label. Polygons, rectangles, circles and masks are
taken; lines and points enclose nothing. Shapes with one label and one `group_id` are parts of one object. The picture
is the file that `imagePath` names, or the embedded `imageData` where there is none. LabelMe shows photos as their EXIF
orientation turns them, and shapes are those of the turned picture.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from fastris.data.base import DataError, shown
from fastris.data.formats.annotated import (
    BAD_ANNOTATION,
    Annotated,
    AnnotatedDataset,
    OnError,
    Record,
    UnusableReference,
)
from fastris.data.formats.annotation import Patch
from fastris.data.formats.budget import ERROR, Budget, TooMuch, of_json
from fastris.data.formats.pictures import (
    SPLITS,
    Labelled,
    Picture,
    References,
    Shared,
    inside,
    own_words,
    split_name,
    starts_with,
)
from fastris.data.formats.records import field, parse_json, stripped
from fastris.data.formats.shapes import ellipse, polygon, united
from fastris.data.paths import Look, content, is_dir, regular

LAYOUT = "LabelMe's layout"
MAX_FILE = 256 << 20  # bytes; a photo of 50 MB takes 67 MB when embedded
MAX_AWAY = 1 << 24  # pixels; no coordinate is larger
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_LABELME = re.compile(rb'"(?:shapes|imagePath|imageData)"\s*:')


class LabelmeDataset(AnnotatedDataset):
    """One split of LabelMe's files.

    Expected under `root`: the JSON files in it, or in folders. A folder that is called as a split ("train", "valid") is
    one; all other files are "train".

    Args:
        name: "folder".
        split: a split that the folders tell.
        root: the folder.
        images: the folder of the pictures, if they do not lie where `imagePath` says; then only its last part counts.
        several: "skip" or "merge": what to do about phrases that several objects of a picture share.
        on_error: "raise" or "skip", as `AnnotatedDataset` describes.

    Raises:
        DataError: unknown split, unusable references.
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
        root = Path(root).expanduser()
        found, split = _by_split(root), split_name(split)
        if split not in found:
            raise DataError(
                f"split={split!r} is unknown; the LabelMe files in {root} have {', '.join(found) or 'none'}"
            )
        if images is not None and not is_dir(Path(images).expanduser()):
            raise DataError(f"images={str(images)!r} is no folder; give the one that holds the pictures")
        self._files: dict[str, Path] = {}
        self._last: tuple[str, bytes] | None = None
        look, references = Look(), References(several, Budget(root, sum(map(regular, found[split]))))
        records = list(self._read(found[split], root, images, references, look))
        super().__init__(name, split, records, on_error, look, references.left_out)

    @classmethod
    def finds(cls, name: str, root: Path) -> bool:
        """Whether there are LabelMe's files; they do not name their data set, so it counts as "folder"."""
        return name == "folder" and any(True for _ in _files(root))

    @classmethod
    def splits(cls, name: str, root: Path, images: str | Path | None = None) -> list[str]:
        """The splits that the folders tell."""
        return sorted(_by_split(root), key=lambda split: (split != "train", split != "val", split))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}

    def _read(
        self, files: list[Path], root: Path, images: str | Path | None, references: References, look: Look
    ) -> Iterator[Record]:
        for file in files:
            stem = file.relative_to(root).with_suffix("").as_posix()
            try:
                data = content(file, MAX_FILE)
                row = parse_json(data, str(file), Budget(file, len(data)))
                picture, embedded = _picture(row, file, root, stem, images, look)
                unkept = len(row["imageData"]) * 2 if type(row.get("imageData")) is str else 0
                references.budget.spend(max(0, of_json(data) - unkept))
                objects = list(_objects(row, file, stem, references.budget))
            except TooMuch:
                raise
            except DataError as error:
                references.budget.spend(ERROR)
                yield UnusableReference(str(error), ref_id=stem)
                continue
            if embedded:
                self._files[picture.name] = file
            for record in references.of(picture, objects):
                outside = embedded and isinstance(record, Annotated)
                yield replace(record, path=Path(picture.name), root=None) if outside else record  # type: ignore[type-var]

    def _whole(self, item: Annotated) -> Annotated:
        file = self._files.get(item.reference.file_name)
        if file is None:
            return item
        if self._last is None or self._last[0] != item.reference.file_name:
            self._last = item.reference.file_name, self._embedded(file, item)
        return replace(item, pixels=self._last[1])

    def _embedded(self, file: Path, item: Annotated) -> bytes:
        """The bytes of the picture in a file."""
        try:
            data = content(file, MAX_FILE)
            row = parse_json(data, str(file), Budget(file, len(data)))
            return base64.b64decode(field(row, "imageData", (str,), f"{file}", LAYOUT), validate=True)
        except (binascii.Error, ValueError) as error:
            message = f"{file} has an imageData that is no picture ({error}); save it again with LabelMe"
            raise UnusableReference(message, ref_id=item.reference.ref_id) from error


def _files(root: Path) -> Iterator[Path]:
    if is_dir(root):
        for pattern in ("*.json", "*/*.json"):
            yield from (path for path in sorted(root.glob(pattern)) if starts_with(path, _LABELME))


def _by_split(root: Path) -> dict[str, list[Path]]:
    """Split -> its files."""
    found: dict[str, list[Path]] = {}
    for path in _files(root):
        split = split_name(path.parent.name) if path.parent != root else ""
        found.setdefault(split if split in SPLITS else "train", []).append(path)
    return found


def _picture(
    row: Any, file: Path, root: Path, stem: str, images: str | Path | None, look: Look
) -> tuple[Picture, bool]:
    """The picture of a file, and whether it is embedded there."""
    stated = field(row, "imagePath", (str,), str(file), LAYOUT)
    height, width = (row.get(key) for key in ("imageHeight", "imageWidth"))
    if not all(type(side) is int and side > 0 for side in (height, width)):
        height = width = 0
    embedded = type(row.get("imageData")) is str and bool(row["imageData"])
    suffix = PurePosixPath(stated.replace("\\", "/")).suffix.lower()
    try:
        if images is not None:
            folder, name = (
                Path(images).expanduser(),
                inside(stated.replace("\\", "/").rpartition("/")[2], "", str(file)),
            )
        else:
            folder, name = root, inside(stated, file.parent.relative_to(root).as_posix(), str(file))
        embedded = embedded and bool(look(folder, name))
    except DataError as error:
        if not embedded:
            hint = "" if images is not None else ", or give images=, the folder that holds the picture"
            raise DataError(f"{error}{hint}") from error
    if embedded:
        folder, name = root, stem + (suffix if suffix in PICTURES else ".jpg")
    return Picture(name, folder, name, height, width, upright=True), embedded


def _objects(row: dict[str, Any], file: Path, stem: str, budget: Budget) -> Iterator[Labelled | UnusableReference]:
    """The objects of a picture: shapes, of which those of one group are one."""
    groups: dict[Any, list[Labelled]] = {}
    for number, shape in enumerate(field(row, "shapes", (list,), str(file), LAYOUT)):
        where, ref_id = f"{file}, shape {number},", f"{stem}:{number}"
        try:
            label = field(shape, "label", (str,), where, LAYOUT)
            group = shape.get("group_id")
            if type(group) not in (int, str, type(None)):
                raise DataError(f"{where} has group_id {shown(group)}, but it must be a number or null")
            phrases = own_words(shape, where, budget) or stripped([label.replace("_", " ")], budget)
            item = Labelled(ref_id, phrases, _outline(shape, where), f"shape {number}, ")
        except TooMuch:
            raise
        except DataError as error:
            budget.spend(ERROR)
            yield UnusableReference(str(error), BAD_ANNOTATION, ref_id)
            continue
        groups.setdefault((label, number, None) if group is None else (label, group), []).append(item)
    yield from map(united, groups.values())


def _outline(shape: dict[str, Any], where: str) -> Any:
    """The segmentation of a shape."""
    kind = shape.get("shape_type") or "polygon"
    points = field(shape, "points", (list,), where, LAYOUT)
    if not all(type(point) is list and len(point) == 2 and all(map(_is_place, point)) for point in points):
        raise DataError(f"{where} has points {shown(points)}, which must be a list of [x, y] in pixels")
    if kind == "mask" and len(points) == 2:
        return _patch(shape, points, where)
    if kind in ("polygon", "oriented_rectangle", "rotation") or (kind == "rectangle" and len(points) == 4):
        return polygon(points, where)
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        return polygon([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], where)
    if kind == "circle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        return ellipse(x0, y0, radius := math.hypot(x1 - x0, y1 - y0), radius, where)
    if kind in ("mask", "rectangle", "circle"):
        raise DataError(f"{where} is a {kind} of {len(points)} points, but it must have 2; draw it again")
    raise DataError(f"{where} is a {shown(kind)}, which encloses nothing; draw a polygon instead, or take it out")


def _is_place(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_AWAY <= value <= MAX_AWAY


def _patch(shape: dict[str, Any], points: list[list[float]], where: str) -> Patch:
    """The segmentation of a mask, which LabelMe saves as a PNG of the part that two corners tell."""
    try:
        data = base64.b64decode(field(shape, "mask", (str,), where, LAYOUT), validate=True)
    except (binascii.Error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where} has a mask that is no PNG in base64 ({error}); draw it again") from error
    return Patch(data, round(points[0][0]), round(points[0][1]))
