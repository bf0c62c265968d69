"""The sum of shifted taps on a CPU, for feature maps that are larger than the caches.

The product (taps, C) x (C, H*W) of :mod:`fastris.ops.similarity` has nine rows and little arithmetic, so reading the
map takes most of the time. A BLAS library reads all channels at once, each from a memory page of its own. Here a few
channels at a time are read as one stream, from the first pixel to the last, while the maps of the taps stay in the
cache. The kernels' gradient reads the map in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHANNELS, CHANNELS_BACKWARD = 16, 32
"""Channels that are read at once, for the taps and for the kernels' gradient."""

LEAST_BYTES = 2**24
"""Size of the smallest map that is streamed; for smaller ones a single BLAS call is faster."""


def streams(pixels: Tensor) -> bool:
    """Whether to use :func:`streamed_tap_sum` for ``pixels`` (B, C, H*W).

    Partial sums are added in the map's own dtype, so it must be float32 or float64. Never under ``torch.compile``.
    """
    return (
        not torch.compiler.is_compiling()  # first: the size of a batch that is left open must not be asked for
        and pixels.device.type == "cpu"
        and pixels.dtype in (torch.float32, torch.float64)
        and pixels.stride(2) == 1
        and pixels.numel() * pixels.element_size() >= LEAST_BYTES
    )


def streamed_tap_sum(pixels: Tensor, weight: Tensor, constants: Tensor, height: int, width: int, size: int) -> Tensor:
    """Logits (B, Q, H, W) from pixels (B, C, H*W), folded weight (B, Q*k*k, C), constants (B, Q*k*k), and size k.

    What :func:`fastris.ops.similarity.shifted_tap_sum` computes; all tensors have one dtype. Differentiable twice.
    """
    return _StreamedTapSum.apply(pixels, weight, constants, height, width, size)


class _StreamedTapSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels, weight, constants, height: int, width: int, size: int) -> Tensor:
        ctx.save_for_backward(pixels, weight)
        ctx.size = size
        taps = constants[..., None].repeat(1, 1, pixels.shape[2])
        for weights, group in zip(weight.split(CHANNELS, 2), pixels.split(CHANNELS, 1), strict=True):
            taps.baddbmm_(weights, group)
        maps = taps.view(len(taps), -1, size * size, height, width)
        logits = maps[:, :, size * size // 2].clone()
        for reached, source in _shifts(size, height, width):
            logits[reached] += maps[source]
        return logits

    @staticmethod
    def backward(ctx, upstream: Tensor):
        pixels, weight = ctx.saved_tensors
        size, (height, width) = ctx.size, upstream.shape[2:]
        maps = upstream.new_zeros(*upstream.shape[:2], size * size, height, width)
        maps[:, :, size * size // 2] = upstream
        for reached, source in _shifts(size, height, width):
            maps[source] = upstream[reached]
        taps = maps.flatten(3).flatten(1, 2)
        d_pixels = torch.bmm(weight.mT, taps) if ctx.needs_input_grad[0] else None
        d_weight = torch.cat([torch.bmm(taps, group.mT) for group in pixels.split(CHANNELS_BACKWARD, 1)], 2)
        return d_pixels, d_weight, taps.sum(-1), None, None, None


def _shifts(size: int, height: int, width: int) -> Iterator[tuple[Any, Any]]:
    """For every tap but the middle one: an index into the logits (B, Q, H, W), and the index into the maps of the taps
    (B, Q, k*k, H, W) of what is added there.

    Tap t is shifted by (t // k - k // 2, t % k - k // 2), the order of ``F.fold``.
    """
    for tap in range(size * size):
        down, right = tap // size - size // 2, tap % size - size // 2
        if (down or right) and abs(down) < height and abs(right) < width:
            (to_rows, rows), (to_columns, columns) = _overlap(down, height), _overlap(right, width)
            yield (..., to_rows, to_columns), (slice(None), slice(None), tap, rows, columns)


def _overlap(shift: int, length: int) -> tuple[slice, slice]:
    """Target and source slice of a line of ``length`` pixels that is moved by ``shift``."""
    return slice(max(shift, 0), length + min(shift, 0)), slice(max(-shift, 0), length - max(shift, 0))
