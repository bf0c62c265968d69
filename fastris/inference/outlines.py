"""A mask as other programs want it: a box, COCO's run lengths, or polygons."""

from __future__ import annotations

from typing import Any

import numpy as np


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box around a mask (H, W) bool: left, top, right, bottom in pixels, the last two excluded.

    Four zeros for an empty mask.
    """
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def coco_box(mask: np.ndarray) -> list[int]:
    """The box as COCO has it: left, top, width, height."""
    left, top, right, bottom = box_of(mask)
    return [left, top, right - left, bottom - top]


def rle_of(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask (H, W) bool, as JSON holds them: ``size`` [H, W], and ``counts`` text."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def polygons_of(mask: np.ndarray) -> list[np.ndarray]:
    """The outlines of a mask (H, W) bool, those of its holes among them: each (N, 2) int32, x and y of pixel centres.

    All of them together give the mask back exactly: ``cv2.fillPoly(np.zeros((H, W), np.uint8), polygons, 1)``.
    """
    import cv2

    outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [np.asarray(outline, np.int32).reshape(-1, 2) for outline in outlines]
