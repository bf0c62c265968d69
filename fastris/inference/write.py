"""Write predictions to files: pictures or shapes of each phrase, and tables of the whole folder."""

from __future__ import annotations

import json
import os
import unicodedata
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fastris.inference.outlines import polygons_of, rle_of
from fastris.inference.prediction import Prediction, Segment
from fastris.runtime.plain import json_text
from fastris.runtime.storage import replacing
from fastris.version import __version__

FORMATS = ("png", "rle", "coco", "polygon", "boxes")
"""How masks are written: as three pictures each, or as run lengths, a COCO file, outlines or boxes in the tables."""

TABLE, LINES, COCO = "predictions.json", "predictions.jsonl", "predictions.coco.json"


def write_phrase(
    prediction: Prediction, i: int, out: Path, *, image: str, model: str, stem: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the mask, probability and overlay of phrase ``i`` into the folder ``out`` as PNG, all three or none.

    ``image``, ``model``: the sources of picture and model, for the record; ``stem``: what the files' names begin with,
    else the image's name. Returns the entry for predictions.json, and what predictions.jsonl says of the phrase.
    """
    import cv2
    from PIL import Image

    from fastris.pictures.overlay import view

    phrase, mask, probability, score = segment = prediction[i]
    name = _file_name(stem or Path(image).stem, i, phrase)
    numbers = {"share": float(mask.mean()), "score": score, "highest_probability": float(probability.max())}
    line = _line(prediction, i, segment)
    levels = cv2.convertScaleAbs(probability, alpha=255)
    del probability, segment  # the largest map
    pictures = {
        "overlay": view(prediction.image, [(i, phrase, mask)]),
        "probability": Image.fromarray(levels),
        "mask": Image.fromarray(np.multiply(mask, np.uint8(255), out=mask.view(np.uint8))),
    }
    with ExitStack() as files:
        for kind, picture in pictures.items():
            picture.save(files.enter_context(replacing(out / f"{name}_{kind}.png")), format="PNG")
    names = {kind: f"{name}_{kind}.png" for kind in ("mask", "probability", "overlay")}
    record = {"image": image, "phrase": phrase, "model": model, "threshold": prediction.threshold, **numbers, **names}
    return record, {"image": image, **line, **names}


def describe_phrase(prediction: Prediction, i: int, form: str, *, image: str) -> dict[str, Any]:
    """What predictions.jsonl says of phrase ``i`` in a format that is no picture, mask included."""
    segment = prediction[i]
    line = {"image": image, **_line(prediction, i, segment)}
    if form in ("rle", "coco"):
        line["rle"] = rle_of(segment.mask)
    elif form == "polygon":
        line["polygons"] = [outline.tolist() for outline in polygons_of(segment.mask)]
    return line


def _line(prediction: Prediction, i: int, segment: Segment) -> dict[str, Any]:
    height, width = segment.mask.shape
    return {
        "phrase": segment.phrase,
        "found": bool(prediction.found[i]),
        "presence": round(float(prediction.presence[i]), 4),
        "score": round(segment.score, 4),
        "box": list(segment.box),
        "area": segment.area,
        "share": round(segment.area / (height * width), 6),
        "highest_probability": round(float(segment.probability.max()), 4),
        "width": width,
        "height": height,
    }


def _file_name(stem: str, i: int, phrase: str) -> str:
    """The beginning of the names of phrase ``i``'s files: short enough for a file system, however long the image's."""
    stem = _shortened(stem[:80], 120)
    letters = "".join(each if unicodedata.category(each)[0] in "LMN" else " " for each in _composed(phrase).lower())
    slug = _shortened("-".join(letters.split())[:40], 80).strip("-") or "phrase"
    return f"{stem}_{i + 1}_{slug}"


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _shortened(text: str, most: int) -> str:
    while len(os.fsencode(text)) > most:
        text = text[:-1]
    return text


class Lines:
    """predictions.jsonl: a line of each run's settings, then a line of each of its phrases, written as they come.

    A run adds to what earlier ones wrote. Raises FileExistsError where ``out`` is a file, and ValueError where fastris
    did not write the file that is there.
    """

    def __init__(self, out: Path):
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"out={out} is a file; give a folder")
        self.path = out / LINES
        self.begun = self.path.exists() and self.path.stat().st_size > 0
        if self.begun and not _is_ours(self.path):
            raise ValueError(f"{self.path} was not written by `fastris predict`; move it away or give another out=")

    def begin(self, settings: dict[str, Any]) -> None:
        """Write the line of the run's settings."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.add({"run": {"fastris": __version__, **settings}})

    def add(self, line: dict[str, Any]) -> None:
        """Write a line; a half one, which a full disk left, is ended before."""
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json_text(line, indent=None).encode("utf-8") + b"\n")


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    try:
        return isinstance(json.loads(first)["run"]["fastris"], str)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def write_coco(out: Path, lines: list[dict[str, Any]], settings: dict[str, Any]) -> Path:
    """Write the lines of a run, of the format coco, as a COCO file: a category for each phrase. Returns its path."""
    phrases = list(dict.fromkeys(line["phrase"] for line in lines))
    images = {line["image"]: (line["width"], line["height"]) for line in lines}
    numbers = {image: number for number, image in enumerate(images, 1)}
    annotations = [
        {
            "id": number,
            "image_id": numbers[line["image"]],
            "category_id": phrases.index(line["phrase"]) + 1,
            "segmentation": line["rle"],
            "bbox": [left, top, right - left, bottom - top],
            "area": line["area"],
            "iscrowd": 0,
            "score": line["score"],
            "presence": line["presence"],
        }
        for number, line in enumerate((line for line in lines if line["area"]), 1)
        for left, top, right, bottom in (line["box"],)
    ]
    content = {
        "info": {"description": "fastris predict", **settings},
        "images": [
            {"id": numbers[image], "file_name": image, "width": width, "height": height}
            for image, (width, height) in images.items()
        ],
        "categories": [{"id": number, "name": phrase} for number, phrase in enumerate(phrases, 1)],
        "annotations": annotations,
    }
    with replacing(out / COCO) as temporary:
        temporary.write_text(json_text(content, indent=None) + "\n", encoding="utf-8")
    return out / COCO


def read_records(out: Path) -> list[dict[str, Any]]:
    """Read the entries that earlier runs wrote to the folder's predictions.json; [] where there is no such file.

    Raises FileExistsError where ``out`` is a file, and ValueError where fastris did not write predictions.json.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out={out} is a file; give a folder")
    path = out / TABLE
    if not path.exists():
        return []
    try:
        records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(records, list) and all(isinstance(r["mask"] + r["image"], str) for r in records):
            return records
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{path} was not written by `fastris predict`; move it away or give another out=")


def write_records(out: Path, known: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    """Write predictions.json: ``records``, and the ``known`` entries whose files they have not replaced.

    So several runs can share a folder. Warns where a picture's files were replaced by those of another with its name.
    """
    written = {record["mask"]: record["image"] for record in records}
    kept = [record for record in known if record["mask"] not in written]
    replaced = {record["image"] for record in known if record["image"] != written.get(record["mask"], record["image"])}
    for image in sorted(replaced):
        warnings.warn(f"replaced pictures of {image}, which has the same name; give another out=", stacklevel=2)
    with replacing(out / TABLE) as temporary:
        temporary.write_text(json_text(kept + records) + "\n", encoding="utf-8")
