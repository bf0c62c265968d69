"""Convert any format to fastris's own: one JSONL file per split with run-length masks, and the images."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastris.data.base import DataError, shown
from fastris.data.formats.annotated import AnnotatedDataset
from fastris.data.formats.check import SplitReport, Track, silent
from fastris.data.formats.jsonl import MANIFEST, MANIFEST_FORMAT, MANIFEST_VERSION
from fastris.data.formats.published import REFERENCES
from fastris.data.formats.table import open_split
from fastris.data.paths import safe_name, stays
from fastris.version import __version__


def convert(
    name: str,
    root: str | Path,
    out: str | Path,
    *,
    format: str,
    splits: list[str],
    images: str | Path | None = None,
    on_error: str = "raise",
    copy_images: bool = False,
    track: Track = silent,
    **options: Any,
) -> dict[str, Any]:
    """Write a data set to a new folder, which appears complete or not at all.

    The new folder holds no pickle and nothing else that could execute code: `SPLIT.jsonl` with one reference per line,
    its mask as COCO's compressed run lengths; `dataset.json` with the counts; and `images`, a link to the folder of the
    images, copies of its files, or the images of an LMDB file.

    Args:
        name, root, format, images: of the data set, as for `fastris.data.formats.table.open_split`.
        out: the new folder; it must not exist, or be empty.
        splits: the splits to write.
        on_error: "raise" or "skip" for unusable references.
        copy_images: copy the images instead of linking to their folder.
        track: shows progress.
        options: of the format's reader.

    Returns:
        the content of `dataset.json`.

    Raises:
        DataError: the data set cannot be read, or `out` is not empty.
        OSError: `out` cannot be written. After any error or Ctrl-C, nothing is left behind.
    """
    manifest: dict[str, Any] = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, "name": name}
    manifest |= {"converted_from": format, "fastris": __version__, "splits": {}}
    with _new_folder(Path(out).expanduser()) as folder:
        for split in splits:
            dataset = open_split(name, split, root, format=format, images=images, on_error=on_error, **options)
            report = _write_split(dataset, folder, copy_images, track)
            skipped = {problem: len(ids) for problem, ids in dataset.skipped.items()}
            counts = {key: value for key, value in report.as_dict().items() if key != "problems"}
            published = REFERENCES.get(name, {}).get(split)
            manifest["splits"][split] = counts | {"published": published, "left_out": skipped}
        _write(folder / MANIFEST, [json.dumps(manifest, indent=1)])
    return manifest


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, which is renamed to `out` at the end and removed on any error."""
    out = Path(os.path.abspath(out))
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise DataError(f"out={str(out)!r} exists and is not empty; choose another folder, or remove it first")
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        os.replace(folder, out)
    except OSError as error:
        why = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        message = f"could not write {out}: {why}; nothing is left of it. Free some space or choose another folder"
        raise OSError(error.errno, message) from error
    finally:
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def _write_split(dataset: AnnotatedDataset, folder: Path, copy_images: bool, track: Track) -> SplitReport:
    report, images = SplitReport(len(dataset)), set[Any]()

    def lines() -> Iterator[str]:
        for index in track(range(len(dataset)), len(dataset), f"convert {dataset.name} {dataset.split}"):
            reference, mask = dataset.reference(index), dataset.run_lengths(index)
            line: dict[str, Any] = {"ref_id": reference.ref_id, "image_id": reference.image_id}
            line |= {"image": reference.file_name, "sentences": reference.sentences}
            line |= {"no_target": True} if mask is None else {"mask": mask}
            if dataset.upright(index):
                line["upright"] = True
            if reference.image_id not in images:
                _place_image(dataset, index, reference.file_name, folder / "images", copy_images)
            report.count(reference, images)
            yield json.dumps(line, separators=(",", ":"))

    _write(folder / f"{_file_stem(dataset.split)}.jsonl", lines())
    return report


def _file_stem(split: str) -> str:
    bad = not split.isprintable() or split.startswith(".") or set(split) & set('/\\:*?"<>|')
    if bad or not stays(f"{split}.jsonl") or not split:
        raise DataError(f"split={shown(split)} cannot be the name of a file; rename it in the annotations")
    return split


def _place_image(dataset: AnnotatedDataset, index: int, name: str, images: Path, copy: bool) -> None:
    """Make the image available as `images/name`: by a link to its folder, or as a copy."""
    source, folder = dataset.encoded_image(index), dataset.image_folder(index)
    if isinstance(source, Path) and folder is not None and not copy:
        target = folder.resolve()
        if images.is_dir() and images.resolve() != target:
            place = images.resolve() if images.is_symlink() else "the annotations"
            raise DataError(f"the images lie in {place} and in {target}; pass copy_images=true")
        if not images.is_symlink():
            images.symlink_to(target, target_is_directory=True)
        return
    if images.is_symlink():
        raise DataError(f"some images lie in {images.resolve()}, and some in the annotations; pass copy_images=true")
    target = images / safe_name(name, f"{dataset.name} {dataset.split}")
    target.parent.mkdir(parents=True, exist_ok=True)
    same = not target.exists() or (
        target.read_bytes() == source if isinstance(source, bytes) else filecmp.cmp(source, target, shallow=False)
    )
    if isinstance(source, Path) and same:
        shutil.copyfile(source, target)
    elif not same:
        raise DataError(f"two references have different images of the name {name!r}; they cannot both be {target.name}")
    elif isinstance(source, bytes):
        target.write_bytes(source)


def _write(path: Path, lines: Any) -> None:
    with path.open("w", encoding="ascii") as file:
        for line in lines:
            file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
