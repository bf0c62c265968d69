"""Images squashed to a model's square: pixel centres correspond, and masks stay hard."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from fastris.data.letterbox import squash, to_square
from fastris.data.samples import EvalSamples, TrainSamples
from fastris.data.scenes.dataset import SyntheticExpressions
from fastris.evaluation.rules import RULES
from fastris.models.alignformer.config import AlignFormerConfig
from fastris.models.inputs import CLIP_INPUTS

INPUTS = AlignFormerConfig.preset("alignformer_tiny").inputs


def test_picture_fills_the_square_as_pillow_resizes_it():
    rgb = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    found = squash(30, 50, 24).warp_image(rgb, INPUTS)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (INPUTS.mean, INPUTS.std))
    expected = np.array(Image.fromarray(rgb).resize((24, 24), Image.Resampling.BILINEAR))
    torch.testing.assert_close(found, (torch.from_numpy(expected).permute(2, 0, 1) / 255 - mean) / std)


def test_mask_is_resized_as_the_rule_resizes_the_truth_and_stays_hard():
    mask = np.random.default_rng(0).random((31, 50)) > 0.5
    rule = dataclasses.replace(RULES["alignformer"], size=24)
    warp = squash(31, 50, 24)
    assert np.array_equal(warp.warp_mask(mask)[0].numpy().astype(bool), rule.truth(mask))
    pillow = Image.fromarray(mask.astype(np.uint8)).resize((24, 24), Image.Resampling.NEAREST)
    assert np.array_equal(rule.truth(mask), np.asarray(pillow).astype(bool))
    square = np.random.default_rng(1).normal(size=(24, 24)).astype(np.float32)
    np.testing.assert_allclose(rule.to_image(square, warp), square, atol=1e-6)  # nothing is to be undone


def test_way_back_is_linear_between_pixel_centres():
    ramp = np.tile(np.arange(8, dtype=np.float32) + 0.5, (8, 1))
    back = squash(20, 40, 8).unwarp(ramp)
    inner = slice(3, -3)
    assert back.shape == (20, 40)
    np.testing.assert_allclose(back[5, inner], ((np.arange(40) + 0.5) / 5)[inner], atol=1e-5)
    matrix = squash(20, 40, 8).matrix
    np.testing.assert_allclose(matrix @ np.array([[-0.5, 39.5], [-0.5, 19.5], [1, 1]]), [[-0.5, 7.5], [-0.5, 7.5]])


def test_model_decides_how_its_samples_become_squares():
    scenes = SyntheticExpressions("train", scenes=2)
    for fit in ("letterbox", "squash"):
        inputs = dataclasses.replace(CLIP_INPUTS, fit=fit)
        image = scenes.image(0)[:, :64]
        warp = to_square(*image.shape[:2], 32, inputs)
        border = bool((warp.warp_image(np.full_like(image, 255), inputs)[0, :, 0] < 1).all())
        assert border == (fit == "letterbox")
        expected = to_square(*scenes.image(0).shape[:2], 32, inputs).warp_image(scenes.image(0), inputs)
        for samples in (TrainSamples(scenes, 32, inputs=inputs), EvalSamples(scenes, 32, inputs=inputs)):
            assert torch.equal(samples[0]["image"], expected)
    with pytest.raises(ValueError, match="fit 'crop' is unknown; known are letterbox, squash"):
        to_square(4, 4, 8, dataclasses.replace(CLIP_INPUTS, fit="crop"))


@pytest.mark.parametrize("side", [0, 40000])
def test_side_out_of_range_is_refused_by_name(side):
    with pytest.raises(ValueError, match=f"width={side} pixels must lie in"):
        squash(4, side, 8)
