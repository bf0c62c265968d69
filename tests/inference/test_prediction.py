"""What a prediction offers other programs, and whether it says that nothing is there."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from test_segmenter import BLUE, RED, Corner, corner_prediction, photo

from fastris.data.letterbox import letterbox
from fastris.inference.outlines import box_of, polygons_of, rle_of
from fastris.inference.prediction import Prediction
from fastris.inference.presence import CELLS, Presence, peak
from fastris.inference.segmenter import Segmenter


def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    blobs = [cv2.GaussianBlur(rng.random((47, 61)), (0, 0), s) > 0.5 for s in (0.3, 1, 4)]
    ring = np.zeros((47, 61), bool)
    ring[5:30, 8:40], ring[12:20, 15:30], ring[15, 20] = True, False, True
    return [*blobs, ring, np.zeros((3, 4), bool), np.ones((3, 4), bool)]


def test_polygons_run_lengths_and_boxes_give_the_mask_back_exactly() -> None:
    for mask in masks():
        filled = cv2.fillPoly(np.zeros(mask.shape, np.uint8), polygons_of(mask), 1)
        np.testing.assert_array_equal(filled, mask)
        rle = rle_of(mask)
        np.testing.assert_array_equal(coco_mask.decode(rle), mask)
        left, top, right, bottom = box_of(mask)
        assert mask[top:bottom, left:right].sum() == mask.sum()
        assert mask[top:bottom, [left, right - 1]].any(0).all() or not mask.any()


def test_coco_entries_are_what_pycocotools_computes() -> None:
    found = corner_prediction()
    first, second = found.coco(image_id=7)
    assert (first["image_id"], second["category_id"], second["caption"]) == (7, 2, BLUE)
    assert first["area"] == coco_mask.area(first["segmentation"]) == found[0].area > 0
    np.testing.assert_array_equal(first["bbox"], coco_mask.toBbox(first["segmentation"]))
    assert first["score"] == pytest.approx(found[0].score, abs=1e-5)
    np.testing.assert_array_equal(found.boxes[0], found[0].box)
    np.testing.assert_array_equal(found.polygons()[1][0], polygons_of(found.masks[1])[0])


def test_detections_hold_what_was_found_and_need_supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(RuntimeError, match=r"supervision is needed for to_detections, .*'fastris\[supervision\]'"):
        corner_prediction().to_detections()
    fake: Any = ModuleType("supervision")
    fake.Detections = type("Detections", (SimpleNamespace,), {"empty": staticmethod(lambda: "nothing")})
    monkeypatch.setitem(sys.modules, "supervision", fake)
    logits = corner_prediction().logits
    logits[0] = -9
    logits[0, 8, 8] = 9  # a mask too small to count
    found = Prediction(photo(), (RED, BLUE), logits, letterbox(30, 40, 64))
    detections = found.to_detections()
    np.testing.assert_array_equal(detections.xyxy, found.boxes[1:])
    np.testing.assert_array_equal(detections.mask, found.masks[1:])
    assert (
        found.masks[0].any()
        and detections.class_id.tolist() == [1]
        and detections.data["class_name"].tolist() == [BLUE]
    )
    assert detections.confidence[0] == found[1].score
    assert Prediction(photo(), (RED,), logits[:1], letterbox(30, 40, 64)).to_detections() == "nothing"


def test_presence_is_a_half_at_the_threshold_and_counts_only_cells_of_the_picture() -> None:
    warp, logits = letterbox(30, 40, 64), np.full((16, 16), -9.0, np.float32)
    logits[:2] = 9  # the letterbox's border
    assert peak(logits, warp) == pytest.approx(1 / (1 + np.exp(9)))
    logits[8, 4 : 4 + CELLS] = np.log(0.35 / 0.65)
    found = Prediction(photo(), (RED,), logits[None], warp, threshold=0.35)
    assert found.presence[0] == pytest.approx(0.5, abs=1e-6)
    logits[8, 4 : 3 + CELLS] = 9  # one cell too few
    assert peak(logits, warp) == pytest.approx(0.35, abs=1e-6)
    logits[8, 4 : 4 + CELLS] = 9
    found = Prediction(photo(), (RED,), logits[None], warp, threshold=0.35)
    assert found.found.tolist() == [True] and found.presence[0] > 0.99
    assert not Segmenter(Corner(value=0.0), threshold=0.6)(photo(), RED).found.any()
    thin = Prediction(np.zeros((1, 300, 3), np.uint8), (RED,), logits[None], letterbox(1, 300, 64))
    assert np.isfinite(thin.presence).all()


def test_a_fitted_presence_is_the_frequency_of_what_is_there() -> None:
    rng = np.random.default_rng(0)
    evidence = rng.normal(0, 3, 4000)
    present = rng.random(4000) < 1 / (1 + np.exp(-(0.7 * evidence - 1)))
    probability = 1 / (1 + np.exp(-(evidence + np.log(0.35 / 0.65))))
    fitted = Presence.fit(probability, present, 0.35)
    assert (fitted.slope, fitted.offset) == (pytest.approx(0.7, abs=0.06), pytest.approx(-1, abs=0.12))
    score = np.array([fitted.score(each, 0.35) for each in probability])
    for low in (0.1, 0.4, 0.7):
        chosen = (score > low) & (score < low + 0.2)
        assert present[chosen].mean() == pytest.approx(score[chosen].mean(), abs=0.06)
    clean = Presence.fit([0.1, 0.2, 0.8, 0.9], [False, False, True, True], 0.35)
    assert np.isfinite([clean.slope, clean.offset]).all() and clean.score(0.9, 0.35) < 1
    for present_too in ([True] * 4, [True, True, False, False]):
        with pytest.raises(ValueError, match="present"):
            Presence.fit([0.1, 0.2, 0.8, 0.9], present_too, 0.35)
