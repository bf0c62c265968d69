"""Whether a picture has what a phrase names at all: a score from 0 to 1 beside the mask.

The score is the probability that the ``CELLS`` most probable cells of the model's own map all reach, so that both the
height of the map and the area of its peak decide, put on a scale on which 0.5 is the threshold of the masks::

    presence = sigmoid(slope * (logit(p) - logit(threshold)) + offset)

With the defaults, slope 1 and offset 0, it says how far the map is above what counts as found; it is no measured
frequency. :meth:`Presence.fit` makes it one, of phrases of which you know whether the picture has their object
(J. Platt, "Probabilistic outputs for support vector machines", 1999).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fastris.data.letterbox import Letterbox

CELLS = 4
"""Smallest area that counts, in cells of the model's map: 8 x 8 pixels of the letterboxed square for CRIS."""

FOUND = 0.5
"""Presence above which something is found."""

_LEAST = 1e-6  # probabilities are kept so far from 0 and 1, where logits are infinite


@dataclass(frozen=True)
class Presence:
    """The scale of the presence score; see the module. Raises ValueError for numbers that make no scale."""

    slope: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.slope) and np.isfinite(self.offset) and self.slope > 0):
            raise ValueError(f"presence must have a slope above 0 and a finite offset, got {self}")

    def score(self, probability: float, threshold: float) -> float:
        """The presence of something with this probability, of :func:`peak`, where masks have that threshold."""
        return float(1 / (1 + np.exp(-(self.slope * _evidence(probability, threshold) + self.offset))))

    @classmethod
    def fit(cls, probabilities: Sequence[float], present: Sequence[bool], threshold: float) -> Presence:
        """The scale on which the score of these is the frequency with which things were ``present``.

        ``probabilities``: of :func:`peak`, one a phrase. Raises ValueError unless some are present and some are not,
        and the present ones are the more probable.
        """
        x = np.array([_evidence(probability, threshold) for probability in probabilities])
        truth = np.array(present, dtype=bool)
        if x.shape != truth.shape or truth.all() or not truth.any():
            raise ValueError("present must say of each probability whether its phrase's object is there; some must not")
        if x[truth].mean() <= x[~truth].mean():
            raise ValueError("the present objects are no more probable than the absent ones: this model cannot tell")
        yes, no = truth.sum(), (~truth).sum()
        target = np.where(truth, (yes + 1) / (yes + 2), 1 / (no + 2))  # Platt's, so that a clean split stays finite
        design, weights = np.stack([x, np.ones_like(x)], 1), np.zeros(2)
        for _ in range(100):
            frequency = 1 / (1 + np.exp(-(design @ weights)))
            curvature = (design * (frequency * (1 - frequency))[:, None]).T @ design + 1e-9 * np.eye(2)
            step = np.linalg.solve(curvature, design.T @ (target - frequency))
            weights += step / max(1.0, float(np.abs(step).max()))
            if np.abs(step).max() < 1e-10:
                break
        return cls(float(weights[0]), float(weights[1]))


UNMEASURED = Presence()
"""The scale on which 0.5 is the threshold of the masks."""


def peak(logits: np.ndarray, warp: Letterbox) -> float:
    """The probability that the CELLS most probable cells of the map (h, w) inside the picture all reach."""
    inside = logits[_inside(logits.shape, warp)]
    values = inside if inside.size else logits.ravel()  # a picture thinner than a cell
    kth = max(0, values.size - CELLS)
    return float(1 / (1 + np.exp(-np.partition(values, kth)[kth].astype(np.float64))))


def _inside(shape: tuple[int, ...], warp: Letterbox) -> np.ndarray:
    """Which cells (h, w) lie in the picture, (h, w) bool; the others are in the letterbox's border."""
    y, x = (np.linspace(0.5, warp.size - 0.5, side) for side in shape)
    x_image = warp.inverse[0, 0] * x + warp.inverse[0, 2]
    y_image = warp.inverse[1, 1] * y + warp.inverse[1, 2]
    return ((y_image >= 0) & (y_image <= warp.height))[:, None] & ((x_image >= 0) & (x_image <= warp.width))


def _evidence(probability: float, threshold: float) -> float:
    high, low = np.clip([probability, threshold], _LEAST, 1 - _LEAST)
    return float(np.log(high / (1 - high)) - np.log(low / (1 - low)))
