from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from fastris.data.letterbox import letterbox, squash
from fastris.models.inputs import CLIP_MEAN, CLIP_STD

SIZES = [(416, 416), (480, 640), (640, 427), (33, 500), (500, 33), (1, 1), (2, 3), (1, 700), (700, 1), (1000, 1333)]


def _as_published(height: int, width: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The closed form of the warp: scale, then centre; and its inverse."""
    scale = min(size / height, size / width)
    left, top = (size - width * scale) / 2, (size - height * scale) / 2
    matrix = np.array([[scale, 0, left], [0, scale, top]])
    inverse = np.array([[1 / scale, 0, -left / scale], [0, 1 / scale, -top / scale]])
    return matrix, inverse


@pytest.mark.parametrize("size", [64, 416])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_matrix_scales_to_fit_and_centres(height: int, width: int, size: int) -> None:
    warp = letterbox(height, width, size)
    matrix, inverse = _as_published(height, width, size)
    assert warp.matrix.shape == warp.inverse.shape == (2, 3)
    np.testing.assert_allclose(warp.matrix, matrix, rtol=2e-4, atol=2e-4)
    thin = max(height, width) / min(height, width)  # the short side in float32 loses digits beside its offset
    np.testing.assert_allclose(warp.inverse, inverse, rtol=1e-6 * thin + 1e-5, atol=1e-3 * thin)


def test_inverse_is_solved_from_the_corners_as_published() -> None:
    source = np.float32([[0, 0], [640, 0], [0, 427]])
    scale = 416 / 640
    top = (416 - 427 * scale) / 2
    target = np.float32([[0, top], [416, top], [0, 427 * scale + top]])
    warp = letterbox(427, 640, 416)
    assert (warp.matrix == cv2.getAffineTransform(source, target)).all()
    assert (warp.inverse == cv2.getAffineTransform(target, source)).all()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_size_warps_to_the_square_and_back_to_itself(height: int, width: int) -> None:
    warp = letterbox(height, width, 64)
    image = warp.warp_image(np.full((height, width, 3), 200, np.uint8))
    mask = warp.warp_mask(np.ones((height, width), bool))
    assert image.shape == (3, 64, 64)
    assert image.dtype == mask.dtype == torch.float32
    assert image.is_contiguous()
    assert torch.isfinite(image).all()
    assert mask.shape == (1, 64, 64)
    assert 0 <= mask.min() <= mask.max() <= 1
    original = warp.unwarp(mask[0].numpy())
    assert original.shape == (height, width)
    assert original.dtype == np.float32
    assert np.isfinite(original).all()


def test_image_is_what_the_published_steps_give() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (90, 130, 3), np.uint8)
    warp = letterbox(90, 130, 96)
    border = [mean * 255 for mean in CLIP_MEAN]
    pixels = cv2.warpAffine(rgb, warp.matrix, (96, 96), flags=cv2.INTER_CUBIC, borderValue=border)
    expected = (pixels.transpose(2, 0, 1) / 255 - np.reshape(CLIP_MEAN, (3, 1, 1))) / np.reshape(CLIP_STD, (3, 1, 1))
    np.testing.assert_allclose(warp.warp_image(rgb).numpy(), expected, atol=1e-6)


def test_border_is_clips_mean_colour_and_so_normalises_to_nearly_zero() -> None:
    image = letterbox(20, 80, 80).warp_image(np.zeros((20, 80, 3), np.uint8))
    half_a_level = 0.5 / 255 / min(CLIP_STD)
    assert image[:, :25].abs().max() <= half_a_level + 1e-6
    assert image[:, 55:].abs().max() <= half_a_level + 1e-6
    assert (image[:, 35:45] < -1).all()


def test_mask_is_soft_at_edges_and_zero_outside() -> None:
    mask = np.zeros((30, 60), bool)
    mask[:, 20:40] = True
    soft = letterbox(30, 60, 80).warp_mask(mask)[0]
    assert (soft[:15] == 0).all()
    assert (soft[-15:] == 0).all()
    assert soft[40, 40] == 1
    assert ((soft > 0) & (soft < 1)).any()
    levels = soft * 255
    assert torch.equal(levels.round() / 255, soft)


@pytest.mark.parametrize(("height", "width"), [(48, 80), (80, 48), (300, 200)])
def test_a_mask_survives_the_way_there_and_back(height: int, width: int) -> None:
    mask = np.zeros((height, width), bool)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    warp = letterbox(height, width, 416)
    back = warp.unwarp(warp.warp_mask(mask)[0].numpy()) > 0.5
    assert (back & mask).sum() / (back | mask).sum() > 0.95


def test_unwarp_is_cubic_with_zero_outside() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random((64, 64), np.float32)
    warp = letterbox(50, 70, 64)
    expected = cv2.warpAffine(probabilities, warp.inverse, (70, 50), flags=cv2.INTER_CUBIC, borderValue=0.0)
    assert (warp.unwarp(probabilities) == expected).all()


def test_views_with_negative_strides_are_taken() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    warp = letterbox(20, 30, 32)
    assert torch.equal(warp.warp_image(rgb[::-1, ::-1]), warp.warp_image(rgb[::-1, ::-1].copy()))


@pytest.mark.parametrize("sides", [(32767, 10, 64), (10, 40000, 64), (10, 10, 32767), (0, 10, 64), (10, 10, 0)])
def test_a_side_out_of_range_is_named_with_limit_and_mend(sides: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"must lie in 1\.\.32766 .*shrink or crop") as error:
        letterbox(*sides)
    wrong = next(name for name, side in zip(("height", "width", "size"), sides, strict=True) if not 1 <= side <= 32766)
    assert str(error.value).startswith(f"{wrong}=")


def test_the_longest_side_works() -> None:
    warp = letterbox(1, 32766, 32)
    assert torch.isfinite(warp.warp_image(np.zeros((1, 32766, 3), np.uint8))).all()
    assert warp.unwarp(np.ones((32, 32), np.float32)).shape == (1, 32766)


def test_arrays_of_another_size_or_type_are_refused() -> None:
    warp = letterbox(20, 30, 32)
    with pytest.raises(ValueError, match=r"rgb is float32 \(20, 30, 3\).*uint8 \(20, 30, 3\)"):
        warp.warp_image(np.zeros((20, 30, 3), np.float32))
    with pytest.raises(ValueError, match=r"rgb is uint8 \(30, 20, 3\)"):
        warp.warp_image(np.zeros((30, 20, 3), np.uint8))
    with pytest.raises(ValueError, match="mask is uint8"):
        warp.warp_mask(np.zeros((20, 30), np.uint8))
    with pytest.raises(ValueError, match="probabilities is Tensor"):
        warp.unwarp(torch.zeros(32, 32))  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width", "rows"), [(50, 90, (15, 49)), (32, 32, (0, 64)), (427, 640, (11, 53))])
def test_known_pixels_are_those_with_no_part_on_the_border(height: int, width: int, rows: tuple[int, int]) -> None:
    expected = torch.zeros(1, 64, 64, dtype=torch.bool)
    expected[:, slice(*rows)] = True
    assert torch.equal(letterbox(height, width, 64).known(), expected)
    assert torch.equal(letterbox(width, height, 64).known(), expected.mT)
    white = np.full((height, width, 3), 255, np.uint8)
    if width > 64:  # where the picture is enlarged, the border's colour blends into its edge
        assert letterbox(height, width, 64).warp_image(white)[:, expected[0]].amin(1).min() > 1.8
    assert squash(height, width, 64).known().all()
