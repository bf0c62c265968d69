"""Parquet files in the layout of `jxu124/refcoco` on the Hugging Face hub: REFER's records, annotations as JSON text.

The columns that are read: `ref_id`, `image_id`, `ann_id`, `split`, `sentences` (a list of `{"sent": ...}`, or that as
JSON), `raw_anns` (COCO's annotation as JSON) and `raw_image_info` (COCO's image record as JSON). A row states its split
under REFER's name ("val", "testA"), whatever its file is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastris.data.base import DataError, Reference
from fastris.data.formats.annotated import (
    SPLIT_ALIASES,
    Annotated,
    AnnotatedDataset,
    OnError,
    Record,
    UnusableReference,
    collect,
)
from fastris.data.formats.annotation import Several
from fastris.data.formats.budget import NUMBER, QUOTE, Budget
from fastris.data.formats.extras import need
from fastris.data.formats.hub_rows import holds_pictures
from fastris.data.formats.records import ID, field, parse_json, sentences_of
from fastris.data.formats.refer_files import IMAGE_FOLDERS, image_folder
from fastris.data.paths import regular, safe_name, unreadable

FOLDERS = {"refcoco+": "refcocoplus", "refcocog_u": "refcocog", "refcocog_g": "refcocog"}  # as the hub spells them
PLACES = ("coco/train2014", *IMAGE_FOLDERS)
COLUMNS = ("ref_id", "image_id", "ann_id", "split", "sentences", "raw_anns", "raw_image_info")
LAYOUT = "the layout of jxu124/refcoco"
MAX_ROWS = 5_000_000
MAX_GROUP_BYTES = 1 << 30  # of one row group, unpacked
MAX_TEXT = 16 << 20  # bytes; annotations as JSON
MAX_SENTENCES = 1000  # of a reference
PHYSICAL = ("BOOLEAN", "INT32", "INT64", "FLOAT", "DOUBLE", "BYTE_ARRAY")
_BATCH = 512  # rows


def find_files(name: str, root: Path) -> list[Path]:
    """The Parquet files in `root/NAME`, `root/NAME/data`, `root` or `root/data`: those of the first that has any."""
    bases = [root / name, root / FOLDERS.get(name, name), root]
    for place in (folder for base in bases for folder in (base, base / "data")):
        files = sorted(place.glob("*.parquet"))
        if files:
            return files
    return []


class ParquetDataset(AnnotatedDataset):
    """One split of Parquet files in the layout of jxu124/refcoco.

    Expected under `root`: the files, in it or in `data`, and COCO's images in `coco/train2014` (what `image_path`
    says), `images/mscoco/images/train2014`, `images/train2014` or `train2014`.

    Args:
        name: the data set's name; the files do not state it.
        split: as the column `split` spells it; "validation" and "val-test" mean "val".
        root: the folder described above.
        images: the folder of the images, if it is none of those.
        on_error: "raise" or "skip", as `AnnotatedDataset` describes.

    Raises:
        DataError: missing, damaged or oversized files, columns that are missing, unknown splits, unusable references;
            the library pyarrow is not installed.
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
        split = {**SPLIT_ALIASES, "validation": "val"}.get(split, split)
        files = find_files(name, root)
        if not files:
            raise DataError(f"there is no Parquet file in {root} or {root / 'data'}")
        splits = _splits(files)
        if split not in splits:
            raise DataError(f"split={split!r} is unknown; {files[0].parent} has {', '.join(splits)}")
        folder = image_folder(root, images, PLACES)
        if folder is None:
            places = f"images={str(images)!r}" if images is not None else f"{' or '.join(PLACES)} under {root}"
            raise DataError(f"COCO's train2014 images are missing: there is no folder {places}; images= names another")
        super().__init__(name, split, list(_read(files, split, folder)), on_error)

    @classmethod
    def finds(cls, name: str, root: Path) -> bool:
        """Whether there are Parquet files for this data set, without pictures in them."""
        files = find_files(name, root)
        return bool(files) and not holds_pictures(files)

    @classmethod
    def splits(cls, name: str, root: Path, images: str | Path | None = None) -> list[str]:
        """The splits that the rows state, in order of first appearance."""
        return _splits(find_files(name, root))


def _splits(files: list[Path]) -> list[str]:
    found: dict[str, None] = {}
    for _, row in _rows(files, ("split",), _budget(files)):
        if type(row["split"]) is not str:
            raise DataError(f"{files[0].parent}: the column split holds {type(row['split']).__name__}, not text")
        found[row["split"]] = None
    return list(found)


def _read(files: list[Path], split: str, folder: Path) -> Iterator[Record]:
    budget = _budget(files)
    rows = _rows(files, COLUMNS, budget, split)
    yield from collect(rows, lambda pair: build(pair[1], folder, pair[0], budget), lambda pair: _id_of(*pair), budget)


def _budget(files: list[Path]) -> Budget:
    return Budget(files[0] if len(files) == 1 else files[0].parent, sum(map(regular, files)))


def _id_of(where: str, row: dict[str, Any]) -> int | str:
    return row["ref_id"] if type(row.get("ref_id")) in ID else where.rpartition(", ")[2]


def _rows(
    files: list[Path], columns: tuple[str, ...], budget: Budget, split: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, columns) of all rows, or of those of `split`; only a few rows are in memory at a time.

    Texts stay dictionary-encoded until a row is built: a small file can repeat a large text millions of times.
    """
    parquet, arrow = need("pyarrow.parquet", "parquet", "to read Parquet files"), need("pyarrow", "parquet", "")
    for path in files:
        number = 0
        try:
            with parquet.ParquetFile(path) as file:
                leaves = _leaves(file, path, columns)
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            with parquet.ParquetFile(path, read_dictionary=texts) as file:
                for batch in file.iter_batches(batch_size=_BATCH, columns=[leaf.path for leaf in leaves]):
                    for column in batch.columns:
                        _check_values(column, path)
                        budget.spend(_unfolded(column))
                    for index in range(batch.num_rows):
                        if split is None or batch.column("split")[index].as_py() == split:
                            yield f"{path}, row {number}", {key: batch.column(key)[index].as_py() for key in columns}
                        number += 1
        except OSError as error:
            if error.errno is None:
                raise DataError(f"{path} is not a whole Parquet file ({error}); download it again") from error
            raise unreadable(path, error) from error
        except (arrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not a whole Parquet file ({error}); download it again") from error


def _leaves(file: Any, path: Path, columns: tuple[str, ...]) -> list[Any]:
    """The leaf columns to read; of the sentences only `sent`. Raises DataError for a file over the limits."""
    missing = [column for column in columns if column not in file.schema_arrow.names]
    if missing:
        raise DataError(f"{path} lacks the column {', '.join(missing)}; is this file in {LAYOUT}?")
    largest = max((file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)), default=0)
    if file.metadata.num_rows > MAX_ROWS or largest > MAX_GROUP_BYTES:
        sizes = f"{file.metadata.num_rows} rows, up to {largest} bytes a row group"
        raise DataError(f"{path} has {sizes}; the limits are {MAX_ROWS} and {MAX_GROUP_BYTES}. It was not read")
    leaves = [file.schema.column(number) for number in range(len(file.schema))]
    leaves = [leaf for leaf in leaves if leaf.path.partition(".")[0] in columns]
    odd = next((leaf for leaf in leaves if leaf.physical_type not in PHYSICAL), None)
    if odd is not None:
        raise DataError(f"{path} has a column {odd.path} of {odd.physical_type}; it must hold numbers or texts")
    said = [leaf for leaf in leaves if leaf.path.startswith("sentences.") and leaf.path.endswith(".sent")]
    return [leaf for leaf in leaves if leaf in said or not (said and leaf.path.startswith("sentences."))]


def _check_values(column: Any, path: Path) -> None:
    """Raise DataError for texts and lists that would fill the memory as Python objects."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    kind = column.type
    if types.is_list(kind) or types.is_large_list(kind):
        most, limit, what = compute.max(compute.list_value_length(column)).as_py(), MAX_SENTENCES, "a list of {} values"
        _check_values(column.flatten(), path)
    elif types.is_struct(kind):
        for part in column.flatten():
            _check_values(part, path)
        return
    elif types.is_dictionary(kind):
        most, limit, what = (
            compute.max(compute.binary_length(column.dictionary)).as_py(),
            MAX_TEXT,
            "a text of {} bytes",
        )
    else:
        return
    if (most or 0) > limit:
        raise DataError(f"{path} holds {what.format(most)}; the limit is {limit}")


def _unfolded(column: Any) -> int:
    """Bytes that the values of a column take as Python objects, which share no texts."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    kind = column.type
    if types.is_list(kind) or types.is_large_list(kind):
        return NUMBER * len(column) + _unfolded(column.flatten())
    if types.is_struct(kind):
        return NUMBER * len(column) + sum(map(_unfolded, column.flatten()))
    if types.is_dictionary(kind):
        characters = compute.sum(compute.binary_length(column.dictionary).take(column.indices)).as_py() or 0
        return int(characters) + (2 * QUOTE + NUMBER) * len(column)
    return NUMBER * len(column)


def build(row: dict[str, Any], folder: Path, where: str, budget: Budget) -> Annotated:
    """Build a reference with its annotation from one row.

    Raises:
        DataError: a column has a wrong type or value; the message begins with `where`.
    """
    ref_id, image_id = (field(row, key, ID, f"{where},", LAYOUT) for key in ("ref_id", "image_id"))
    sentences = row.get("sentences")
    if type(sentences) is str:
        sentences = parse_json(sentences, f"{where}, sentences", budget)
    info, anns = (_json(row, key, where, budget) for key in ("raw_image_info", "raw_anns"))
    named = f"{where}, raw_image_info"
    height, width = (field(info, key, (int,), named, LAYOUT) for key in ("height", "width"))
    if min(height, width) < 1:
        raise UnusableReference(f"{named} has size {height} x {width}, but it must be at least 1 pixel", ref_id=ref_id)
    parts = anns if type(anns) is list else [anns]
    segmentations = [field(ann, "segmentation", (list, dict), f"{where}, raw_anns,", LAYOUT) for ann in parts]
    name = safe_name(field(info, "file_name", (str,), named, LAYOUT), named)
    return Annotated(
        Reference(ref_id, image_id, sentences_of({"sentences": sentences}, f"{where},", budget), name),
        f"ann_id {row.get('ann_id')}, ",
        folder / name,
        height,
        width,
        segmentations[0] if len(segmentations) == 1 else Several(tuple(segmentations)),
        (folder, name),
    )


def _json(row: dict[str, Any], key: str, where: str, budget: Budget) -> Any:
    return parse_json(field(row, key, (str,), f"{where},", LAYOUT), f"{where}, {key}", budget)
