"""A share of the training pictures, held out where there is no validation split, and the record of which they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastris.data.base import DataError, Reference, ReferringDataset, shown
from fastris.data.samples import number_of

HELD_OUT = "held_out"
"""The split's name, for `fastris eval split=held_out`."""
RECORD = "held_out.json"
"""The file in a run's folder that says which pictures they are."""
MAX_RECORD = 1 << 30  # bytes


class Part(ReferringDataset):
    """Some references of another data set, in their order there, under the name of a split of their own."""

    def __init__(self, whole: ReferringDataset, indices: Sequence[int], split: str):
        self.whole, self.indices, self.split = whole, list(indices), split
        self.name, self.skipped = whole.name, whole.skipped

    def __len__(self) -> int:
        return len(self.indices)

    def reference(self, index: int) -> Reference:
        return self.whole.reference(self.indices[index])

    def image(self, index: int) -> np.ndarray:
        return self.whole.image(self.indices[index])

    def mask(self, index: int) -> np.ndarray:
        return self.whole.mask(self.indices[index])


def hold_out(whole: ReferringDataset, share: float) -> tuple[Part, Part]:
    """(the rest, the part held out): about this share of the images, at least one, with all that is about them.

    Which images is decided by their ids alone: the same on every machine, in any order of the references, and nearly
    the same when pictures are added.

    Raises:
        DataError: fewer than two images.
    """
    groups = {whole.reference(group[0]).image_id: group for group in whole.by_image()}
    if len(groups) < 2:
        raise DataError(
            f"split={share} needs two images or more, and {whole.name} {whole.split} has {len(groups)}; add some, give "
            "a validation split, or train with evaluate=false"
        )
    count = min(max(1, round(share * len(groups))), len(groups) - 1)
    chosen = set(sorted(groups, key=number_of)[:count])
    held = sorted(index for image, group in groups.items() if image in chosen for index in group)
    rest = sorted(set(range(len(whole))) - set(held))
    return Part(whole, rest, whole.split), Part(whole, held, HELD_OUT)


def record_of(held: Part) -> str:
    """The text of :data:`RECORD`."""
    images = list(dict.fromkeys(held.reference(index).image_id for index in range(len(held))))
    record = {"dataset": held.name, "split": held.whole.split, "references": len(held), "images": images}
    return json.dumps(record, indent=1) + "\n"


def find_record(model: str) -> Path | None:
    """The record beside weights, or in a run's folder; None where there is none."""
    path = Path(model).expanduser()
    record = (path if path.is_dir() else path.parent) / RECORD
    return record if record.is_file() else None


def split_of(record: Path) -> str:
    """The split that a record's pictures were held out of. Raises DataError for a file that is no such record."""
    return str(_read(record)["split"])


def held_out_again(whole: ReferringDataset, record: Path) -> Part:
    """What a run has held out, of the same data.

    Raises:
        DataError: it is not all there, or the record is none.
    """
    content = _read(record)
    images = set(content["images"])
    held = [index for index in range(len(whole)) if whole.reference(index).image_id in images]
    if len(held) != content["references"] or whole.name != content["dataset"]:
        raise DataError(
            f"{record} is of {content['references']} references of {shown(content['dataset'])}, and {whole.name} "
            f"{whole.split} has {len(held)} of them; give the data that the run was trained on"
        )
    return Part(whole, held, HELD_OUT)


def _read(record: Path) -> dict[str, Any]:
    from fastris.data.formats.records import read_json

    content = read_json(record, MAX_RECORD)
    kinds = {"dataset": str, "split": str, "references": int, "images": list}
    fits = type(content) is dict and all(type(content.get(name)) is kind for name, kind in kinds.items())
    if not fits or any(type(image) not in (int, str) for image in content["images"]):
        raise DataError(f"{record} is not what a training run with split=... writes; train again, or restore it")
    found: dict[str, Any] = content
    return found
