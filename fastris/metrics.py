"""Scores of referring segmentation, all computed from per-expression intersections and unions.

Papers report two different numbers as "IoU", so neither goes by that name here:

- mIoU: the mean over expressions of intersection / (union + 1e-6). CRIS reports this one.
- oIoU: the sum of intersections over the sum of unions; large objects weigh more. Many later papers report this one.
- Pr@X: the share of expressions whose IoU lies strictly above X %.

Where truth and prediction are both empty the union is 0, and the published formula gives IoU 0 (not 1). It stays so,
because the published numbers are made that way; `Scores.empty` counts these expressions. (The built-in data sets refuse
empty masks.)
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

PRECISION_LEVELS = (50, 60, 70, 80, 90)
EPSILON = 1e-6
"""Added to the union by the published code, in pixels."""


@dataclass(frozen=True)
class Scores:
    """What one evaluation found, with everything needed to know which numbers it may be compared to.

    Attributes:
        mIoU, oIoU: see the module's docstring; fractions of 1.
        precision: {50: Pr@50, ..., 90: Pr@90}; fractions of 1.
        expressions: number of sentences scored.
        empty: how many of them had neither a true nor a predicted pixel (they count as IoU 0).
        rule: the name of the prediction and scoring rule, a key of `fastris.evaluate.RULES`.
        dataset, split: what was scored.
        sentences: "all" sentences of each object, or only the "first".
    """

    mIoU: float
    oIoU: float
    precision: dict[int, float]
    expressions: int
    empty: int
    rule: str
    dataset: str
    split: str
    sentences: str

    @property
    def conditions(self) -> str:
        """What the numbers hold for, for instance "rule cris, refcoco val, all sentences"."""
        which = {"all": "all sentences", "first": "first sentences"}.get(self.sentences, self.sentences)
        return f"rule {self.rule}, {self.dataset} {self.split}, {which}"

    def as_dict(self) -> dict[str, Any]:
        """A flat dict for JSON or CSV: `Pr@50` ... `Pr@90` beside the other fields; fractions of 1."""
        content = asdict(self)
        precision = content.pop("precision")
        head = {"mIoU": content.pop("mIoU"), "oIoU": content.pop("oIoU")}
        return head | {f"Pr@{level}": value for level, value in precision.items()} | content

    def __str__(self) -> str:
        """One line, in percent as in papers: `mIoU 69.52 %  ...  [rule cris, refcoco val, all sentences]`."""
        precision = "  ".join(f"Pr@{level} {100 * value:.2f}" for level, value in self.precision.items())
        head = f"mIoU {100 * self.mIoU:.2f} %  oIoU {100 * self.oIoU:.2f} %  {precision}"
        empty = f"  ({self.empty} without a true or predicted pixel, counted as 0)" if self.empty else ""
        return f"{head}  [{self.conditions}]  {self.expressions} expressions{empty}"


def score(
    intersections: Sequence[int] | np.ndarray,
    unions: Sequence[int] | np.ndarray,
    *,
    rule: str,
    dataset: str,
    split: str,
    sentences: str,
) -> Scores:
    """Scores from the intersections and unions of N expressions, in pixels.

    Raises:
        ValueError: no expressions, lengths that differ, or an intersection that is negative or larger than its union.
    """
    inter, union = np.asarray(intersections, dtype=np.int64), np.asarray(unions, dtype=np.int64)
    if inter.shape != union.shape or inter.ndim != 1:
        raise ValueError(
            f"intersections and unions must be two lists of one length, got {inter.shape} and {union.shape}"
        )
    if not len(inter):
        raise ValueError("intersections is empty: there is no expression to score")
    if (inter < 0).any() or (inter > union).any():
        worst = int(np.argmax((inter < 0) | (inter > union)))
        raise ValueError(
            f"intersections[{worst}]={inter[worst]} must lie between 0 and its union, which is {union[worst]}"
        )
    iou = per_sample_iou(inter, union)
    total = int(union.sum())
    return Scores(
        mIoU=float(iou.mean()),
        oIoU=int(inter.sum()) / total if total else 0.0,
        precision={level: float((iou > level / 100).mean()) for level in PRECISION_LEVELS},
        expressions=len(inter),
        empty=int((union == 0).sum()),
        rule=rule,
        dataset=dataset,
        split=split,
        sentences=sentences,
    )


def overlap(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Intersection and union, in pixels, of two masks (H, W) bool.

    Raises:
        ValueError: the masks differ in size.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction is {prediction.shape}, but truth is {truth.shape}; both must have the image's size"
        )
    return int(np.count_nonzero(prediction & truth)), int(np.count_nonzero(prediction | truth))


def per_sample_iou(intersections: np.ndarray, unions: np.ndarray) -> np.ndarray:
    """IoU (N,) float64 of N expressions by the published formula, intersection / (union + 1e-6)."""
    return np.asarray(intersections, dtype=np.float64) / (np.asarray(unions, dtype=np.float64) + EPSILON)


def batch_iou(logits: Tensor, target: Tensor, threshold: float = 0.35) -> Tensor:
    """The IoU that training shows: mean over the batch, at the logits' size. A scalar on the logits' device.

    It is no evaluation result: the maps are small, and every pixel that the soft target (B, 1, h, w) touches counts as
    the object. `logits` (B, 1, h, w) are cut after the sigmoid. Source: published `trainMetricGPU`.
    """
    prediction = logits.float().sigmoid().flatten(1) >= threshold
    truth = target.flatten(1) > 0
    inter = (prediction & truth).sum(dim=1)
    union = (prediction | truth).sum(dim=1)
    return (inter / (union + EPSILON)).mean()


def read_per_sample(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Intersections and unions, (N,) int64 each, of an evaluation's `per_sample.csv`; :func:`score` takes them."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"intersection", "union"} <= rows[0].keys():
        raise ValueError(
            f"{path} must be a per_sample.csv with the columns intersection and union, and at least one row"
        )
    return (
        np.array([int(row["intersection"]) for row in rows], dtype=np.int64),
        np.array([int(row["union"]) for row in rows], dtype=np.int64),
    )
