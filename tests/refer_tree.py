"""A small data set in the REFER layout on disk, as a stranger would lay it out: real JPEGs, polygons, crowds."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REFS_FILES = {
    "refcoco": ("refcoco", "refs(unc).p", ("train", "val", "testA", "testB")),
    "refcoco+": ("refcoco+", "refs(unc).p", ("train", "val", "testA", "testB")),
    "refcocog_u": ("refcocog", "refs(umd).p", ("train", "val", "test")),
    "refcocog_g": ("refcocog", "refs(google).p", ("train", "val")),
}
COLOURS = {"red": (220, 30, 30), "green": (30, 190, 40), "blue": (40, 60, 220)}
IMAGE_FOLDER = "images/mscoco/images/train2014"


def make_refer_tree(
    root: Path,
    dataset: str = "refcoco",
    *,
    images_per_split: int = 2,
    size: tuple[int, int] = (72, 96),
    image_folder: str = IMAGE_FOLDER,
    protocol: int = 2,
    grey: bool = False,
    change_refs: Callable[[list[dict[str, Any]]], Any] | None = None,
    change_instances: Callable[[dict[str, Any]], Any] | None = None,
) -> Path:
    """Write a data set of one name and return `root`.

    Every image shows three coloured blocks on grey: a red one (two overlapping polygons), a green one (one polygon)
    and a blue one (a crowd: compressed run lengths in even images, a list of counts in odd ones). Each is a reference
    with three sentences.

    Args:
        root: folder, made if needed.
        dataset: "refcoco", "refcoco+", "refcocog_u" or "refcocog_g".
        images_per_split: images in each split; there are three references per image.
        size: height and width of the first image; each further one is 8 pixels wider.
        image_folder: place of the images under `root`.
        protocol: of the pickle.
        grey: write the images as greyscale JPEGs.
        change_refs, change_instances: called on the data before it is written, to break it in place.
    """
    folder, refs_name, splits = REFS_FILES[dataset]
    images_dir = root / image_folder
    images_dir.mkdir(parents=True, exist_ok=True)
    (root / folder).mkdir(parents=True, exist_ok=True)
    refs: list[dict[str, Any]] = []
    instances: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "block"}]}
    for number in range(images_per_split * len(splits)):
        _add_image(number, splits[number // images_per_split], size, images_dir, grey, refs, instances)
    if change_refs:
        change_refs(refs)
    if change_instances:
        change_instances(instances)
    (root / folder / refs_name).write_bytes(pickle.dumps(refs, protocol))
    (root / folder / "instances.json").write_text(json.dumps(instances))
    return root


def blocks(height: int, width: int) -> dict[str, np.ndarray]:
    """Colour -> (H, W) bool: the block of that colour in an image of this size."""
    masks = {}
    for number, colour in enumerate(COLOURS):
        mask = np.zeros((height, width), bool)
        left = width // 16 + number * width // 3
        mask[height // 4 : 3 * height // 4, left : left + width // 4] = True
        masks[colour] = mask
    return masks


def _add_image(
    number: int,
    split: str,
    size: tuple[int, int],
    images_dir: Path,
    grey: bool,
    refs: list[dict[str, Any]],
    instances: dict[str, Any],
) -> None:
    height, width = size[0], size[1] + 8 * number
    image_id = 581_000 + number
    name = f"COCO_train2014_{image_id:012d}.jpg"
    pixels = np.full((height, width, 3), 128, np.uint8)
    for index, (colour, mask) in enumerate(blocks(height, width).items()):
        pixels[mask] = COLOURS[colour]
        ann_id = 10 * number + index + 1
        crowd = colour == "blue"
        segmentation = _run_lengths(mask, compressed=number % 2 == 0) if crowd else _polygons(mask, colour == "red")
        instances["annotations"].append(
            {
                "id": ann_id,
                "image_id": image_id,
                "category_id": 1,
                "iscrowd": int(crowd),
                "segmentation": segmentation,
                "area": int(mask.sum()),
                "bbox": [0, 0, 1, 1],
            }
        )
        refs.append(_reference(len(refs), ann_id, image_id, name, split, colour))
    instances["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
    image = Image.fromarray(pixels)
    (image.convert("L") if grey else image).save(images_dir / name, quality=95)


def _reference(number: int, ann_id: int, image_id: int, name: str, split: str, colour: str) -> dict[str, Any]:
    place = {"red": "left", "green": "middle", "blue": "right"}[colour]
    sentences = [f"{colour} block", f"the {colour} block on the {place}", f" {place} one "]
    return {
        "ref_id": number,
        "ann_id": ann_id,
        "image_id": image_id,
        "file_name": name.replace(".jpg", f"_{ann_id}.jpg"),
        "split": split,
        "category_id": 1,
        "sent_ids": [3 * number + k for k in range(3)],
        "sentences": [
            {"tokens": sent.split(), "raw": sent.strip().capitalize(), "sent_id": 3 * number + k, "sent": sent}
            for k, sent in enumerate(sentences)
        ],
    }


def _polygons(mask: np.ndarray, overlapping: bool) -> list[list[float]]:
    """The block's outline; as two polygons that share the middle fifth, if `overlapping`."""
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    spans = [(left, right)]
    if overlapping:
        fifth = (right - left) // 5
        spans = [(left, right - 2 * fifth), (left + 2 * fifth, right)]
    return [[float(v) for v in (a, top, b, top, b, bottom, a, bottom)] for a, b in spans]


def _run_lengths(mask: np.ndarray, compressed: bool) -> dict[str, Any]:
    """COCO's code of a mask: runs down the columns, beginning with the number of zeros."""
    size = [int(side) for side in mask.shape]
    if compressed:
        from pycocotools.mask import encode

        return {"size": size, "counts": encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()}
    column = mask.T.ravel()
    changes = np.flatnonzero(np.diff(column)) + 1
    edges = [0, *changes.tolist(), column.size]
    counts = [b - a for a, b in itertools.pairwise(edges)]
    return {"size": size, "counts": [0, *counts] if column[0] else counts}
