"""The files of the REFER layout: where they lie, what they must hold, and how they fit together."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from fastris.data.base import DataError, Reference
from fastris.data.unpickle import load_plain

LAYOUT = {
    "refcoco": ("refcoco", "refs(unc).p"),
    "refcoco+": ("refcoco+", "refs(unc).p"),
    "refcocog_u": ("refcocog", "refs(umd).p"),
    "refcocog_g": ("refcocog", "refs(google).p"),
}
"""Data set -> its folder under the root, and its pickle there; `instances.json` lies beside."""

IMAGE_FOLDERS = ("images/mscoco/images/train2014", "images/train2014", "train2014")


@dataclass(frozen=True)
class Annotated:
    """A reference with its annotation, not decoded; sizes in pixels, as `instances.json` states them."""

    reference: Reference
    ann_id: int | str
    path: Path
    height: int
    width: int
    segmentation: Any


class Files(NamedTuple):
    """Where a data set lies."""

    refs: Path
    instances: Path
    images: Path


def locate(name: str, root: Path, images: str | Path | None) -> Files:
    """The files of a data set, or one error that lists all of them and says which are missing."""
    folder, refs_name = LAYOUT[name]
    refs, instances = root / folder / refs_name, root / folder / "instances.json"
    image_folders = [root / place for place in IMAGE_FOLDERS] if images is None else [Path(images).expanduser()]
    image_folder = next((place for place in image_folders if place.is_dir()), None)
    if image_folder is not None and refs.is_file() and instances.is_file():
        return Files(refs, instances, image_folder)

    states = [f"{folder}/{file.name} ({'found' if file.is_file() else 'MISSING'})" for file in (refs, instances)]
    if image_folder is not None:
        states.append(f"COCO's train2014 images in {image_folder} (found)")
    elif images is not None:
        states.append(f"COCO's train2014 images in images={str(images)!r} (MISSING)")
    else:
        states.append(f"COCO's train2014 images in {' or '.join(IMAGE_FOLDERS)}, or where images= says (MISSING)")
    hint = ""
    if root.name == folder and (root / refs_name).is_file():
        hint = f". Did you mean root={str(root.parent)!r}, one level up?"
    elif not root.is_dir():
        hint = ". There is no such folder"
    raise DataError(f"root={str(root)!r} does not hold dataset {name!r}. Expected there: {'; '.join(states)}{hint}")


_ID = (int, str)


def _field(record: Any, key: str, kinds: tuple[type, ...], where: str) -> Any:
    """`record[key]`, if `record` is a dict that has it, of one of the types."""
    if type(record) is not dict:
        raise DataError(f"{where} is {type(record).__name__}, but must be a dict")
    if key not in record:
        raise DataError(f"{where} lacks the key {key!r}; is this file in the REFER layout?")
    if type(record[key]) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{where} has {key!r} of type {type(record[key]).__name__}, but it must be {wanted}")
    return record[key]


def read_split(files: Files, split: str) -> list[Annotated]:
    """The references of one split with their annotations and images, every key that is used here checked.

    Raises:
        DataError: unknown split, or files that are damaged or do not fit each other; the message names the record.
    """
    return list(_join(_refs_of(files.refs, split), files))


def _refs_of(path: Path, split: str) -> list[dict[str, Any]]:
    """The references of one split, as the pickle holds them."""
    refs = load_plain(path)
    if type(refs) is not list:
        raise DataError(f"{path} holds {type(refs).__name__}, but must hold a list of references")
    splits: dict[str, list[dict[str, Any]]] = {}
    seen: set[int | str] = set()
    for number, ref in enumerate(refs):
        ref_id = _field(ref, "ref_id", _ID, f"{path}, reference number {number},")
        if ref_id in seen:
            raise DataError(f"{path} holds ref_id {ref_id} twice; download it again")
        seen.add(ref_id)
        splits.setdefault(_field(ref, "split", (str,), f"{path}, ref_id {ref_id},"), []).append(ref)
    if split not in splits:
        raise DataError(f"split={split!r} is unknown; {path} has {', '.join(splits) or 'no references at all'}")
    return splits[split]


def _sentences(ref: dict[str, Any], where: str) -> tuple[str, ...]:
    sentences = _field(ref, "sentences", (list, tuple), where)
    if not sentences:
        raise DataError(f"{where} has no sentences; leave the reference out of the file, or add one")
    return tuple(
        _field(sentence, "sent", (str,), f"{where} sentence number {number},").strip()
        for number, sentence in enumerate(sentences)
    )


def _read_instances(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            instances = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); download it again") from error
    for key in ("images", "annotations"):
        _field(instances, key, (list,), str(path))
    return instances


def _by_id(records: list[Any], wanted: Iterable[int | str], where: str) -> dict[int | str, dict[str, Any]]:
    """Those of the records whose id is wanted."""
    wanted = set(wanted)
    found = {}
    for number, record in enumerate(records):
        record_id = _field(record, "id", _ID, f"{where} number {number}")
        if record_id in wanted:
            found[record_id] = record
    return found


def _join(refs: list[dict[str, Any]], files: Files) -> Iterable[Annotated]:
    """References with their annotations and images."""
    instances = _read_instances(files.instances)
    names = [f"{files.refs}, ref_id {ref['ref_id']}," for ref in refs]
    ann_ids = [_field(ref, "ann_id", _ID, where) for ref, where in zip(refs, names, strict=True)]
    image_ids = [_field(ref, "image_id", _ID, where) for ref, where in zip(refs, names, strict=True)]
    annotations = _by_id(instances["annotations"], ann_ids, f"{files.instances}, annotation")
    images = _by_id(instances["images"], image_ids, f"{files.instances}, image")
    for ref, where, ann_id, image_id in zip(refs, names, ann_ids, image_ids, strict=True):
        for key, value, known in (("ann_id", ann_id, annotations), ("image_id", image_id, images)):
            if value not in known:
                raise DataError(
                    f"{where} has {key!r} {value}, but {files.instances} does not; are both of one data set?"
                )
        ann, image = annotations[ann_id], images[image_id]
        in_instances = f"{files.instances}, annotation {ann_id},"
        if _field(ann, "image_id", _ID, in_instances) != image_id:
            raise DataError(f"{where} is about image {image_id}, but {in_instances} about image {ann['image_id']}")
        image_name = f"{files.instances}, image {image_id},"
        file_name = _safe_name(_field(image, "file_name", (str,), image_name), image_name)
        yield Annotated(
            Reference(ref["ref_id"], image_id, _sentences(ref, where), file_name),
            ann_id,
            files.images / file_name,
            _field(image, "height", (int,), image_name),
            _field(image, "width", (int,), image_name),
            _field(ann, "segmentation", (list, dict), in_instances),
        )


def _safe_name(file_name: str, where: str) -> str:
    """The file name, if it stays inside the folder of images on every system."""
    posix, windows = PurePosixPath(file_name), PureWindowsPath(file_name)
    leaves = posix.is_absolute() or windows.is_absolute() or windows.drive or ".." in (*posix.parts, *windows.parts)
    if leaves or "\0" in file_name or not posix.parts:
        raise DataError(f"{where} has file_name {file_name!r}, which leaves the folder of images; correct it")
    return file_name
