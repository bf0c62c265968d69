"""Data sets of the Hugging Face hub, or saved by its library `datasets`: `data_root=hf://OWNER/NAME`, or a folder.

`hub_rows.py` says what a row may hold. The library downloads and caches; pictures stay in its files until they are
read, and only our own decoders open them. With `streaming` nothing is cached: rows come one by one, and their pictures
are kept in a temporary folder for as long as the data set is in use.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastris.data.base import DataError
from fastris.data.formats.annotated import Annotated, AnnotatedDataset, OnError, Record, UnusableReference
from fastris.data.formats.annotation import MaskPicture
from fastris.data.formats.budget import LARGEST, Budget
from fastris.data.formats.extras import MissingLibrary, need
from fastris.data.formats.hub_rows import (
    ALSO,
    MAX_PICTURE,
    Columns,
    RowItem,
    build,
    choose_columns,
    holds_pictures,
    objects_of,
    parse_columns,
    picture_bytes,
)
from fastris.data.formats.pictures import split_name
from fastris.data.paths import Look, content, is_dir, is_file

REFCOCO_M = "moondream/refcoco-m"
NAMED = {"refcoco-m": f"hf://{REFCOCO_M}"}
"""Data set -> where it is published."""

MAX_ROWS = 5_000_000
MAX_STREAMED = 64 << 30  # bytes of pictures in the temporary folder
_HUB = re.compile(
    r"hf:/{1,2}(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<config>[\w.+-]+))?(?:@(?P<revision>[\w./-]+))?", re.ASCII
)
_VERSION = 4  # of the library; older ones may run code of a data set


class Source(NamedTuple):
    """Where a data set is: a repository of the hub (with a configuration and a revision), or a folder."""

    repo: str
    config: str | None = None
    revision: str | None = None
    folder: Path | None = None


def source_of(root: Path) -> Source:
    """What `data_root` names; pathlib makes one slash of two."""
    found = _HUB.fullmatch(root.as_posix())
    if found:
        return Source(found["repo"], found["config"], found["revision"])
    return Source(str(root), folder=root)


class HubDataset(AnnotatedDataset):
    """One split of a data set of the Hugging Face hub.

    Args:
        name: "folder", or "refcoco-m".
        split: as the data set calls it; "val" is "validation", too.
        root: `hf://OWNER/NAME`, with `/CONFIG` and `@REVISION` if need be; or a folder with its files, or one that
            `save_to_disk` of the library wrote.
        images: must be None: the pictures are in the table.
        columns: which column holds what, such as "image=photo,mask=mask,text=caption"; what is left out is guessed.
        streaming: read row by row, without downloading the whole data set first.
        on_error: "raise" or "skip", as `AnnotatedDataset` describes.

    Raises:
        DataError: it cannot be opened, unknown split or columns, unusable references; the library `datasets` is not
            installed.
    """

    def __init__(
        self,
        name: str,
        split: str,
        root: str | Path,
        *,
        images: str | Path | None = None,
        columns: str = "",
        streaming: bool = False,
        on_error: OnError = "raise",
    ):
        if images is not None:
            raise DataError(f"images={str(images)!r} is not used: the pictures are in the table; leave it out")
        source = source_of(Path(root).expanduser())
        splits = _splits(source)
        split = split_name(split)
        if split not in splits:
            raise DataError(f"split={split!r} is unknown; {source.repo} has {', '.join(splits)}")
        self._folder, self._look, self._repo = source.folder, Look(), source.repo
        self._kept_bytes = 0
        self._last: tuple[int, dict[str, Any]] | None = None
        named = parse_columns(columns)
        with _told(source):
            table = _open(source, splits[split], streaming)
        records = list(self._streamed(table, named) if streaming else self._listed(table, named))
        super().__init__(name, split, records, on_error, self._look)

    @classmethod
    def finds(cls, name: str, root: Path) -> bool:
        """Whether `root` names a repository of the hub, or a folder that its library reads."""
        if name not in ("folder", *NAMED):
            return False
        return source_of(root).folder is None or _saved(root) or holds_pictures(_parquet(root))

    @classmethod
    def splits(cls, name: str, root: Path, images: str | Path | None = None) -> list[str]:
        """The splits that the data set has, "validation" as "val"."""
        return list(_splits(source_of(root)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}

    def _listed(self, table: Any, named: dict[str, str]) -> Iterator[Record]:
        """The references of a table on disk, without its pictures."""
        if len(table) > MAX_ROWS:
            raise DataError(f"{self._repo} has {len(table)} rows; the limit is {MAX_ROWS}")
        with _told(self._repo):
            self._table, self._columns, names = _prepared(table, named, self._repo)
            texts = self._table.remove_columns([self._columns.image])
        budget = Budget(self._repo, table.info.dataset_size or 0)
        for number in range(len(texts)):
            with _told(self._repo):
                row = texts[number]
            yield from build(row, number, self._columns, f"{self._repo}, row {number}", budget, names)

    def _streamed(self, table: Any, named: dict[str, str]) -> Iterator[Record]:
        """The references of a table that comes row by row; its pictures are kept in files."""
        kept = Path(tempfile.mkdtemp(prefix="fastris-hub-"))
        weakref.finalize(self, _remove, kept, os.getpid())
        budget, number = Budget(self._repo, LARGEST), 0
        with _told(self._repo):
            table, self._columns, names = _prepared(table, named, self._repo)
            rows = iter(table)
        while True:
            with _told(self._repo):
                row = next(rows, None)
            if row is None:
                break
            for record in build(row, number, self._columns, f"{self._repo}, row {number}", budget, names):
                yield self._in_files(record, row, kept) if isinstance(record, RowItem) else record
            number += 1
            if number > MAX_ROWS or self._kept_bytes > MAX_STREAMED:
                sizes = f"{number} rows, {self._kept_bytes} bytes of pictures"
                raise DataError(f"{self._repo} has over {sizes}; the limits are {MAX_ROWS} and {MAX_STREAMED}")

    def _in_files(self, item: RowItem, row: dict[str, Any], kept: Path) -> Record:
        """A reference whose picture, and the picture of its mask, are in files of the folder `kept`."""
        try:
            pixels, mask = self._pictures(item, row)
            path = self._keep(pixels, kept / f"{item.row}.picture")
            if mask is not None:
                mask = self._keep(mask, kept / f"{item.row}.{item.masked}.mask")
                item = replace(item, segmentation=MaskPicture(mask))
            return replace(item, path=path, row=-1)
        except DataError as error:
            return UnusableReference(str(error), ref_id=item.reference.ref_id)

    def _keep(self, data: bytes | Path, path: Path) -> Path:
        """A file with a picture: its own, or the new one at `path`."""
        if isinstance(data, Path):
            return data
        if not path.exists():
            self._kept_bytes += len(data)
            path.write_bytes(data)
        return path

    def _pictures(self, item: RowItem, row: dict[str, Any]) -> tuple[bytes | Path, bytes | Path | None]:
        """The picture of a reference, and that of its mask if it is one."""
        where = f"{self._repo}, row {item.row}"
        pixels = picture_bytes(row[self._columns.image], self._folder, where, self._look)
        if item.masked < 0:
            return pixels, None
        objects = objects_of(row[self._columns.objects]) if self._columns.objects else [row]
        cell = objects[item.masked][self._columns.mask] if objects is not None else None
        return pixels, picture_bytes(cell, self._folder, f"{where}, its mask,", self._look)

    def _whole(self, item: Annotated) -> Annotated:
        if not isinstance(item, RowItem) or item.row < 0:
            return item
        if self._last is None or self._last[0] != item.row:
            with _told(self._repo):
                self._last = item.row, self._table[item.row]
        try:
            pixels, mask = self._pictures(item, self._last[1])
            item = replace(item, pixels=_bytes(pixels))
            return item if mask is None else replace(item, segmentation=MaskPicture(_bytes(mask)))
        except DataError as error:
            raise UnusableReference(str(error), ref_id=item.reference.ref_id) from error


def _bytes(data: bytes | Path) -> bytes:
    return data if isinstance(data, bytes) else content(data, MAX_PICTURE)


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a worker, which has a copy of the data set
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _told(source: Source | str) -> Iterator[None]:
    """Within this block, whatever the library raises is one DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of the network, the hub, its files or their features
        repo = source if isinstance(source, str) else source.repo
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise DataError(
            f"{repo} cannot be read by the library datasets ({type(error).__name__}: {lines[0]}); check its name, that "
            "it is public or you are logged in, and the connection"
        ) from error


def _library() -> Any:
    datasets = need("datasets", "datasets", "to read data sets of the Hugging Face hub")
    if int(str(datasets.__version__).partition(".")[0]) < _VERSION:
        raise MissingLibrary(
            f"datasets {datasets.__version__} may run a data set's code; pip install -U 'fastris[datasets]'"
        )
    return datasets


def _saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return is_file(folder / "dataset_dict.json") or (
        is_file(folder / "state.json") and is_file(folder / "dataset_info.json")
    )


def _parquet(root: Path) -> list[Path]:
    return next((files for place in (root, root / "data") if (files := sorted(place.glob("*.parquet")))), [])


def _splits(source: Source) -> dict[str, str]:
    """Split, as fastris calls it -> as the data set does."""
    datasets = _library()
    if source.folder is not None and not is_dir(source.folder):
        raise DataError(f"there is no folder {source.folder}; a data set of the hub is data_root=hf://OWNER/NAME")
    with _told(source):
        if source.folder is not None and _saved(source.folder):
            saved = datasets.load_from_disk(str(source.folder))
            names = list(saved) if isinstance(saved, datasets.DatasetDict) else ["train"]
        else:
            names = datasets.get_dataset_split_names(source.repo, source.config, revision=source.revision)
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(split_name(str(name)), str(name))
    return found


def _open(source: Source, split: str, streaming: bool) -> Any:
    datasets = _library()
    if source.folder is not None and _saved(source.folder):
        saved = datasets.load_from_disk(str(source.folder))
        table = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return table.to_iterable_dataset() if streaming else table
    return datasets.load_dataset(source.repo, source.config, split=split, revision=source.revision, streaming=streaming)


def _prepared(table: Any, named: dict[str, str], where: str) -> tuple[Any, Columns, list[str]]:
    """A table with the columns that are needed and encoded pictures, which columns they are, and the names of classes.

    The library's own decoder, which opens whatever it finds, is never used.
    """
    if table.features is None:  # of files such as JSON, which state none, when they are streamed
        row: dict[str, Any] = next(iter(table), {})
        fields = {key: list(objects[0]) for key, value in row.items() if (objects := objects_of(value))}
        return table, choose_columns(named, list(row), fields, where), []
    features = dict(table.features)
    columns = choose_columns(named, list(features), {key: _fields(feature) for key, feature in features.items()}, where)
    wanted = {columns.image, columns.objects or columns.mask, columns.objects or columns.text, *ALSO}
    table = table.select_columns([name for name in features if name in wanted])
    for name, feature in features.items():
        if name in wanted and (plain := _plain(feature)) != feature:
            table = table.cast_column(name, plain)
    return table, columns, list(getattr(features.get(columns.text), "names", None) or [])


def _fields(feature: Any) -> list[str]:
    """The fields of the objects that a column of lists holds; [] for another column."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    if isinstance(feature, dict) and feature and all(hasattr(part, "feature") for part in feature.values()):
        inner = feature
    return list(inner) if isinstance(inner, dict) else []


def _plain(feature: Any) -> Any:
    """A feature of the library whose pictures are not decoded."""
    datasets = _library()
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {key: _plain(value) for key, value in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = _plain(feature.feature)
        return feature if inner == feature.feature else replace(feature, feature=inner)
    return feature
