from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastris.data.letterbox import letterbox
from fastris.evaluation.metrics import score
from fastris.evaluation.rules import RULES, find_rule, overlap
from fastris.inference.masks import probability_on_image

NAMES = {"dataset": "grefcoco", "split": "val", "sentences": "all"}


def test_overlap_counts_pixels():
    prediction = np.array([[1, 1, 0], [0, 0, 0]], dtype=bool)
    truth = np.array([[0, 1, 1], [1, 0, 0]], dtype=bool)
    assert overlap(prediction, truth) == (1, 4)
    with pytest.raises(ValueError, match="image's size"):
        overlap(prediction, truth[:1])


def lavt_test_loop(logits: torch.Tensor, mask: np.ndarray, size: int) -> tuple[int, int]:
    """Two classes, resized with aligned corners to the network's square, argmax; the truth resized by Pillow."""
    classes = torch.cat([torch.zeros_like(logits), logits], dim=1)
    prediction = F.interpolate(classes, size=(size, size), mode="bilinear", align_corners=True).argmax(1)[0].numpy()
    truth = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST))
    return int(np.logical_and(prediction, truth).sum()), int(np.logical_or(prediction, truth).sum())


def test_lavt_is_lavts_own_loop_where_the_letterbox_stretches_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    rule = dataclasses.replace(RULES["lavt"], size=64)
    for side in (64, 91, 200):
        logits = torch.randn(1, 1, 16, 16, generator=generator)
        mask = np.random.default_rng(side).random((side, side)) > 0.6
        prediction = rule.to_image(rule.to_square(logits, 64)[0], letterbox(64, 64, 64)) > rule.cut
        found = rule.compare(prediction, rule.truth(mask))
        assert found[:2] == lavt_test_loop(logits, mask, 64)


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (480, 640), (100, 100)])
def test_a_perfect_map_scores_perfectly_at_any_shape_of_image(name: str, height: int, width: int) -> None:
    rule, warp = RULES[name], letterbox(height, width, 416)
    mask = np.zeros((height, width), bool)
    mask[height // 5 : height // 2, width // 4 : width // 3 * 2] = True
    square = warp.warp_mask(mask)[0].numpy()
    square = square if rule.interpolated == "probability" else 20 * square - 10
    intersection, union, rejected = rule.compare(rule.to_image(square, warp) > rule.cut, rule.truth(mask))
    assert intersection / union > 0.94 and not rejected


def test_truth_is_resized_as_pillow_does() -> None:
    mask = np.random.default_rng(0).random((37, 1001)) > 0.5
    expected = Image.fromarray(mask.astype(np.uint8)).resize((480, 480), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(RULES["lavt"].truth(mask), np.asarray(expected).astype(bool))
    assert RULES["cris"].truth(mask) is mask


def test_cgformer_is_cris_cut_at_one_half() -> None:
    cris, cgformer = RULES["cris"], RULES["cgformer"]
    changes = {"threshold": 0.35, "paper": cris.paper}
    assert dataclasses.replace(cgformer, **changes) == cris
    assert (cris.cut, cgformer.cut, RULES["lavt"].cut) == (0.35, 0.5, 0.0)


def test_probability_of_a_picture_is_the_rules_map() -> None:
    warp, logits = letterbox(40, 60, 64), torch.randn(1, 1, 16, 16)
    square = F.interpolate(logits.sigmoid(), size=(64, 64), mode="bicubic", align_corners=True)[0, 0].numpy()
    np.testing.assert_array_equal(probability_on_image(logits[0, 0].numpy(), warp), warp.unwarp(square))


@pytest.mark.parametrize(("rule", "counted"), [("cris", 0.0), ("cgformer", 0.0), ("lavt", 1.0), ("gres", 1.0)])
def test_an_iou_of_exactly_the_level_counts_where_the_published_code_counts_it(rule: str, counted: float) -> None:
    scores = score([5], [10], rule=rule, **NAMES)
    assert (scores.precision[50], scores.precision[60]) == (counted, 0.0)


def test_union_of_zero_is_iou_0_under_every_rule_unless_no_target_was_seen() -> None:
    for rule in RULES:
        assert score([0], [0], rule=rule, **NAMES).mIoU == 0
    assert score([0], [0], rule="gres", no_target=[True], rejected=[True], **NAMES).generalised["gIoU"] == 1


def rela_loop(samples: list[tuple[np.ndarray, np.ndarray, bool]]) -> dict[str, float]:
    """The counting of ReLA's evaluator, sample by sample; no target is predicted by fewer than 50 pixels."""
    iou, inter, union, reached = [], 0, 0, 0
    count = {"TP": 0, "TN": 0, "FP": 0, "FN": 0}
    for prediction, truth, no_target in samples:
        pred_nt = prediction.sum() < 50
        i, u = int((prediction & truth).sum()), int((prediction | truth).sum())
        if no_target:
            count["TP" if pred_nt else "FN"] += 1
            iou.append(1.0 if pred_nt else 0.0)
            union += 0 if pred_nt else u
        else:
            count["FP" if pred_nt else "TN"] += 1
            i = 0 if pred_nt else i
            iou.append(i / u if u else 0.0)
            reached += iou[-1] >= 0.7
            inter, union = inter + i, union + u
    return {
        "gIoU": sum(iou) / len(iou),
        "cIoU": inter / union,
        "N-acc": count["TP"] / (count["TP"] + count["FN"]),
        "T-acc": count["TN"] / (count["TN"] + count["FP"]),
        "Pr@70": reached / (count["TN"] + count["FP"]),
    }


def test_gres_counts_as_relas_evaluator_does() -> None:
    rng, rule, samples = np.random.default_rng(0), RULES["gres"], []
    for number in range(60):
        truth = np.zeros((480, 480), bool)
        if number % 3:
            truth[100:200, 100 : 100 + number] = True
        prediction = truth & (rng.random(truth.shape) < rng.choice([0.0, 0.005, 0.75, 0.9]))
        if number % 4 == 0:
            prediction[:5, : rng.integers(0, 30)] = True
        samples.append((prediction, truth, number % 3 == 0))
    found = [rule.compare(*sample) for sample in samples]
    scores = score(
        [f.intersection for f in found],
        [f.union for f in found],
        rule="gres",
        no_target=[no_target for *_, no_target in samples],
        rejected=[f.rejected for f in found],
        **NAMES,
    )
    content, expected = scores.as_dict(), rela_loop(samples)
    assert {name: content[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert all(0 < value < 1 for value in expected.values()), "a trivial value tests nothing"
    assert (scores.no_target, scores.best_by) == (20, content["gIoU"])
    assert "N-acc" in str(scores) and "20 of them without a target" in str(scores)


def test_gres_without_any_missing_target_has_no_n_acc() -> None:
    scores = score([70], [100], rule="gres", **NAMES)
    assert scores.generalised == {"gIoU": 0.7, "cIoU": 0.7, "N-acc": None, "T-acc": 1.0}
    assert "N-acc -" in str(scores)


def test_other_rules_say_that_missing_targets_count_as_0() -> None:
    scores = score([0, 7], [9, 7], rule="lavt", no_target=[True, False], **NAMES)
    assert (scores.mIoU, scores.generalised, scores.best_by) == (0.5, {}, 0.5)
    assert "1 of them without a target (counted as IoU 0; rule=gres knows of them)" in str(scores)


def test_rules_describe_themselves() -> None:
    for name, rule in RULES.items():
        assert f"probability > {rule.threshold}" in rule.text and rule.resize in rule.text, name
    assert RULES["cris"].text == (
        "sigmoid; bicubic (align_corners=True) to the input size; inverse letterbox warp (cubic) to the image's size; "
        "probability > 0.35; against the mask at the image's own size; IoU = intersection / (union + 1e-06)"
    )
    assert "480 x 480" in RULES["lavt"].text and "50 predicted pixels" in RULES["gres"].text
    with pytest.raises(
        ValueError, match="rule='lavvt' is unknown; choose one of cris, lavt, cgformer, gres, alignformer"
    ):
        find_rule("lavvt")
