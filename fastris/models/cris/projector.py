"""The projector (CRIS section 3.4): a convolution with a kernel computed from the sentence gives the mask's logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.nn.blocks import conv_layer
from fastris.nn.upsample_norm import upsampled_and_normed, upsampled_to_be_scored
from fastris.ops.contrastive import text_to_pixel_contrastive_loss
from fastris.ops.similarity import text_to_pixel_similarity
from fastris.reference import PixelNorm


class Projector(nn.Module):
    """CRIS's projector under its published name, arguments, defaults and state-dict keys.

    ``forward(x, word)`` takes ``x`` (B, 2*in_dim, h, w) and the sentence ``word`` (B, word_dim) and returns logits
    (B, 1, 4h, 4w). ``txt`` projects the sentence to in_dim*k*k + 1 numbers: its own k x k kernel, laid out
    (in_dim, k, k), and last its bias.
    """

    def __init__(self, word_dim: int = 1024, in_dim: int = 256, kernel_size: int = 3):
        super().__init__()
        self.in_dim = in_dim
        self.kernel_size = kernel_size
        self.vis = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv_layer(in_dim * 2, in_dim * 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv_layer(in_dim * 2, in_dim, 3, padding=1),
            nn.Conv2d(in_dim, in_dim, 1),
        )
        self.txt = nn.Linear(word_dim, in_dim * kernel_size * kernel_size + 1)

    def forward(self, x: Tensor, word: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The logits; with a ``mask`` (B, 1, H, W), the fused text-to-pixel contrastive loss and the logits."""
        if mask is None:
            return projector_forward(self, x, word)
        return projector_loss(self, x, word, mask)


class Reading(NamedTuple):
    """The layout of a projector's parameters and output, in which variants of CRIS differ.

    The last 1x1 convolution gives M maps and the text projection Q kernels, followed by all biases. Either Q kernels
    score one map, or one kernel scores M maps.

    Attributes:
        kernels: Q, the number of text kernels.
        size: k, the side of a text kernel.
        order: for each logit map, the index of the map that it scores.
        biases: for each logit map, the index of its bias.
        padding: of the text convolution, in pixels.
        form: ``Tensor`` for one tensor (B, Q or M, h, w); else the container of one tensor (B, 1, h, w) each.
    """

    kernels: int
    size: int
    order: tuple[int, ...]
    biases: tuple[int, ...]
    padding: int
    form: type


def published_reading(projector: Any) -> Reading:
    """The published layout, from ``in_dim`` and ``kernel_size``; M > 1 maps give a tuple of logits."""
    size, last, text = projector.kernel_size, projector.vis[4], text_projection(projector)
    maps = last.out_channels // projector.in_dim
    outputs = (text if isinstance(text, nn.Linear) else text[0]).out_features
    if maps > 1:
        return Reading(1, size, tuple(range(maps)), (0,) * maps, size // 2, tuple)
    kernels = outputs // (projector.in_dim * size * size + 1)
    return Reading(kernels, size, (0,) * kernels, tuple(range(kernels)), size // 2, Tensor)


def projector_loss(projector: Any, x: Tensor, word: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, logits) of any module with the attributes of :class:`Projector`, from one pass over its last map."""
    parameters = text_projection(projector)(word)
    kernel, bias = _kernels_and_biases(parameters, published_reading(projector))
    last = projector.vis[4]
    features, norm = _features(projector.vis, x, "text_to_pixel_contrastive_loss", kernel)
    return text_to_pixel_contrastive_loss(
        features, kernel, mask, bias, pointwise_weight=last.weight, pointwise_bias=last.bias, norm=norm
    )


def projector_forward(projector: Any, x: Tensor, word: Tensor) -> Any:
    """The forward of any module with the attributes of :class:`Projector`: logits (B, Q, 4h, 4w) of Q text kernels.

    Where its last 1x1 convolution gives M maps of in_dim channels, all are scored by the one text kernel, and the
    answer is a tuple of M logits (B, 1, 4h, 4w).
    """
    return score(projector.vis, text_projection(projector), published_reading(projector), x, word)


def text_projection(projector: Any) -> Any:
    """The module that projects the sentence: ``txt``, or ``txt_fc`` where there are several text kernels."""
    return projector.txt if hasattr(projector, "txt") else projector.txt_fc


def score(vis: Any, text: Any, reading: Reading, x: Tensor, word: Tensor) -> Any:
    """Logits of a projector with the layers ``vis``, the text projection ``text`` and the layout ``reading``.

    ``vis`` is (upsampling, block, upsampling, block, 1x1 convolution), a block being (3x3 convolution, norm,
    activation). The upsamplings are not called: they are part of the operator.
    """
    kernels, biases = _kernels_and_biases(text(word), reading)
    # Padding beyond the operator's k // 2. Only a 1x1 kernel has more, and outside the map its logit is its bias.
    more = reading.padding - reading.size // 2
    features, norm = _features(vis, x, "text_to_pixel_similarity", kernels)
    logits = text_to_pixel_similarity(
        features,
        kernels,
        None if more > 0 else biases,
        pointwise_weight=vis[4].weight,
        pointwise_bias=vis[4].bias,
        norm=norm,
    )
    if more > 0:
        logits = F.pad(logits, (more,) * 4) + biases.to(logits.dtype)[:, :, None, None]
    elif more < 0:
        logits = logits[:, :, -more:more, -more:more].contiguous()
    if reading.form is Tensor:
        return logits
    return reading.form(one.contiguous() for one in logits.split(1, dim=1))


def block_maps(vis: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The maps behind the two blocks: (B, C', 2h, 2w), and the one before the last 1x1 convolution, (B, C, 4h, 4w)."""
    maps = []
    for convolution, norm, activation in (vis[1], vis[3]):
        x = activation(upsampled_and_normed(x, convolution, norm))
        maps.append(x)
    return maps[0], maps[1]


def _features(vis: Any, x: Tensor, operator: str, kernels: Tensor) -> tuple[Tensor, PixelNorm | None]:
    """The map before the last 1x1 convolution, (B, C, 4h, 4w), and the norm that is left for ``operator`` to apply.

    ``kernels`` (B, Q, C, k, k) are what it will score the map with.
    """
    convolution, norm, activation = vis[1]
    x = activation(upsampled_and_normed(x, convolution, norm))
    return upsampled_to_be_scored(x, vis[3], operator, kernels.shape[1] * kernels.shape[-1] ** 2)


def _kernels_and_biases(parameters: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """Text kernels (B, Q, C, k, k) over all maps' channels and biases (B, Q), one of each for each logit map."""
    count = max(reading.biases) + 1
    kernels = parameters[:, :-count].unflatten(1, (reading.kernels, -1, reading.size, reading.size))
    biases = parameters[:, -count:]
    if reading.biases != tuple(range(count)):
        biases = torch.stack([biases[:, place] for place in reading.biases], dim=1)
    return (kernels if max(reading.order) == 0 else _kernel_of_each_map(kernels[:, 0], reading.order)), biases


def _kernel_of_each_map(kernel: Tensor, order: tuple[int, ...]) -> Tensor:
    """(B, C, k, k) -> (B, M, M*C, k, k): query m is the kernel on the channels of map order[m], zero on the others."""
    own = torch.eye(len(order), dtype=kernel.dtype, device=kernel.device)
    if order != tuple(range(len(order))):
        own = torch.stack([own[place] for place in order])
    return (own[None, :, :, None, None, None] * kernel[:, None, None]).flatten(2, 3)
