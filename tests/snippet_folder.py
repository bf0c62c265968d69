"""The folder in which the snippets of README.md and docs/ run: small files under the names that the pages use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image
from training_helpers import drawn_folder

from fastris.commands.cli import main
from fastris.data.scenes.dataset import REFERENCES, SyntheticExpressions
from fastris.weights.shipped import shipped_model

PICTURES = ("photo.jpg", "cat.jpg", "photos/a.jpg", "photos/b.jpg")


def make_folder(folder: Path) -> Path:
    """Fill `folder`.

    photo.jpg, cat.jpg, photos/     drawn scenes
    my_data/                        8 of them with three objects each, as README lays out a reader's own pictures
    my_labels/                      two of them with COCO's labels, as tools save them
    questions.jsonl                 pictures and phrases, as `fastris predict` takes them
    best_model.pth, demo/model      the tiny model that comes with fastris, as a checkpoint and as a folder
    """
    scenes = SyntheticExpressions("val", scenes=len(PICTURES), size=96)
    for number, name in enumerate(PICTURES):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(scenes.image(REFERENCES * number)).save(path, quality=95)
    for split, pictures in (("train", 8), ("val", 2)):
        drawn_folder(folder / "my_data", pictures, split)
    _label(folder / "my_labels", scenes)
    asked = [{"image": name, "phrases": ["the red circle", "the left one"]} for name in PICTURES[:2]]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    shutil.copytree(shipped_model(), folder / "demo" / "model")
    assert main(["convert", str(shipped_model()), str(folder / "best_model.pth")]) == 0
    return folder


def _label(folder: Path, scenes: SyntheticExpressions) -> None:
    """Two pictures, each with two boxes that have the same label."""
    (folder / "images").mkdir(parents=True)
    annotations = []
    for number in (1, 2):
        Image.fromarray(scenes.image(REFERENCES * number)).save(folder / "images" / f"{number}.png")
        for left in (5, 50):
            corners = [left, 5, left + 30, 5, left + 30, 60, left, 60]
            annotations.append({"image_id": number, "category_id": 1, "iscrowd": 0, "segmentation": [corners]})
    sizes = [{"id": number, "file_name": f"{number}.png", "width": 96, "height": 96} for number in (1, 2)]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number
    content = {"images": sizes, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (folder / "train.json").write_text(json.dumps(content))
