"""Rows of tables with pictures, as data sets on the Hugging Face hub hold them, and the references that they make.

A row holds a picture, and either one object (a mask and its phrases) or a list of objects, as `moondream/refcoco-m`
does. Which column holds what is guessed from its name (`GUESSES`, the first that is there) unless the user says it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastris.data.base import DataError, Reference, shown
from fastris.data.formats.annotated import BAD_ANNOTATION, Annotated, Record, UnusableReference
from fastris.data.formats.annotation import MaskPicture
from fastris.data.formats.budget import ERROR, NUMBER, TABLE, Budget, TooMuch
from fastris.data.formats.records import is_id, parse_json, stripped
from fastris.data.paths import Look, stays

GUESSES = {
    "image": ("image", "img", "picture", "photo", "jpg", "png"),
    "objects": ("samples", "objects", "annotations", "instances", "references", "refs"),
    "mask": ("mask", "segmentation", "segmentation_mask", "gt_mask", "seg", "rle", "masks"),
    "text": (
        "sentences", "sentence", "phrases", "phrase", "expressions", "expression", "referring_expressions",
        "referring_expression", "captions", "caption", "text", "prompt", "query", "description", "label", "category",
    ),
}  # fmt: skip
"""What a column holds -> names that it usually has; `mask` and `text` are columns of a row or fields of an object."""

ALSO = ("image_id", "file_name", "ref_id")  # columns that are read where they are there
IDS = ("ref_id", "id", "ann_id")  # of an object in a list
MAX_PICTURE = 256 << 20  # bytes of one encoded picture
MAX_TEXT = 16 << 20  # bytes of a mask as text
MAX_SENTENCES = 1000  # of an object
MAX_OBJECTS = 10_000  # of a picture


@dataclass(frozen=True)
class Columns:
    """Which column, or which field of an object, holds what; "" for none."""

    image: str
    mask: str
    text: str
    objects: str = ""


@dataclass(frozen=True)
class RowItem(Annotated):
    """A reference whose picture stays in its table until it is read.

    Attributes:
        row: the number of its row.
        masked: its mask is a picture, which stays there, too: the number of the object in its row; -1 otherwise.
    """

    row: int = -1
    masked: int = -1


def parse_columns(text: str) -> dict[str, str]:
    """`columns=` as the user writes it, "image=photo,text=caption": what -> column.

    Raises:
        DataError: it has another form.
    """
    found = {}
    for part in filter(None, map(str.strip, text.split(","))):
        what, _, column = map(str.strip, part.partition("="))
        if what not in GUESSES or not column:
            raise DataError(
                f"columns={shown(text)} must be such as image=photo,mask=mask,text=caption (or objects=, a list)"
            )
        found[what] = column
    return found


def choose_columns(named: dict[str, str], columns: Sequence[str], fields: dict[str, list[str]], where: str) -> Columns:
    """The columns that are named, and guesses for the others.

    Args:
        named: as `parse_columns` gives them.
        columns: of the table.
        fields: column -> the fields of the objects that it holds; [] or left out where it is no list of objects.
        where: how messages call the table.

    Raises:
        DataError: one that is named is not there, or none looks like what is missing.
    """
    lists = [column for column in columns if fields.get(column)]
    objects = named.get("objects") or ("" if {"mask", "text"} <= set(named) else _guess("objects", lists))
    inner = fields.get(objects) or columns
    chosen = Columns(
        named.get("image") or _guess("image", columns),
        named.get("mask") or _guess("mask", inner),
        named.get("text") or _guess("text", inner),
        objects,
    )
    for what, known in (("image", columns), ("objects", ["", *lists]), ("mask", inner), ("text", inner)):
        column = getattr(chosen, what)
        if column not in known:
            there = ", ".join(columns) + (f" (in {objects}: {', '.join(inner)})" if inner is not columns else "")
            wrong = f"has no column {column!r}" if column else f"has no column whose name tells that it is the {what}"
            raise DataError(
                f"{where} {wrong}; it has {there}. Say which ones with columns=image=...,mask=...,text=... "
                "(and objects=..., a list of objects in each row)"
            )
    return chosen


def _guess(what: str, columns: Iterable[str]) -> str:
    lower = {column.lower(): column for column in columns}
    return next((lower[name] for name in GUESSES[what] if name in lower), "")


def objects_of(value: Any) -> list[dict[str, Any]] | None:
    """The objects in a row: a list of them, or a table of lists; None for anything else."""
    if type(value) is dict and value and all(type(part) is list for part in value.values()):
        lengths = {len(part) for part in value.values()}
        rows = zip(*value.values(), strict=True) if len(lengths) == 1 else ()
        value = [dict(zip(value, part, strict=True)) for part in rows]
    return value if type(value) is list and all(type(item) is dict for item in value) else None


def build(
    row: dict[str, Any], number: int, columns: Columns, where: str, budget: Budget, names: Sequence[str] = ()
) -> Iterator[Record]:
    """The references of one row, from its columns without the picture; an error in place of each bad one.

    Args:
        row: column -> value. Pictures of masks may be left out, or be `{"bytes": ..., "path": ...}`.
        number: of the row.
        columns: which column holds what.
        where: how messages call the row.
        budget: limits the memory of the split.
        names: of the classes, where the phrases are numbers of classes.
    """
    objects: list[dict[str, Any]] | None = [row]
    if columns.objects:
        objects = objects_of(row.get(columns.objects))
    if objects is None or len(objects) > MAX_OBJECTS:
        budget.spend(ERROR)
        what = f"{columns.objects} {shown(row.get(columns.objects))}"
        message = f"{where} has {what}, which must be a list of up to {MAX_OBJECTS} objects"
        yield UnusableReference(message, ref_id=f"row {number}")
        return
    image_id = row.get("image_id") if columns.objects and is_id(row.get("image_id")) else f"row {number}"
    name = row.get("file_name")
    name = name if type(name) is str and stays(name) and PurePosixPath(name).suffix else f"{number:08d}.jpg"
    for index, item in enumerate(objects):
        ref_id: Any = f"{number}:{index}" if columns.objects else row.get("ref_id")
        if columns.objects:
            ref_id = next((item[key] for key in IDS if is_id(item.get(key))), ref_id)
        ref_id = ref_id if is_id(ref_id) else number
        named = f"{where}, object {index}," if columns.objects else f"{where},"
        try:
            budget.spend(4 * TABLE)
            sentences = _sentences(item.get(columns.text), columns.text, named, names, budget)
            segmentation = _segmentation(item.get(columns.mask), columns.mask, named, budget)
        except TooMuch:
            raise
        except DataError as error:
            budget.spend(ERROR)
            yield UnusableReference(str(error), BAD_ANNOTATION, ref_id)
            continue
        height, width = _size(segmentation)
        yield RowItem(
            Reference(ref_id, image_id, sentences, name),  # type: ignore[arg-type]
            f"row {number}, ",
            Path(name),
            height,
            width,
            segmentation,
            upright=None,
            row=number,
            masked=index if isinstance(segmentation, MaskPicture) else -1,
        )


def _sentences(value: Any, column: str, where: str, names: Sequence[str], budget: Budget) -> tuple[str, ...]:
    if type(value) is int and 0 <= value < len(names):
        value = names[value].replace("_", " ")
    texts = [value] if type(value) is str else value
    if type(texts) is list:
        texts = [text.get("sent", text.get("raw")) if type(text) is dict else text for text in texts]
    if type(texts) is not list or not texts or not all(type(text) is str for text in texts):
        raise DataError(f"{where} has {column} {shown(value)}, which must be a text or a list of texts")
    if len(texts) > MAX_SENTENCES:
        raise DataError(f"{where} has {len(texts)} {column}; the limit is {MAX_SENTENCES}")
    return stripped(texts, budget)


def _segmentation(value: Any, column: str, where: str, budget: Budget) -> Any:
    """A picture (whose bytes stay where they are), run lengths, or polygons, also as JSON text."""
    if type(value) is str:
        if len(value) > MAX_TEXT:
            raise DataError(f"{where} has {column} of {len(value)} characters; the limit is {MAX_TEXT}")
        value = parse_json(value, f"{where} {column}", budget)
    if type(value) is dict and {"bytes", "path"} & set(value):
        return MaskPicture(b"")
    if type(value) is dict:
        counts = value.get("counts")
        counts = counts.decode("ascii", "replace") if type(counts) is bytes else counts
        budget.spend(NUMBER * len(counts) if isinstance(counts, str | list) else 0)
        return {"size": value.get("size"), "counts": counts}
    if type(value) is list:
        polygons = [value] if value and not any(type(part) is list for part in value) else value
        budget.spend(NUMBER * sum(len(part) for part in polygons if type(part) is list))
        return polygons
    raise DataError(f"{where} has {column} {shown(value)}, which is no mask: a picture, run lengths or polygons")


def _size(segmentation: Any) -> tuple[int, int]:
    """Height and width that the run lengths state; 0, 0 if there are none."""
    size = segmentation.get("size") if type(segmentation) is dict else None
    if type(size) is list and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        return size[0], size[1]
    return 0, 0


def picture_bytes(value: Any, folder: Path | None, where: str, look: Look) -> bytes | Path:
    """The encoded picture of a cell `{"bytes": ..., "path": ...}`, or its file in the data set's folder.

    Raises:
        DataError: there is none, it is too large, or its path leads out of the folder; it begins with `where`.
    """
    data, path = (value.get("bytes"), value.get("path")) if type(value) is dict else (None, None)
    if type(data) is bytes:
        if len(data) > MAX_PICTURE:
            raise DataError(f"{where} holds a picture of {len(data)} bytes; the limit is {MAX_PICTURE}")
        return data
    if type(path) is not str or folder is None:
        raise DataError(f"{where} holds no picture but {shown(value)}; pictures must be in the table, not elsewhere")
    absolute = folder.absolute()
    inner = Path(path).relative_to(absolute).as_posix() if Path(path).is_relative_to(absolute) else path
    found = look(absolute, inner)
    if found:
        raise DataError(f"{where} names the file {shown(path)}, which cannot be read from {folder}: {found}")
    return absolute / inner


def holds_pictures(files: list[Path]) -> bool:
    """Whether Parquet files hold pictures in a column; False where pyarrow is missing or they are damaged."""
    try:
        from pyarrow import parquet

        columns = parquet.read_schema(files[0]).names
    except Exception:  # the reader of such files says what is wrong
        return False
    return "raw_anns" not in columns and bool(_guess("image", columns))
