"""How logits become a mask and a mask becomes a score: the published evaluation rules, by name.

Published numbers of referring segmentation differ by these rules alone, so every score names its own. What the rules
share, and what is no part of them: the model's input is its own square (CRIS's is letterboxed), and the sentences
scored are the caller's choice. What they differ in, and where that is written down:

========= =======================================  ====================  =========  ======  =====================
rule      from the model's map to the scored one   scored at             threshold  Pr@X    no target, or union 0
========= =======================================  ====================  =========  ======  =====================
cris      sigmoid, bicubic to the square, cubic    the image's own size  0.35       IoU>X   IoU 0
          inverse letterbox
lavt      logits, bilinear to the square, linear   480 x 480, the image  0.5        IoU>=X  IoU 0
          inverse letterbox                        stretched
cgformer  as cris                                  the image's own size  0.5        IoU>X   IoU 0
gres      logits, bilinear (corners not aligned)   480 x 480, the image  0.5        IoU>=X  IoU 1 if seen, else 0
          to the square, linear inverse letterbox  stretched
align-    logits, bilinear (corners not aligned)   480 x 480, the image  0.5        IoU>=X  IoU 0
former    to the square, which is 480 x 480        squashed
magnet    as lavt, for models that squash the      480 x 480, the image  0.5        IoU>=X  IoU 0
          image to that square                     squashed
magnet448 the same at 448 x 448                    448 x 448             0.5        IoU>=X  IoU 0
========= =======================================  ====================  =========  ======  =====================

oIoU is the sum of intersections over the sum of unions in all of them; at 480 x 480 every image weighs the same in it,
at the images' own sizes large images weigh more. cris and cgformer add 1e-6 pixels to the union of each IoU.

Sources: CRIS `engine/engine.py` (`inference`); LAVT-RIS `test.py`, `transforms.py` (`Resize` shrinks the truth to the
network's 480 x 480 too, by nearest neighbour) and `lib/_utils.py`; CGFormer `engine/engine.py` (`inference`); ReLA
`gres_model/evaluation/refer_evaluation.py` and `GRES.py`; the released code of LGFormer, AlignFormer's later version;
MagNet's evaluation code (mask-grounding), whose weights for all data sets together were made and scored at 448.
All but CRIS and CGFormer stretch the image to the network's square where CRIS letterboxes it; the inverse letterbox
stands for that, and a model that squashes its images needs none. ReLA draws its truth from polygons at 480 x 480, and a
head of its own says that there is no target; here the truth is resized by nearest neighbour, and a mask of fewer than
50 pixels says so, as the GRES paper (CVPR 2023) does for networks without such a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from fastris.inference.masks import THRESHOLD, on_square

if TYPE_CHECKING:
    from torch import Tensor

    from fastris.data.letterbox import Letterbox

Sentences = Literal["all", "first"]
"""Which sentences of each object are scored; the rule does not say it, so it stands beside the scores too."""


class Overlap(NamedTuple):
    """What one expression contributes: intersection and union in pixels, and whether the prediction was "no target"."""

    intersection: int
    union: int
    rejected: bool


@dataclass(frozen=True)
class Rule:
    """One way from logits to a score.

    Attributes:
        threshold: a pixel belongs to the object where its probability lies strictly above.
        interpolated: what is resized, "probability" (after the sigmoid) or "logit" (before it).
        resize, align_corners: PyTorch's interpolation from the model's map to the letterboxed square.
        size: side of the square that the image is stretched to for scoring, in pixels; the inverse letterbox is linear
            then. None scores at the image's own size, after CRIS's cubic inverse letterbox.
        epsilon: added to the union of an expression's IoU, in pixels.
        inclusive: whether Pr@X counts an IoU of exactly X.
        reject_below: a mask of fewer pixels, at the scored size, says that there is no target; None: there always is.
        paper: whose numbers it is behind.
        best_by: the score that a training run keeps its best weights by.
    """

    threshold: float
    interpolated: Literal["probability", "logit"]
    resize: Literal["bicubic", "bilinear"]
    align_corners: bool
    size: int | None
    epsilon: float
    inclusive: bool
    reject_below: int | None
    paper: str
    best_by: Literal["mIoU", "oIoU", "gIoU"] = "mIoU"

    @property
    def text(self) -> str:
        """The rule in words, for the files that it leads to."""
        if self.size is None:
            where, truth = "(cubic) to the image's size", "the mask at the image's own size"
        else:
            where, truth = f"(linear) to {self.size} x {self.size}, the image stretched", "the mask resized by nearest"
        steps = [
            f"{self.resize} (align_corners={self.align_corners}) to the input size",
            f"inverse letterbox warp {where}",
            f"probability > {self.threshold}",
            f"against {truth}",
            "IoU = intersection / " + (f"(union + {self.epsilon:g})" if self.epsilon else "union, 0 where union is 0"),
        ]
        steps.insert(0 if self.interpolated == "probability" else 2, "sigmoid")
        if self.reject_below is not None:
            steps.append(
                f"fewer than {self.reject_below} predicted pixels mean no target: IoU 1 if there is none, else 0"
            )
        return "; ".join(steps)

    @property
    def cut(self) -> float:
        """The threshold in what is interpolated: a probability or a logit."""
        return self.threshold if self.interpolated == "probability" else math.log(self.threshold / (1 - self.threshold))

    def to_square(self, logits: Tensor, size: int) -> np.ndarray:
        """Logits (E, 1, h, w) to maps (E, S, S) float32 over the letterboxed square: probabilities or logits."""
        maps = logits.float()
        if self.interpolated == "probability":
            maps = maps.sigmoid()
        return on_square(maps, size, self.resize, self.align_corners)

    def to_image(self, square: np.ndarray, warp: Letterbox) -> np.ndarray:
        """A map (S, S) of the letterboxed square to the scored size: (H, W) of the image, or (`size`, `size`).

        Cubic interpolation overshoots at steep edges, so probabilities may leave [0, 1] by a little, as published.
        """
        return warp.unwarp(square) if self.size is None else _stretch(square, warp, self.size)

    def truth(self, mask: np.ndarray) -> np.ndarray:
        """A mask (H, W) bool at the scored size."""
        if self.size is None:
            return mask
        rows, columns = (((np.arange(self.size) + 0.5) * side / self.size).astype(int) for side in mask.shape)
        return mask[np.ix_(rows, columns)]

    def compare(self, prediction: np.ndarray, truth: np.ndarray, no_target: bool = False) -> Overlap:
        """Score a predicted mask against the true one, both bool at the scored size.

        Where a rule rejects, a rejected mask has no intersection; and no union either if there is indeed no target.

        Raises:
            ValueError: the masks differ in size.
        """
        intersection, union = overlap(prediction, truth)
        rejected = self.reject_below is not None and int(np.count_nonzero(prediction)) < self.reject_below
        if rejected:
            intersection, union = 0, 0 if no_target else union
        return Overlap(intersection, union, rejected)


RULES = {
    "cris": Rule(THRESHOLD, "probability", "bicubic", True, None, 1e-6, False, None, "CRIS (CVPR 2022)"),
    "lavt": Rule(0.5, "logit", "bilinear", True, 480, 0.0, True, None, "LAVT (CVPR 2022)"),
    "cgformer": Rule(0.5, "probability", "bicubic", True, None, 1e-6, False, None, "CGFormer (CVPR 2023)"),
    "gres": Rule(0.5, "logit", "bilinear", False, 480, 0.0, True, 50, "ReLA / GRES (CVPR 2023)", "gIoU"),
    "alignformer": Rule(
        0.5, "logit", "bilinear", False, 480, 0.0, True, None, "AlignFormer (arXiv 2301.06429)", "oIoU"
    ),
    "magnet": Rule(0.5, "logit", "bilinear", True, 480, 0.0, True, None, "MagNet (CVPR 2024)", "oIoU"),
    "magnet448": Rule(
        0.5, "logit", "bilinear", True, 448, 0.0, True, None, "MagNet (CVPR 2024), all data sets", "oIoU"
    ),
}
"""Scoring rules by name; see the module's table. "cris" is the one behind CRIS's published numbers."""


def find_rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in RULES:
        raise ValueError(f"rule={name!r} is unknown; choose one of {', '.join(RULES)}")
    return RULES[name]


def _stretch(square: np.ndarray, warp: Letterbox, size: int) -> np.ndarray:
    """The image's part of a map (S, S) of the letterboxed square, stretched to (`size`, `size`) pixels; linear.

    Pixel centres correspond as where the image itself is stretched, ((j + 0.5) * W / size - 0.5, likewise in y), and
    from there to the square as in the letterbox.
    """
    import cv2

    scale_x, scale_y = warp.width / size, warp.height / size
    to_image = np.array([[scale_x, 0, 0.5 * scale_x - 0.5], [0, scale_y, 0.5 * scale_y - 0.5], [0, 0, 1]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(square, warp.matrix @ to_image, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


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
