"""What the model found of each phrase in one picture, as arrays, pictures, or what other programs want."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastris.data.letterbox import Letterbox
from fastris.inference.masks import THRESHOLD, probability_on_image
from fastris.inference.outlines import box_of, coco_box, polygons_of, rle_of
from fastris.inference.presence import FOUND, UNMEASURED, Presence, peak
from fastris.runtime.extras import need

if TYPE_CHECKING:
    from PIL import Image


class Segment(NamedTuple):
    """The result for one phrase.

    Attributes:
        phrase: the phrase.
        mask: (H, W) bool, at the picture's own size.
        probability: (H, W) float32 in [0, 1]. The mask comes from the values before they are clipped to that range,
            which cubic interpolation can leave.
        score: mean probability inside the mask, 0 if the mask is empty.
    """

    phrase: str
    mask: np.ndarray
    probability: np.ndarray
    score: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the mask in pixels, the last two excluded; zeros for an empty mask."""
        return box_of(self.mask)

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(self.mask.sum())


@dataclass(frozen=True, eq=False, repr=False)
class Prediction(Sequence[Segment]):
    """The results for N phrases about one picture: a sequence of :class:`Segment`, or all of them as arrays.

    Full-size maps are computed on access: ``for segment in prediction`` holds one at a time in memory, while ``masks``
    and ``probabilities`` compute and keep N of them.

    Attributes:
        image: the picture (H, W, 3) uint8 RGB, upright; masks have its size.
        phrases: the N phrases.
        logits: (N, h, w) float32, the model's output for the letterboxed square.
        warp: the letterbox between the picture and the square.
        threshold: the probability above which a pixel belongs to a mask.
        scale: of the presence score.
    """

    image: np.ndarray
    phrases: tuple[str, ...]
    logits: np.ndarray
    warp: Letterbox
    threshold: float = THRESHOLD
    scale: Presence = UNMEASURED

    def __len__(self) -> int:
        return len(self.phrases)

    def __getitem__(self, i: Any) -> Any:
        """The :class:`Segment` of phrase ``i``; a list of them for a slice."""
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        probability = probability_on_image(self.logits[i], self.warp)
        mask = probability > self.threshold
        np.clip(probability, 0, 1, out=probability)
        score = float(probability.mean(where=mask, dtype=np.float64)) if mask.any() else 0.0
        return Segment(self.phrases[i], mask, probability, score)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"Prediction({width} x {height} pixels, {len(self)} phrases: {', '.join(map(repr, self.phrases))})"

    @cached_property
    def masks(self) -> np.ndarray:
        """(N, H, W) bool."""
        return np.stack([segment.mask for segment in self])

    @cached_property
    def probabilities(self) -> np.ndarray:
        """(N, H, W) float32 in [0, 1]."""
        return np.stack([segment.probability for segment in self])

    @cached_property
    def scores(self) -> np.ndarray:
        """(N,) float32: the mean probability inside each mask, 0 for an empty one."""
        return np.array([segment.score for segment in self], np.float32)

    @cached_property
    def presence(self) -> np.ndarray:
        """(N,) float32 in [0, 1]: whether the picture has it at all; see :mod:`fastris.inference.presence`."""
        peaks = [peak(each, self.warp) for each in self.logits]
        return np.array([self.scale.score(each, self.threshold) for each in peaks], np.float32)

    @property
    def found(self) -> np.ndarray:
        """(N,) bool: presence above 0.5. A mask of a few pixels may be there where nothing is found."""
        return self.presence > FOUND

    @cached_property
    def boxes(self) -> np.ndarray:
        """(N, 4) int64: left, top, right, bottom of each mask in pixels; zeros for an empty one."""
        return np.array([segment.box for segment in self], np.int64)

    def polygons(self) -> list[list[np.ndarray]]:
        """Of each phrase, the outlines of its mask; see :func:`fastris.inference.outlines.polygons_of`."""
        return [polygons_of(segment.mask) for segment in self]

    def coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """An entry for each phrase, as COCO's results have them; ``category_id`` is the phrase's number from 1 on.

        ``segmentation`` holds run lengths, which are the mask exactly. An empty mask has the area 0.
        """
        return [
            {
                "image_id": image_id,
                "category_id": number + 1,
                "caption": segment.phrase,
                "segmentation": rle_of(segment.mask),
                "bbox": coco_box(segment.mask),
                "area": segment.area,
                "iscrowd": 0,
                "score": round(segment.score, 6),
            }
            for number, segment in enumerate(self)
        ]

    def to_detections(self) -> Any:
        """What was found as ``supervision.Detections``: boxes, masks, scores as confidence.

        ``class_id`` is the phrase's number from 0 on, ``data["class_name"]`` the phrase; phrases of which nothing was
        found are left out. Raises MissingExtra without the library ``supervision``.
        """
        supervision = need("supervision", "supervision", "for to_detections")
        numbers = np.flatnonzero(self.found & (self.boxes[:, 2] > self.boxes[:, 0]))
        if not len(numbers):
            return supervision.Detections.empty()
        return supervision.Detections(
            xyxy=self.boxes[numbers].astype(np.float32),
            mask=self.masks[numbers],
            confidence=self.scores[numbers],
            class_id=numbers,
            data={"class_name": np.array([self.phrases[number] for number in numbers])},
        )

    def overlay(self, i: int | None = None, alpha: float = 0.5, caption: bool = False) -> Image.Image:
        """The picture with the mask of phrase ``i`` (all masks for None) tinted by ``alpha``, 0 to 1, and outlined.

        ``caption``: write the phrase below, and enlarge a tiny picture or shrink a huge one so that it can be read;
        otherwise the overlay has the picture's size. Raises IndexError for a phrase that does not exist.
        """
        from PIL import Image

        from fastris.pictures.overlay import paint, view

        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in 0..1 (strength of the tint), got {alpha}")
        numbers = list(range(len(self)))[slice(None) if i is None else slice(i, i + 1 or None)]
        if not numbers:
            raise IndexError(f"i must name one of the {len(self)} phrases, got {i}")
        if caption:
            return view(self.image, [(k, self.phrases[k], self[k].mask) for k in numbers], alpha)
        return Image.fromarray(paint(self.image, [(k, self[k].mask) for k in numbers], alpha))
