"""What the Triton kernels read, write and multiply in a training step, from the formulas in their docstrings.

PyTorch cannot count inside a kernel, so this is written down here and not counted: one entry per launch, with the large
tensors that it has to read and write, once each. The plain PyTorch path is counted with the same operators on shapes of
CRIS-RN50 at 416x416; :func:`with_kernels` takes these out of its stages and puts the kernels in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastris import CRISConfig
from fastris.ops.absorbed_attention import absorbed_attention
from fastris.ops.contrastive import text_to_pixel_contrastive_loss
from fastris.ops.upsample_conv import upsample2x_conv3x3

from .step_traffic import Counted, Operation, count_training, merged, shapes_of

LOW, WIDE = 2, 4
"""Bytes of bfloat16 and float32."""

TAPS = 9
WORDS_BUCKET = 32
"""CRIS's 17 words are padded to this many: see kernels/cross_attention.py."""


def with_kernels(stages: Mapping[str, Counted], batch: int) -> dict[str, Counted]:
    """The stages of the torch path with the kernels' launches in place of the operators that they replace."""
    found = {name: list(counted) for name, counted in stages.items()}
    config = CRISConfig.preset("cris_r50")
    side, dim = config.input_size // 16, config.vis_dim
    with shapes_of("torch", gpu=True):
        attention = _counted_attention(batch, side * side, dim, config)
        upsampling = [
            _counted_upsampling(batch, dim, outputs, size) for outputs, size in ((dim, side), (dim // 2, 2 * side))
        ]
        similarity = _counted_similarity(batch, dim // 2, 4 * side)
    kernels = merged(attention_kernels(batch, side * side, dim, config.num_head * WORDS_BUCKET))
    for _ in range(config.num_layers):
        found["decoder"] += _without(attention) + kernels
    found["projector + loss"] += _without([*upsampling[0], *upsampling[1], *similarity]) + merged(
        [
            *upsampling_kernels(batch, dim, dim, side),
            *upsampling_kernels(batch, dim, dim // 2, 2 * side),
            *similarity_kernels(batch, dim // 2, 4 * side),
        ]
    )
    return found


def attention_kernels(batch: int, pixels: int, dim: int, columns: int) -> list[Operation]:
    """kernels/cross_attention.py and cross_attention_backward.py; the residual x is float32 under autocast."""
    x, branch, weights = (batch * pixels * n for n in (dim * WIDE, dim * LOW, columns * LOW))
    product = 2 * batch * pixels * columns * dim
    return [
        Operation("scores", product, x + weights, False),
        Operation("output", 2 * product, 2 * x + weights, False),  # multiplies twice: for the norm, and to apply it
        Operation("branch backward", 2 * product, x + weights + branch, False),
        Operation("weights backward", product, branch + 2 * weights, False),
        Operation("query backward", 2 * product, 3 * x + weights + branch, False),
        Operation("bmm of d(values)", product, weights + branch, False),
        Operation("bmm of d(keys)", product, weights + branch, False),
    ]


def upsampling_kernels(batch: int, channels: int, outputs: int, side: int) -> list[Operation]:
    """kernels/upsample_conv.py: a product into nine tap images and a gather; backward the adjoint and two products."""
    x, weight = batch * side**2 * channels * LOW, TAPS * channels * outputs * LOW
    taps, output = batch * side**2 * TAPS * outputs * LOW, 4 * batch * side**2 * outputs * LOW
    product = 2 * batch * side**2 * channels * TAPS * outputs
    return [
        Operation("taps", product, x + weight + taps, False),
        Operation("gather", 0, taps + output, False),
        Operation("adjoint gather", 0, output + taps, False),
        Operation("d(x)", product, taps + weight + x, False),
        Operation("d(weight)", product, taps + x + weight, False),
    ]


def similarity_kernels(batch: int, channels: int, side: int) -> list[Operation]:
    """kernels/similarity.py, contrastive.py and similarity_backward.py: features read twice, their gradient written."""
    pixels = batch * side**2
    features, taps, number = pixels * channels * LOW, pixels * TAPS * WIDE, pixels * WIDE
    product = 2 * pixels * channels * TAPS
    return [
        Operation("taps", product, features + taps, False),
        Operation("shifted sum and loss", 0, taps + 5 * number, False),  # two factors; logits, loss and slope
        Operation("d(features)", product, number + features, False),
        Operation("d(kernel)", product, features + number, False),
    ]


def _counted_attention(batch: int, pixels: int, dim: int, config: CRISConfig) -> Counted:
    shape = batch, config.num_head, config.word_len
    x, positions, affine = torch.empty(batch, pixels, dim), torch.empty(pixels, dim), torch.empty(5, dim)
    keys, values = (torch.empty(*shape, dim, dtype=torch.bfloat16) for _ in range(2))
    silent = torch.zeros(batch, dtype=torch.bool)

    def attend(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, affine: Tensor) -> Tensor:
        return absorbed_attention(x, positions, keys, bias, values, affine, silent, 0.0, 0.0, 1e-5)

    return _count(attend, x, keys, torch.empty(shape), values, affine)


def _counted_upsampling(batch: int, channels: int, outputs: int, side: int) -> Counted:
    x = torch.empty(batch, channels, side, side, dtype=torch.bfloat16)
    return _count(upsample2x_conv3x3, x, torch.empty(outputs, channels, 3, 3, dtype=torch.bfloat16))


def _counted_similarity(batch: int, channels: int, side: int) -> Counted:
    x = torch.empty(batch, channels, side, side, dtype=torch.bfloat16)
    kernel, mask = torch.empty(batch, channels, 3, 3), torch.empty(batch, 1, side, side)
    return _count(lambda x, kernel: text_to_pixel_contrastive_loss(x, kernel.to(x.dtype), mask), x, kernel)


def _count(work: Callable[..., Any], *tensors: Tensor) -> Counted:
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    return count_training(work, inputs, torch.float32)[1]


def _without(part: Counted) -> Counted:
    """Operations that, added to others, take these out of their sums."""
    return [{**operation, "count": -operation["count"]} for operation in part]
