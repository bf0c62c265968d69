"""Write predictions to files: three images for each phrase, and predictions.json for the whole folder."""

from __future__ import annotations

import json
import os
import re
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fastris.inference.segmenter import Prediction
from fastris.runtime.plain import json_text
from fastris.runtime.storage import replacing


def write_phrase(prediction: Prediction, i: int, out: Path, *, image: str, model: str) -> dict[str, Any]:
    """Write the mask, probability and overlay of phrase ``i`` into the folder ``out`` as PNG, all three or none.

    ``image``, ``model``: the sources of picture and model, for the record. Returns the entry for predictions.json.
    """
    import cv2
    from PIL import Image

    from fastris.pictures.overlay import view

    phrase, mask, probability, score = prediction[i]
    name = _file_name(image, i, phrase)
    numbers = {"share": float(mask.mean()), "score": score, "highest_probability": float(probability.max())}
    levels = cv2.convertScaleAbs(probability, alpha=255)
    del probability  # the largest map
    pictures = {
        "overlay": view(prediction.image, [(i, phrase, mask)]),
        "probability": Image.fromarray(levels),
        "mask": Image.fromarray(np.multiply(mask, np.uint8(255), out=mask.view(np.uint8))),
    }
    with ExitStack() as files:
        for kind, picture in pictures.items():
            picture.save(files.enter_context(replacing(out / f"{name}_{kind}.png")), format="PNG")
    return {
        "image": image,
        "phrase": phrase,
        "model": model,
        "threshold": prediction.threshold,
        **numbers,
        **{kind: f"{name}_{kind}.png" for kind in ("mask", "probability", "overlay")},
    }


def _file_name(image: str, i: int, phrase: str) -> str:
    """The beginning of the names of phrase ``i``'s files: short enough for a file system, however long the image's."""
    stem = Path(image).stem[:80]
    while len(os.fsencode(stem)) > 120:
        stem = stem[:-1]
    slug = re.sub(r"[^a-z0-9]+", "-", phrase.lower())[:40].strip("-") or "phrase"
    return f"{stem}_{i + 1}_{slug}"


def read_records(out: Path) -> list[dict[str, Any]]:
    """Read the entries that earlier runs wrote to the folder's predictions.json; [] where there is no such file.

    Raises FileExistsError where ``out`` is a file, and ValueError where fastris did not write predictions.json.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out={out} is a file; give a folder")
    path = out / "predictions.json"
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
    with replacing(out / "predictions.json") as temporary:
        temporary.write_text(json_text(kept + records) + "\n", encoding="utf-8")
