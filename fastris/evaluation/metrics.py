"""Scores of referring segmentation, all computed from per-expression intersections and unions.

Papers report two different numbers as "IoU", so neither goes by that name here:

- mIoU: the mean over expressions of intersection / (union + 1e-6). CRIS reports this one.
- oIoU: the sum of intersections over the sum of unions; large objects weigh more. Many later papers report this one.
- Pr@X: the share of expressions whose IoU lies strictly above X %.

Where truth and prediction are both empty the union is 0, and the published formula gives IoU 0 (not 1). It stays so,
because the published numbers are made that way; `Scores.empty` counts these expressions.

The details (what is added to the union, whether Pr@X counts X itself) are the rule's, see `rules.py`. A rule that
knows of expressions without a target ("gres") scores those too; mIoU, oIoU and Pr@X are then over the expressions with
a target, and beside them stand

- gIoU: the mean over all expressions of the IoU, which is 1 where "no target" is right and 0 where it is wrong.
- cIoU: the sum of intersections over the sum of unions of all expressions, without a target or with one.
- N-acc: the share of the expressions without a target that were seen to have none.
- T-acc: the share of the expressions with a target that were seen to have one.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastris.evaluation.rules import find_rule

if TYPE_CHECKING:
    from torch import Tensor

PRECISION_LEVELS = (50, 60, 70, 80, 90)
GENERALISED = ("gIoU", "cIoU", "N-acc", "T-acc")
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
        rule: the name of the prediction and scoring rule, a key of `fastris.evaluation.rules.RULES`.
        dataset, split: what was scored.
        sentences: "all" sentences of each object, or only the "first".
        no_target: how many expressions have no target.
        generalised: gIoU, cIoU, N-acc and T-acc as fractions of 1, by those names, if the rule has them; an accuracy
            over no expressions is None.
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
    no_target: int = 0
    generalised: dict[str, float | None] = field(default_factory=dict)

    @property
    def best_by(self) -> float:
        """The score that a training run keeps its best weights by, which its rule names."""
        scores = {"mIoU": self.mIoU, "oIoU": self.oIoU, **self.generalised}
        found = scores.get(find_rule(self.rule).best_by)
        return self.mIoU if found is None else found

    @property
    def conditions(self) -> str:
        """What the numbers hold for, for instance "rule cris, refcoco val, all sentences"."""
        which = {"all": "all sentences", "first": "first sentences"}.get(self.sentences, self.sentences)
        return f"rule {self.rule}, {self.dataset} {self.split}, {which}"

    def as_dict(self) -> dict[str, Any]:
        """A flat dict for JSON or CSV: `Pr@50` ... `Pr@90` beside the other fields; fractions of 1."""
        content = asdict(self)
        precision, generalised = content.pop("precision"), content.pop("generalised")
        head = {"mIoU": content.pop("mIoU"), "oIoU": content.pop("oIoU")}
        return head | {f"Pr@{level}": value for level, value in precision.items()} | generalised | content

    def __str__(self) -> str:
        """One line, in percent as in papers: `mIoU 69.52 %  ...  [rule cris, refcoco val, all sentences]`."""
        precision = "  ".join(f"Pr@{level} {100 * value:.2f}" for level, value in self.precision.items())
        head = f"mIoU {100 * self.mIoU:.2f} %  oIoU {100 * self.oIoU:.2f} %  {precision}"
        for name, value in self.generalised.items():
            head += f"  {name} -" if value is None else f"  {name} {100 * value:.2f} %"
        notes = f", {self.no_target} of them without a target" if self.no_target else ""
        if self.no_target and not self.generalised:
            notes += " (counted as IoU 0; rule=gres knows of them)"
        elif self.empty and not self.generalised:
            notes += f"  ({self.empty} without a true or predicted pixel, counted as 0)"
        return f"{head}  [{self.conditions}]  {self.expressions} expressions{notes}"


def score(
    intersections: Sequence[int] | np.ndarray,
    unions: Sequence[int] | np.ndarray,
    *,
    rule: str,
    dataset: str,
    split: str,
    sentences: str,
    no_target: Sequence[bool] | np.ndarray | None = None,
    rejected: Sequence[bool] | np.ndarray | None = None,
) -> Scores:
    """Scores from the intersections and unions of N expressions, in pixels.

    `no_target` marks the expressions without a target, `rejected` those that the prediction said to have none; None for
    no expression. Intersections and unions are those of :meth:`fastris.evaluation.rules.Rule.compare`.

    Raises:
        ValueError: no expressions, lengths that differ, an intersection that is negative or larger than its union, or
            an unknown rule.
    """
    method = find_rule(rule)
    inter, union = np.asarray(intersections, dtype=np.int64), np.asarray(unions, dtype=np.int64)
    without = np.zeros(len(inter), bool) if no_target is None else np.asarray(no_target, dtype=bool)
    refused = np.zeros(len(inter), bool) if rejected is None else np.asarray(rejected, dtype=bool)
    _check_counts(inter, union, without, refused)
    generalises = method.reject_below is not None
    counted = ~without if generalises else np.ones(len(inter), bool)
    iou = np.where(without & refused, 1.0, per_sample_iou(inter, union, method.epsilon))
    reached = np.greater_equal if method.inclusive else np.greater
    return Scores(
        mIoU=_mean(iou[counted]) or 0.0,
        oIoU=_ratio(inter[counted], union[counted]),
        precision={level: _mean(reached(iou[counted], level / 100)) or 0.0 for level in PRECISION_LEVELS},
        expressions=len(inter),
        empty=int((union == 0).sum()),
        rule=rule,
        dataset=dataset,
        split=split,
        sentences=sentences,
        no_target=int(without.sum()),
        generalised=_generalised(iou, inter, union, without, refused) if generalises else {},
    )


def _check_counts(inter: np.ndarray, union: np.ndarray, *flags: np.ndarray) -> None:
    if inter.shape != union.shape or inter.ndim != 1:
        raise ValueError(
            f"intersections and unions must be two lists of one length, got {inter.shape} and {union.shape}"
        )
    if not len(inter):
        raise ValueError("intersections is empty: there is no expression to score")
    if any(flag.shape != inter.shape for flag in flags):
        raise ValueError(f"no_target and rejected must be lists of {len(inter)} flags, one per expression")
    if (inter < 0).any() or (inter > union).any():
        worst = int(np.argmax((inter < 0) | (inter > union)))
        raise ValueError(
            f"intersections[{worst}]={inter[worst]} must lie between 0 and its union, which is {union[worst]}"
        )


def _generalised(
    iou: np.ndarray, inter: np.ndarray, union: np.ndarray, without: np.ndarray, refused: np.ndarray
) -> dict[str, float | None]:
    """The four numbers of generalised referring segmentation (GRES, CVPR 2023)."""
    values = (_mean(iou), _ratio(inter, union), _mean(refused[without]), _mean(~refused[~without]))
    return dict(zip(GENERALISED, values, strict=True))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _ratio(inter: np.ndarray, union: np.ndarray) -> float:
    total = int(union.sum())
    return int(inter.sum()) / total if total else 0.0


def per_sample_iou(intersections: np.ndarray, unions: np.ndarray, epsilon: float = EPSILON) -> np.ndarray:
    """IoU (N,) float64 of N expressions, intersection / (union + epsilon); 0 where union and epsilon are 0."""
    inter, union = np.asarray(intersections, dtype=np.float64), np.asarray(unions, dtype=np.float64)
    return inter / np.where(union > 0, union + epsilon, 1.0)


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
