from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastris.evaluation.metrics import batch_iou, per_sample_iou, read_per_sample, score

NAMES = {"rule": "cris", "dataset": "refcoco", "split": "val", "sentences": "all"}


def test_scores_agree_with_numbers_worked_out_by_hand():
    # IoUs: 1/2, 3/4, 0, 9/10 (each lowered a little by the 1e-6), pixels: 1+3+0+90 of 2+4+5+100.
    scores = score([1, 3, 0, 90], [2, 4, 5, 100], **NAMES)
    assert scores.mIoU == pytest.approx((0.5 + 0.75 + 0 + 0.9) / 4, abs=1e-6)
    assert scores.oIoU == 94 / 111
    assert scores.precision == {50: 2 / 4, 60: 2 / 4, 70: 2 / 4, 80: 1 / 4, 90: 0.0}
    assert (scores.expressions, scores.empty) == (4, 0)


@pytest.mark.parametrize("level", [50, 60, 70, 80, 90])
def test_precision_counts_only_what_lies_strictly_above_the_level(level):
    exactly = score([level], [100], **NAMES)
    above = score([level + 1], [100], **NAMES)
    assert (exactly.precision[level], above.precision[level]) == (0.0, 1.0)


def test_empty_truth_and_prediction_count_as_zero_and_are_reported():
    scores = score([0, 5], [0, 5], **NAMES)
    assert scores.mIoU == pytest.approx(0.5, abs=1e-6)
    assert (scores.oIoU, scores.empty) == (1.0, 1)
    assert "1 without a true or predicted pixel, counted as 0" in str(scores)


def test_only_empty_expressions_give_zero_and_no_division_error():
    scores = score([0], [0], **NAMES)
    assert (scores.mIoU, scores.oIoU) == (0.0, 0.0)


def test_printing_names_rule_split_and_sentence_rule():
    text = str(score([1], [2], **NAMES))
    assert "mIoU 50.00 %" in text and "oIoU 50.00 %" in text
    assert "[rule cris, refcoco val, all sentences]" in text
    assert "first sentences]" in str(score([1], [2], **(NAMES | {"sentences": "first"})))


def test_as_dict_is_flat_and_survives_json():
    content = score([1, 2], [2, 2], **NAMES).as_dict()
    assert json.loads(json.dumps(content)) == content
    assert list(content)[:7] == ["mIoU", "oIoU", "Pr@50", "Pr@60", "Pr@70", "Pr@80", "Pr@90"]
    assert content["rule"] == "cris" and content["sentences"] == "all"


@pytest.mark.parametrize(
    ("intersections", "unions", "complaint"),
    [
        ([], [], "empty"),
        ([1], [1, 2], "one length"),
        ([0, 3], [1, 2], r"intersections\[1\]=3"),
        ([-1], [2], r"intersections\[0\]=-1"),
    ],
)
def test_impossible_counts_are_refused(intersections, unions, complaint):
    with pytest.raises(ValueError, match=complaint):
        score(intersections, unions, **NAMES)


def test_large_unions_do_not_overflow():
    pixels = 2**31
    scores = score([pixels] * 4, [2 * pixels] * 4, **NAMES)
    assert scores.oIoU == 0.5


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=20))
def test_scores_stay_in_range_and_ignore_order(pairs):
    inter, union = [a for a, _ in pairs], [a + b for a, b in pairs]
    scores = score(inter, union, **NAMES)
    assert 0 <= scores.mIoU <= 1 and 0 <= scores.oIoU <= 1
    levels = list(scores.precision.values())
    assert levels == sorted(levels, reverse=True)
    backwards = score(inter[::-1], union[::-1], **NAMES)
    assert (backwards.oIoU, backwards.precision) == (scores.oIoU, scores.precision)


def test_training_iou_is_the_published_one():
    logits = torch.tensor([[[[3.0, -3.0]]], [[[0.0, -0.6190]]]])  # sigmoid(-0.6190) = 0.35001
    target = torch.tensor([[[[1.0, 0.0]]], [[[0.01, 0.0]]]])  # the soft edge counts as object
    assert batch_iou(logits, target).item() == pytest.approx((1.0 + 0.5) / 2, abs=1e-5)


def test_per_sample_file_must_have_its_columns(tmp_path):
    path = tmp_path / "per_sample.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns intersection and union"):
        read_per_sample(path)
    path.write_text("intersection,union\n1,2\n3,3\n")
    inter, union = read_per_sample(path)
    np.testing.assert_allclose(per_sample_iou(inter, union), [0.5, 1.0], atol=1e-6)
