"""A folder of images with one JSON object per line: your own data, and what `fastris data convert` writes.

    {"image": "cat.jpg", "mask": "cat.png", "sentences": ["the cat on the left", "grey cat"]}

`image` lies under `images/`, `mask` under `masks/`. Instead of a file, `mask` may hold COCO's run lengths or polygons.
Optional are `split`, `ref_id`, `image_id`, `size` ([height, width] in pixels), `no_target`, for sentences that name
nothing in the image, and `upright`, for a mask of the image as its EXIF orientation turns it. `convert` also writes
`dataset.json`, which holds the data set's name and counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastris.data.base import DataError, Reference, shown
from fastris.data.formats.annotated import (
    BAD_ANNOTATION,
    SPLIT_ALIASES,
    Annotated,
    AnnotatedDataset,
    OnError,
    UnusableReference,
    collect,
)
from fastris.data.formats.annotation import MaskPicture, Several
from fastris.data.formats.budget import ERROR, Budget, TooMuch
from fastris.data.formats.records import ID, field, parse_json, read_json, stripped
from fastris.data.paths import GONE, Look, is_dir, is_file, opened, place, regular

LAYOUT = "the layout of a folder of your own data"
MANIFEST = "dataset.json"
MANIFEST_FORMAT = "fastris-data"
MANIFEST_VERSION = 1
MAX_FILE = 4 << 30  # bytes; RefCOCO converted takes 0.02 GB
MAX_LINE = 32 << 20  # bytes
MAX_MANIFEST = 1 << 20  # bytes


class FolderDataset(AnnotatedDataset):
    """One split of a folder: `SPLIT.jsonl`, or the lines of any `*.jsonl` there whose field `split` says so.

    Args:
        name: "folder", or the data set's name if `fastris data convert` wrote the folder.
        split: the name of a file, or the value of the field.
        root: the folder.
        images: the folder of the images, if it is not `images`.
        on_error: "raise" or "skip", as `AnnotatedDataset` describes.

    Raises:
        DataError: no such split, a line that is no JSON object, fewer or more lines than `dataset.json` counts, or
            unusable references.
    """

    def __init__(
        self,
        name: str,
        split: str,
        root: str | Path,
        *,
        images: str | Path | None = None,
        on_error: OnError = "raise",
    ):
        root = Path(root).expanduser()
        split = SPLIT_ALIASES.get(split, split)
        manifest = read_manifest(root)
        if name not in ("folder", manifest.get("name", name)):
            raise DataError(f"dataset={name!r}, but {root / MANIFEST} says that it is {manifest['name']!r}")
        folder = root / "images" if images is None else Path(images).expanduser()
        if not is_dir(folder):
            raise DataError(f"there is no folder {folder} with the images; put them there, or name theirs with images=")
        budget = Budget(root, sum(map(regular, _files_of(root, split))))
        rows = list(_rows_of(root, split, budget))
        counted = manifest.get("splits", {}).get(split, {}).get("references", len(rows))
        if counted != len(rows):
            raise DataError(f"{root / MANIFEST} counts {counted} references in {split}, but {len(rows)} are there")
        look = Look()
        records = collect(
            rows, lambda row: build(row[1], row[0], folder, root, look, budget), lambda row: _id_of(*row), budget
        )
        super().__init__(manifest.get("name", name), split, records, on_error, look)

    @classmethod
    def finds(cls, name: str, root: Path) -> bool:
        """Whether the folder holds JSONL files, of the data set `name` where `dataset.json` names one."""
        if not any(root.glob("*.jsonl")):
            return False
        return name in ("folder", read_manifest(root).get("name", "folder"))

    @classmethod
    def splits(cls, name: str, root: Path, images: str | Path | None = None) -> list[str]:
        """The splits that `dataset.json` names, or else the lines' fields `split` and the names of the files."""
        manifest = read_manifest(root)
        if manifest:
            return list(manifest["splits"])
        found = {split for path in sorted(root.glob("*.jsonl")) for split in _splits_in(path)}
        return sorted(found, key=lambda split: (split != "train", split != "val", split))


def read_manifest(root: Path) -> dict[str, Any]:
    """The content of `dataset.json`, or {} where there is none.

    Raises:
        DataError: it is not what `fastris data convert` writes.
    """
    path = root / MANIFEST
    if not is_file(path):
        return {}
    manifest = read_json(path, MAX_MANIFEST)
    if type(manifest) is not dict or manifest.get("format") != MANIFEST_FORMAT:
        raise DataError(f"{path} was not written by `fastris data convert`; rename it if it is yours")
    if manifest.get("version") != MANIFEST_VERSION:
        raise DataError(f"{path} is of version {shown(manifest.get('version'))}; this fastris reads {MANIFEST_VERSION}")
    field(manifest, "name", (str,), str(path), LAYOUT)
    for split, entry in field(manifest, "splits", (dict,), str(path), LAYOUT).items():
        field(entry, "references", (int,), f"{path}, split {split!r},", LAYOUT)
    return manifest


def _lines(path: Path, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Yield (where, object) for each line, an error in place of a bad object; empty lines are skipped."""
    with opened(path, MAX_FILE) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise DataError(f"{where} is longer than {MAX_LINE} bytes; keep large masks in PNG files")
            if not line.strip():
                continue
            try:
                row = parse_json(line, where, budget)
                if type(row) is not dict:
                    raise DataError(f"{where} is {type(row).__name__}, but must be an object {{...}}")
            except TooMuch:
                raise
            except DataError as error:
                budget.spend(ERROR)
                row = UnusableReference(str(error), ref_id=f"line {number}")
            yield where, row


def _splits_in(path: Path) -> set[str]:
    rows = (row for _, row in _lines(path, Budget(path, regular(path))) if type(row) is dict)
    return {row["split"] if type(row.get("split")) is str else path.stem for row in rows} or {path.stem}


def _files_of(root: Path, split: str) -> list[Path]:
    """The files that may hold rows of a split: `SPLIT.jsonl` if it exists, else all."""
    files, own = sorted(root.glob("*.jsonl")), root / f"{split}.jsonl"  # a split of "../x" is no file among these
    return [own] if own in files else files


def _rows_of(root: Path, split: str, budget: Budget) -> Iterator[Any]:
    """The rows of one split: pairs (where, row), or the errors of bad lines."""
    own = root / f"{split}.jsonl"
    count = 0
    for path in _files_of(root, split):
        for where, row in _lines(path, budget):
            if type(row) is not dict:
                count += path == own
                yield row
            elif row.get("split", path.stem) == split:
                count += 1
                yield where, row
    if not count:
        splits = ", ".join(sorted({name for path in root.glob("*.jsonl") for name in _splits_in(path)})) or "none"
        raise DataError(f"split={split!r} is unknown or empty; the JSONL files in {root} have {splits}")


def _id_of(where: str, row: dict[str, Any]) -> int | str:
    path, _, number = where.rpartition(", line ")
    return row["ref_id"] if type(row.get("ref_id")) in ID else f"{Path(path).name}:{number}"


def build(row: dict[str, Any], where: str, images: Path, root: Path, look: Look, budget: Budget) -> Annotated:
    """Build a reference with its annotation from one line; without a `ref_id`, its file and line number are its id.

    Raises:
        DataError: a field has a wrong type or value; the message begins with `where`.
    """
    named = f"{where},"
    ref_id = field(row, "ref_id", ID, named, LAYOUT) if "ref_id" in row else _id_of(where, row)
    stated = field(row, "image", (str,), named, LAYOUT)
    name, _ = place(images, stated, named, look, key="image", kind="the folder of images", prefix="images/")
    image_id = field(row, "image_id", ID, named, LAYOUT) if "image_id" in row else name
    no_target = field(row, "no_target", (bool,), named, LAYOUT) if "no_target" in row else False
    segmentation = _segmentation(row, ref_id, named, root / "masks", no_target, look)
    height, width = _size(row, named, segmentation)
    upright = field(row, "upright", (bool,), named, LAYOUT) if "upright" in row else False
    return Annotated(
        Reference(ref_id, image_id, _sentences(row, named, budget), name, no_target),
        f"{where.rpartition(', ')[2]}, ",
        images / name,
        height,
        width,
        segmentation,
        (images, name),
        upright=upright,
    )


def _sentences(row: dict[str, Any], where: str, budget: Budget) -> tuple[str, ...]:
    sentences = field(row, "sentences", (list,), where, LAYOUT)
    if not sentences or not all(type(sentence) is str for sentence in sentences):
        raise DataError(f"{where} has sentences {shown(sentences)}, which must be a list of one or more texts")
    return stripped(sentences, budget)


def _segmentation(row: dict[str, Any], ref_id: int | str, where: str, masks: Path, no_target: bool, look: Look) -> Any:
    mask = row.get("mask")
    if mask is None and no_target:
        return Several(())
    mask = field(row, "mask", (str, dict, list), where, LAYOUT)
    if type(mask) is not str:
        return mask
    name, found = place(masks, mask, where, look, key="mask", kind="the folder of masks", prefix="masks/")
    if found:
        why = "" if found == GONE else f" ({found})"
        message = f"{where} has mask {shown(name)}, which is no file in {masks}{why}; put it there"
        raise UnusableReference(message, BAD_ANNOTATION, ref_id)
    return MaskPicture(masks / name)


def _size(row: dict[str, Any], where: str, segmentation: Any) -> tuple[int, int]:
    """Height and width in pixels from the field `size` or the run lengths; 0, 0 if there are none."""
    size = segmentation.get("size") if type(segmentation) is dict else None
    size = row.get("size", size)
    if size is None:
        return 0, 0
    if type(size) is not list or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise DataError(f"{where} has size {shown(size)}, which must be [height, width] in pixels")
    return size[0], size[1]
