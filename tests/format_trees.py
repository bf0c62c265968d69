"""The data set of `refer_tree` once more in every other format, written as that format's own tools write it."""

from __future__ import annotations

import base64
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from refer_tree import IMAGE_FOLDER, make_refer_tree

from fastris.data import ReferringDataset, load_dataset

SPLITS = ("train", "val", "testA", "testB")


def content(data: ReferringDataset) -> list[Any]:
    """Sentences, image and mask of every reference, without the ids that formats do not share."""
    return [(data.reference(index).sentences, *pixels(data, index)) for index in range(len(data))]


def pixels(data: ReferringDataset, index: int) -> tuple[Any, ...]:
    """Image and mask of a reference in a form that compares."""
    image, mask = data.image(index), data.mask(index)
    return image.shape, image.dtype, image.tobytes(), mask.shape, mask.dtype, mask.tobytes()


def _source(root: Path) -> Path:
    return make_refer_tree(root / "source")


def _references(root: Path, split: str) -> list[dict[str, Any]]:
    """What the REFER tree says about each reference: what the published `data_process.py` would write from it."""
    data = load_dataset("refcoco", split, root)
    found = []
    for index in range(len(data)):
        reference = data.reference(index)
        found.append({"ref": reference, "mask": data.mask(index), "file": root / IMAGE_FOLDER / reference.file_name})
    return found


def save_mask(mask: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def make_lmdb_tree(
    root: Path,
    *,
    protocol: int = 4,
    change: Callable[[dict[str, Any]], Any] = lambda record: None,
    dumps: Callable[[Any], bytes] | None = None,
    with_masks: bool = True,
) -> Path:
    """As `data_process.py` and `folder2lmdb.py` of CRIS: `masks/refcoco/ID.png` and `lmdb/refcoco/SPLIT.lmdb`.

    `change`: called on each record before it is written. `dumps`: serialises instead of pickle.
    """
    import lmdb

    source, dumps = _source(root), dumps or (lambda value: pickle.dumps(value, protocol))
    (root / "lmdb" / "refcoco").mkdir(parents=True)
    for split in SPLITS:
        path = root / "lmdb" / "refcoco" / f"{split}.lmdb"
        with lmdb.open(str(path), subdir=False, map_size=1 << 26) as db, db.begin(write=True) as transaction:
            entries = _references(source, split)
            for number, entry in enumerate(entries):
                ref = entry["ref"]
                mask = root / "masks" / "refcoco" / f"{ref.ref_id}.png"
                save_mask(entry["mask"], mask)
                record = {
                    "img": entry["file"].read_bytes(),
                    "mask": mask.read_bytes(),
                    "cat": 0,
                    "seg_id": ref.ref_id,
                    "img_name": ref.file_name,
                    "num_sents": len(ref.sentences),
                    "sents": list(ref.sentences),
                }
                change(record)
                transaction.put(str(number).encode(), dumps(record))
            transaction.put(b"__keys__", dumps([str(number).encode() for number in range(len(entries))]))
            transaction.put(b"__len__", dumps(len(entries)))
    if not with_masks:
        shutil.rmtree(root / "masks")
    return root


def parquet_rows(root: Path) -> list[dict[str, Any]]:
    """The rows of `jxu124/refcoco`, as its dataset card declares them, in the order of the REFER file."""
    refs = pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())
    instances = json.loads((root / "refcoco" / "instances.json").read_text())
    annotations = {ann["id"]: ann for ann in instances["annotations"]}
    images = {image["id"]: image for image in instances["images"]}
    rows = []
    for ref in refs:
        image = images[ref["image_id"]]
        rows.append(
            {
                **ref,
                "raw_anns": json.dumps(annotations[ref["ann_id"]]),
                "raw_image_info": json.dumps(image),
                "raw_sentences": json.dumps(ref["sentences"]),
                "image_path": f"coco/train2014/{image['file_name']}",
                "bbox": [0.0, 0.0, 1.0, 1.0],
                "captions": [sentence["sent"] for sentence in ref["sentences"]],
                "global_image_id": f"coco.{ref['image_id']}",
                "anns_id": f"refcoco.{ref['ann_id']}",
            }
        )
    return rows


def make_parquet_tree(root: Path, change: Callable[[list[dict[str, Any]]], Any] = lambda rows: None) -> Path:
    """As the hub stores it: `data/train-00000-of-00001.parquet` and so on; "test" is testA there, "validation" val."""
    import pyarrow
    from pyarrow import parquet

    source = _source(root)
    rows = parquet_rows(source)
    change(rows)
    (root / "data").mkdir()
    for split, name in {"train": "train", "val": "validation", "testA": "test", "testB": "testB"}.items():
        table = pyarrow.Table.from_pylist([row for row in rows if row["split"] == split])
        parquet.write_table(table, root / "data" / f"{name}-00000-of-00001.parquet")
    shutil.copytree(source / IMAGE_FOLDER, root / "coco" / "train2014")
    return root


def make_grefs_tree(root: Path, change: Callable[[list[dict[str, Any]], dict[str, Any]], Any] | None = None) -> Path:
    """As gRefCOCO: the first reference of each image names two objects, the second none, the third one."""
    source = _source(root)
    refs = pickle.loads((source / "refcoco" / "refs(unc).p").read_bytes())
    instances = json.loads((source / "refcoco" / "instances.json").read_text())
    for ref in refs:
        ann_id = ref["ann_id"]
        ref["ann_id"] = {1: [ann_id, ann_id + 1], 2: [-1], 0: [ann_id]}[ann_id % 10 % 3]
        ref["no_target"] = ref["ann_id"] == [-1]
        ref["category_id"] = [-1] if ref["no_target"] else [1] * len(ref["ann_id"])
        for ann in instances["annotations"]:
            ann["iscrowd"] = 0
    if change:
        change(refs, instances)
    (root / "grefcoco").mkdir()
    (root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(refs))
    (root / "grefcoco" / "instances.json").write_text(json.dumps(instances))
    shutil.copytree(source / IMAGE_FOLDER, root / "images" / "train2014")
    return root


def make_folder_tree(root: Path, change: Callable[[dict[str, Any]], Any] = lambda row: None) -> Path:
    """As README tells people to lay out their own: `images/`, `masks/`, `train.jsonl`, `val.jsonl` and so on."""
    source = _source(root)
    shutil.copytree(source / IMAGE_FOLDER, root / "images")
    for split in SPLITS:
        with (root / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for entry in _references(source, split):
                ref = entry["ref"]
                save_mask(entry["mask"], root / "masks" / f"{ref.ref_id}.png")
                row = {"image": ref.file_name, "mask": f"{ref.ref_id}.png", "sentences": list(ref.sentences)}
                change(row)
                file.write(json.dumps(row) + "\n")
    return root


def make_coco_tree(
    root: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None, *, images: str = "images"
) -> Path:
    """As tools for labelling export COCO: `annotations/instances_SPLIT.json`, here with the sentences in each one."""
    source = _source(root)
    refs = pickle.loads((source / "refcoco" / "refs(unc).p").read_bytes())
    instances = json.loads((source / "refcoco" / "instances.json").read_text())
    said = {ref["ann_id"]: ref for ref in refs}
    (root / "annotations").mkdir()
    for split in SPLITS:
        rows = [
            annotation | {"iscrowd": 0, "sentences": said[annotation["id"]]["sentences"]}
            for annotation in instances["annotations"]
            if said[annotation["id"]]["split"] == split
        ]
        content = {"info": {}, "images": instances["images"], "categories": [{"id": 1, "name": "block"}]}
        content["annotations"] = rows
        change(content)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    shutil.copytree(source / IMAGE_FOLDER, root / images)
    return root


def make_labelme_tree(root: Path) -> Path:
    """As LabelMe: a JSON file beside each picture, in folders of splits; the red block in two parts, blue as a mask."""
    source = _source(root)
    instances = json.loads((source / "refcoco" / "instances.json").read_text())
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    for split in SPLITS:
        (root / split).mkdir()
        pictures: dict[str, list[Any]] = {}
        for number, entry in enumerate(_references(source, split)):
            shape = {"label": "block", "description": "\n".join(entry["ref"].sentences), "group_id": number}
            polygons = annotations[_ann_id(source, entry["ref"].ref_id)]["segmentation"]
            shapes = pictures.setdefault(entry["ref"].file_name, [])
            if isinstance(polygons, list):
                for flat in polygons:
                    points = [list(point) for point in zip(flat[::2], flat[1::2], strict=True)]
                    shapes.append(shape | {"shape_type": "polygon", "points": points})
            else:
                rows, columns = np.nonzero(entry["mask"])
                top, left, bottom, right = rows.min(), columns.min(), rows.max(), columns.max()
                part = io.BytesIO()
                Image.fromarray(entry["mask"][top : bottom + 1, left : right + 1]).save(part, "PNG")
                points = [[float(left), float(top)], [float(right), float(bottom)]]
                encoded = base64.b64encode(part.getvalue()).decode()
                shapes.append(shape | {"shape_type": "mask", "points": points, "mask": encoded})
        for name, shapes in pictures.items():
            height, width = Image.open(source / IMAGE_FOLDER / name).size[::-1]
            row = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"..\\pictures\\{name}"}
            row |= {"imageData": None, "imageHeight": height, "imageWidth": width}
            (root / split / f"{Path(name).stem}.json").write_text(json.dumps(row))
    shutil.copytree(source / IMAGE_FOLDER, root / "pictures")
    return root


def _ann_id(root: Path, ref_id: int | str) -> int:
    refs = pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())
    return next(ref["ann_id"] for ref in refs if ref["ref_id"] == ref_id)


def make_cvat_tree(root: Path) -> Path:
    """As a project of CVAT: one `annotations.xml` with subsets, pictures in `images/SUBSET`; blue blocks as masks."""
    source = _source(root)
    instances = json.loads((source / "refcoco" / "instances.json").read_text())
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    top = ElementTree.Element("annotations")
    ElementTree.SubElement(top, "version").text = "1.1"
    for split in SPLITS:
        rows: dict[str, ElementTree.Element] = {}
        (root / "images" / split).mkdir(parents=True)
        for number, entry in enumerate(_references(source, split), 1):
            name, mask = entry["ref"].file_name, entry["mask"]
            sizes = {"height": str(mask.shape[0]), "width": str(mask.shape[1])}
            if name not in rows:
                rows[name] = ElementTree.SubElement(top, "image", {"name": name, "subset": split, **sizes})
                shutil.copyfile(entry["file"], root / "images" / split / name)
            polygons = annotations[_ann_id(source, entry["ref"].ref_id)]["segmentation"]
            for shape in _cvat_shapes(polygons, mask):
                shape.attrib |= {"label": "block", "occluded": "0", "group_id": str(number)}
                ElementTree.SubElement(shape, "attribute", {"name": "Phrase"}).text = "\n".join(entry["ref"].sentences)
                rows[name].append(shape)
    ElementTree.ElementTree(top).write(root / "annotations.xml", "utf-8", xml_declaration=True)
    return root


def _cvat_shapes(polygons: Any, mask: np.ndarray) -> list[ElementTree.Element]:
    if isinstance(polygons, list):
        texts = [";".join(f"{x},{y}" for x, y in zip(flat[::2], flat[1::2], strict=True)) for flat in polygons]
        return [ElementTree.Element("polygon", {"points": text}) for text in texts]
    rows, columns = np.nonzero(mask)
    top, left = rows.min(), columns.min()
    part = mask[top : rows.max() + 1, left : columns.max() + 1]
    changes = np.flatnonzero(np.diff(np.concatenate(([False], part.ravel(), [False])))).tolist()
    runs = np.diff([0, *changes, part.size] if changes[-1] < part.size else [0, *changes]).tolist()
    place = {"left": left, "top": top, "height": part.shape[0], "width": part.shape[1], "rle": str(runs)[1:-1]}
    return [ElementTree.Element("mask", {key: str(value) for key, value in place.items()})]


MAKERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "refer": ("refcoco", make_refer_tree),
    "lmdb": ("refcoco", make_lmdb_tree),
    "parquet": ("refcoco", make_parquet_tree),
    "grefs": ("grefcoco", make_grefs_tree),
    "folder": ("folder", make_folder_tree),
    "coco": ("folder", make_coco_tree),
    "labelme": ("folder", make_labelme_tree),
    "cvat": ("folder", make_cvat_tree),
}
"""Layout -> name of its data set, and what makes it."""
LIBRARIES = {"lmdb": "lmdb", "parquet": "pyarrow"}
"""Layout -> the optional library that it needs."""
