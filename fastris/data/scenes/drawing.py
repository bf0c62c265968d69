"""Draw scenes of shapes as anti-aliased images, with the mask of every shape."""

from __future__ import annotations

from functools import cache

import numpy as np

from fastris.data.scenes.scenes import Scene, Shape

NO_SHAPE = 255  # in the map of owners
SUBPIXEL_BITS = 4  # fixed-point bits of the coordinates that OpenCV takes


def draw(scene: Scene, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene on a soft background.

    Returns:
        The image, (S, S, 3) uint8 RGB, and the owner of each pixel, (S, S) uint8: the index of the topmost shape that
        covers at least half of it, or `NO_SHAPE`.
    """
    import cv2

    image = _background(size, rng)
    coverages = [_coverage(shape, size) for shape in scene.shapes]
    shift = max(1, round(0.015 * size))
    shadow = np.roll(np.maximum.reduce(coverages), (shift, shift), (0, 1))
    image *= 1 - cv2.GaussianBlur(shadow, (0, 0), 0.018 * size)[..., None] * np.float32(0.4 / 255)
    owner = np.full((size, size), NO_SHAPE, np.uint8)
    for index, (shape, coverage) in enumerate(zip(scene.shapes, coverages, strict=True)):
        box = _box(shape, size)
        lit = (
            np.array(shape.rgb, np.float32)
            * (255 + 75 * (_light(size)[box] - _light(size)[_centre(shape, size)]))[..., None]
        )
        image[box] += (lit - image[box]) * (coverage[box] * np.float32(1 / 255))[..., None]
        owner[box][coverage[box] >= 128] = index
    image += rng.standard_normal((size, size, 1), np.float32) * np.float32(3)
    return np.clip(image, 0, 255).astype(np.uint8), owner


def _centre(shape: Shape, size: int) -> tuple[int, int]:
    return round(shape.y * size), round(shape.x * size)


def _box(shape: Shape, size: int) -> tuple[slice, slice]:
    """A square of pixels that holds the shape at any rotation."""
    reach = 1.3 * shape.radius * size + 2
    x, y = shape.x * size, shape.y * size
    return (slice(max(0, int(y - reach)), int(y + reach) + 1), slice(max(0, int(x - reach)), int(x + reach) + 1))


def _coverage(shape: Shape, size: int) -> np.ndarray:
    """How much of each pixel the shape covers: (S, S) uint8, 255 for all of it."""
    import cv2

    sine, cosine = np.sin(shape.angle), np.cos(shape.angle)
    turned = _outline(shape.kind) @ np.array([[cosine, sine], [-sine, cosine]])
    points = (turned * shape.radius + (shape.x, shape.y)) * size - 0.5
    coverage = np.zeros((size, size), np.uint8)
    fixed = np.round(points * (1 << SUBPIXEL_BITS)).astype(np.int32)
    cv2.fillPoly(coverage, [fixed], 255, cv2.LINE_AA, SUBPIXEL_BITS)
    return coverage


@cache
def _outline(kind: str) -> np.ndarray:
    """Corners (N, 2) of the shape around the origin, with about the same area for every kind."""
    if kind == "circle":
        return _ring(64, 1.0)
    if kind == "square":
        return _ring(4, 1.25, np.pi / 4)
    if kind == "triangle":
        return _ring(3, 1.3, np.pi / 2) + np.array([0, 0.2])
    if kind == "star":
        outer, inner = _ring(5, 1.3, np.pi / 2), _ring(5, 0.58, np.pi / 2 + np.pi / 5)
        return np.stack([outer, inner], 1).reshape(10, 2)
    if kind == "cross":
        long, wide = 1.15, 0.4
        arm = np.array([[wide, wide], [wide, long], [-wide, long]])
        quarter = np.array([[0, 1], [-1, 0]])
        return np.concatenate([arm @ np.linalg.matrix_power(quarter, turn) for turn in range(4)])
    raise ValueError(f"kind={kind!r} has no outline")


def _ring(corners: int, radius: float, start: float = 0.0) -> np.ndarray:
    """The corners of a regular polygon; `start` is the angle of the first one, anticlockwise from the right."""
    angles = start + np.arange(corners) * (2 * np.pi / corners)
    return radius * np.stack([np.cos(angles), -np.sin(angles)], 1)


@cache
def _light(size: int) -> np.ndarray:
    """Brightness of light from the top left: (S, S), from 1 down to -1."""
    ramp = np.linspace(1, -1, size, dtype=np.float32)
    return 0.35 * ramp + 0.65 * ramp[:, None]


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """A dull gradient with soft clouds: (S, S, 3) float32 in [0, 255]."""
    import cv2

    tone = rng.uniform(0.2, 0.9) + rng.uniform(-0.05, 0.05, (2, 3))
    slope = rng.uniform(-1, 1, 2)
    corners = (
        0.5 + np.array([[-slope[0] - slope[1], slope[0] - slope[1]], [slope[1] - slope[0], slope[0] + slope[1]]]) / 2
    )
    coarse = corners[..., None] * tone[0] + (1 - corners[..., None]) * tone[1]
    gradient = cv2.resize(coarse.astype(np.float32) * 255, (size, size), interpolation=cv2.INTER_LINEAR)
    clouds = cv2.resize(rng.standard_normal((5, 5), np.float32) * 9, (size, size), interpolation=cv2.INTER_CUBIC)
    return gradient + clouds[..., None]
