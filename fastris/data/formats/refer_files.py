"""The files of the REFER layout: where they lie, what they must hold, and how they fit together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastris.data.base import DataError, Reference, shown
from fastris.data.formats.annotated import DUPLICATE_ID, Annotated, Record, UnusableReference, collect
from fastris.data.formats.annotation import Several
from fastris.data.formats.budget import ERROR, NUMBER, Budget
from fastris.data.formats.records import ID, ID_RULE, by_id, field, is_id, read_json, sentences_of
from fastris.data.formats.unpickle import load_plain
from fastris.data.paths import is_dir, is_file, regular, safe_name

LAYOUT = {
    "refcoco": ("refcoco", "refs(unc).p"),
    "refcoco+": ("refcoco+", "refs(unc).p"),
    "refcocog_u": ("refcocog", "refs(umd).p"),
    "refcocog_g": ("refcocog", "refs(google).p"),
    "grefcoco": ("grefcoco", "grefs(unc).json"),
}
"""Data set -> its folder under the root, and its file of references there; `instances.json` lies beside it."""

IMAGE_FOLDERS = ("images/mscoco/images/train2014", "images/train2014", "train2014")
NO_TARGET_ID = -1  # gRefCOCO's annotation of an expression that names nothing


class Files(NamedTuple):
    """The paths of one data set: its references, its annotations, and the folder of its images."""

    refs: Path
    instances: Path
    images: Path


def holds(name: str, root: Path) -> bool:
    """Whether the file of references of a data set lies under `root`."""
    folder, refs_name = LAYOUT[name]
    return is_file(root / folder / refs_name)


def image_folder(root: Path, images: str | Path | None, places: tuple[str, ...] = IMAGE_FOLDERS) -> Path | None:
    """The folder that the user named, or the first of the usual places that exists."""
    folders = [root / place for place in places] if images is None else [Path(images).expanduser()]
    return next((place for place in folders if is_dir(place)), None)


def locate(name: str, root: Path, images: str | Path | None) -> Files:
    """Find the files of a data set. Raises DataError, which lists all of them and says which are missing."""
    folder, refs_name = LAYOUT[name]
    refs, instances = root / folder / refs_name, root / folder / "instances.json"
    folder_of_images = image_folder(root, images)
    if folder_of_images is not None and is_file(refs) and is_file(instances):
        return Files(refs, instances, folder_of_images)

    states = [f"{folder}/{file.name} ({'found' if is_file(file) else 'MISSING'})" for file in (refs, instances)]
    if folder_of_images is not None:
        states.append(f"COCO's train2014 images in {folder_of_images} (found)")
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


def read_split(files: Files, split: str) -> list[Record]:
    """Read the references of one split with their annotations and images; every key that is used is checked.

    Raises:
        DataError: unknown split, or files that are damaged or do not fit each other.
    """
    budget = Budget(files.refs, regular(files.refs) + regular(files.instances))
    return list(_join(_refs_of(files.refs, split, budget), files, budget))


def splits_of(path: Path) -> list[str]:
    """The splits that a file of references has, in order of first appearance."""
    return list(_by_split(path, Budget(path, regular(path)))[0])


def _load(path: Path) -> list[Any]:
    refs = read_json(path) if path.suffix == ".json" else load_plain(path)
    if type(refs) is not list:
        raise DataError(f"{path} holds {type(refs).__name__}, but must hold a list of references")
    return refs


def _by_split(path: Path, budget: Budget) -> tuple[dict[str, list[Any]], list[UnusableReference]]:
    """Split -> its references, with an error in place of each bad one; and the errors of those without a split."""
    splits: dict[str, list[Any]] = {}
    without_split: list[UnusableReference] = []
    seen: set[int | str] = set()
    for number, ref in enumerate(_load(path)):
        ref_id: int | str = f"record {number}"
        try:
            ref_id = field(ref, "ref_id", ID, f"{path}, reference number {number},")
            split = field(ref, "split", (str,), f"{path}, ref_id {ref_id},")
        except DataError as error:
            budget.spend(ERROR)
            without_split.append(UnusableReference(str(error), ref_id=ref_id))
            continue
        if ref_id in seen:
            budget.spend(ERROR)
            ref = UnusableReference(f"{path} holds ref_id {ref_id} twice; download it again", DUPLICATE_ID, ref_id)
        seen.add(ref_id)
        splits.setdefault(split, []).append(ref)
    if not splits and without_split:
        raise without_split[0]
    return splits, without_split


def _refs_of(path: Path, split: str, budget: Budget) -> list[Any]:
    """The references of one split, as the file holds them, and the errors of those without a split."""
    splits, without_split = _by_split(path, budget)
    if split not in splits:
        raise DataError(f"split={split!r} is unknown; {path} has {', '.join(splits) or 'no references at all'}")
    return [*splits[split], *without_split]


def _read_instances(path: Path) -> dict[str, Any]:
    instances = read_json(path)
    for key in ("images", "annotations"):
        field(instances, key, (list,), str(path))
    return instances


def _ann_ids(ref: dict[str, Any], where: str) -> list[int | str]:
    """The ids of a reference's annotations: one, or in gRefCOCO several or none."""
    ids = field(ref, "ann_id", (*ID, list), where)
    ids = ids if type(ids) is list else [ids]
    if not all(map(is_id, ids)):
        raise DataError(f"{where} has 'ann_id' {shown(ids)}, but it must be int or str, or a list of them; {ID_RULE}")
    return [] if ids == [NO_TARGET_ID] else ids


def _join(refs: list[Any], files: Files, budget: Budget) -> Iterator[Record]:
    """Join the references with their annotations and images by id."""
    instances = _read_instances(files.instances)
    wanted: dict[str, set[int | str]] = {"annotations": set(), "images": set()}
    for ref in refs:
        if type(ref) is dict:
            ann_ids, image_id = ref.get("ann_id"), ref.get("image_id")
            ann_ids = ann_ids if type(ann_ids) is list else [ann_ids]
            wanted["annotations"].update(filter(is_id, ann_ids))
            wanted["images"].update(filter(is_id, [image_id]))
    known = {key: by_id(instances[key], ids, f"{files.instances}, {key[:-1]}") for key, ids in wanted.items()}
    yield from collect(refs, lambda ref: _build(ref, files, known, budget), lambda ref: ref["ref_id"], budget)


def _side(image: dict[str, Any], key: str, where: str) -> int:
    side = field(image, key, (int,), where)
    if side < 1:
        raise DataError(f"{where} has {key} {side}, but it must be at least 1 pixel")
    return side


def _build(
    ref: dict[str, Any], files: Files, known: dict[str, dict[int | str, dict[str, Any]]], budget: Budget
) -> Annotated:
    where = f"{files.refs}, ref_id {ref['ref_id']},"
    ann_ids, image_id = _ann_ids(ref, where), field(ref, "image_id", ID, where)
    budget.spend(NUMBER * len(ann_ids))
    for key, value, found in [
        *(("ann_id", ann_id, known["annotations"]) for ann_id in ann_ids),
        ("image_id", image_id, known["images"]),
    ]:
        if value not in found:
            raise DataError(f"{where} has {key!r} {value}, but {files.instances} does not; are both of one data set?")
    segmentations = []
    for ann_id in ann_ids:
        ann, in_instances = known["annotations"][ann_id], f"{files.instances}, annotation {ann_id},"
        if field(ann, "image_id", ID, in_instances) != image_id:
            raise DataError(f"{where} is about image {image_id}, but {in_instances} about image {ann['image_id']}")
        segmentation = field(ann, "segmentation", (list, dict), in_instances)
        if type(ref["ann_id"]) is not list or not ann.get("iscrowd"):  # gRefCOCO's published reader leaves crowds out
            segmentations.append(segmentation)
    no_target = not ann_ids
    if type(ref.get("no_target", no_target)) is not bool or ref.get("no_target", no_target) != no_target:
        raise DataError(f"{where} has no_target {shown(ref['no_target'])}, but ann_id {shown(ref['ann_id'])}")
    image, image_name = known["images"][image_id], f"{files.instances}, image {image_id},"
    file_name = safe_name(field(image, "file_name", (str,), image_name), image_name)
    return Annotated(
        Reference(ref["ref_id"], image_id, sentences_of(ref, where, budget), file_name, no_target),
        f"ann_id {', '.join(map(str, ann_ids)) or 'none'}, ",
        files.images / file_name,
        _side(image, "height", image_name),
        _side(image, "width", image_name),
        segmentations[0] if ann_ids == [ref["ann_id"]] else Several(tuple(segmentations)),
        (files.images, file_name),
    )
