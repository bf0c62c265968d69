"""A CRIS small enough to train for a few steps in a test, and data sets to go with it."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from model_helpers import small_fields
from PIL import Image

from fastris.commands.assemble import assemble
from fastris.commands.train import TrainConfig
from fastris.data import Reference, ReferringDataset
from fastris.data.scenes.dataset import SyntheticExpressions
from fastris.models.cris.config import CRISConfig
from fastris.training.parts import Parts

MODEL = small_fields(
    {"vocab_size": 49408, "transformer_width": 16},
    vis_dim=16,
    fpn_out=(16, 16, 48),
    num_head=2,
    dropout=0.2,
    word_len=12,
)
"""The tiny model of the tests, for sentences of real words, and the narrower for it."""


def model_config(**changes: Any) -> CRISConfig:
    return CRISConfig.from_dict(MODEL | changes)


def train_config(folder: Path, **changes: Any) -> TrainConfig:
    """Two epochs of four batches, without worker processes, validated after each."""
    shape = {name: value for name, value in MODEL.items() if name not in ("input_size", "word_len")}
    defaults: dict[str, Any] = {
        "dataset": "synthetic",
        "input_size": MODEL["input_size"],
        "word_len": MODEL["word_len"],
        "epochs": 2,
        "batch_size": 3,
        "base_lr": 1e-3,
        "milestones": (1,),
        "workers": 0,
        "workers_val": 0,
        "pictures": 0,
        "device": "cpu",
        "output_folder": folder,
        "extra": shape,
    }
    return TrainConfig(**(defaults | changes))


def train_set() -> SyntheticExpressions:
    """12 references, so 4 batches of 3."""
    return SyntheticExpressions("train", scenes=4, size=64)


def val_set() -> SyntheticExpressions:
    return SyntheticExpressions("val", scenes=2, size=64)


def parts_of(config: TrainConfig, data: ReferringDataset | None = None) -> Parts:
    """The parts of a new run as the options say, on :func:`train_set` or on the data given; without validation."""
    return assemble(dataclasses.replace(config, evaluate=False), data or train_set())


class Boxes(ReferringDataset):
    """Images of awkward sizes, each with two objects (rectangles), which have one and three sentences."""

    name, split = "boxes", "val"
    sizes = ((50, 90), (120, 70), (33, 33))

    def __init__(self) -> None:
        self.skipped: dict[str, list[int | str]] = {"image is missing": ["ref 7"]}

    def __len__(self) -> int:
        return 2 * len(self.sizes)

    def reference(self, index: int) -> Reference:
        number, which = divmod(index, 2)
        many = (
            f"the left box of picture {number}",
            "left one",
            "that long thing on the far left side by the wall there",
        )
        return Reference(100 + index, f"image {number}", ("right one",) if which else many, f"{number}.png")

    def image(self, index: int) -> np.ndarray:
        height, width = self.sizes[index // 2]
        return np.random.default_rng(index // 2).integers(0, 256, (height, width, 3), dtype=np.uint8)

    def mask(self, index: int) -> np.ndarray:
        height, width = self.sizes[index // 2]
        mask = np.zeros((height, width), dtype=bool)
        start = width // 2 if index % 2 else 3
        mask[height // 4 : height // 2, start : start + width // 3] = True
        return mask


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV log without what may differ between two equal runs: the clock."""
    with path.open(newline="", encoding="utf-8") as file:
        timing = ("time", "images_per_s", "memory_mib")
        return [{k: v for k, v in row.items() if k not in timing} for row in csv.DictReader(file)]


def drawn_folder(folder: Path, pictures: int, split: str = "train") -> Path:
    """A folder of pictures as people have them: `SPLIT.jsonl`, images/ and masks/, three objects a picture."""
    data = SyntheticExpressions("train", scenes=pictures, size=64)
    lines = []
    for index in range(len(data)):
        reference = data.reference(index)
        names = {"image": f"{reference.image_id}.png", "mask": f"{index}.png"}
        arrays = {"image": data.image(index), "mask": data.mask(index).astype(np.uint8) * 255}
        for kind, name in names.items():
            (folder / f"{kind}s").mkdir(parents=True, exist_ok=True)
            Image.fromarray(arrays[kind]).save(folder / f"{kind}s" / name)
        lines.append(json.dumps(names | {"sentences": reference.sentences}))
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
