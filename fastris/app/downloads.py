"""What the page gives to take home: the files of ``fastris predict``, masks in one zip, and a COCO file."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from fastris.app.visit import Visit
from fastris.inference.write import describe_phrase, write_coco, write_phrase


def write_files(visit: Visit, number: int, threshold: float) -> list[Path]:
    """Write what model ``number``, from 0 on, found: a zip of mask, probability and overlay of each phrase, and COCO.

    Replaces what was written of this model and picture before. Raises ValueError where nothing was asked yet.
    """
    seen = visit.seen[number]
    phrases = [visit.phrases[each] for each in seen.answered(visit.phrases)]
    if not phrases:
        raise ValueError("there are no masks yet: ask for something first")
    prediction = seen.prediction(phrases, threshold)
    model, stem = seen.model.name, Path(visit.name).stem or "picture"
    folder = Path(visit.folder.name) / str(number)
    shutil.rmtree(folder, ignore_errors=True)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    lines = []
    for i in range(len(prediction)):
        write_phrase(prediction, i, pictures, image=visit.name, model=model, stem=stem)
        lines.append(describe_phrase(prediction, i, "coco", image=visit.name))
    which = "" if len(visit.seen) == 1 else f"_model_{'ab'[number]}"
    coco = write_coco(folder, lines, {"model": model, "threshold": threshold})
    coco = coco.rename(folder / f"predictions{which}.coco.json")
    packed = folder / f"masks{which}.zip"
    with zipfile.ZipFile(packed, "w") as archive:  # PNG is compressed already
        for path in sorted(pictures.iterdir()):
            archive.write(path, path.name)
        archive.write(coco, coco.name, zipfile.ZIP_DEFLATED)
    shutil.rmtree(pictures)
    return [packed, coco]
