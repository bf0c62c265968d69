"""The projector (CRIS section 3.4): the sentence becomes a convolution kernel, its response the mask's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastris.nn.blocks import conv_layer
from fastris.ops.contrastive import text_to_pixel_contrastive_loss
from fastris.ops.similarity import text_to_pixel_similarity
from fastris.ops.upsample_conv import upsample2x_conv3x3


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
        """Logits; with a ``mask`` (B, 1, H, W) the fused text-to-pixel contrastive loss and the logits."""
        if mask is None:
            return projector_forward(self, x, word)
        return projector_loss(self, x, word, mask)


def projector_loss(projector: Any, x: Tensor, word: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, logits) of any module with the attributes of :class:`Projector`, from one pass over its last map."""
    features, kernel, bias = _features_and_kernel(projector, x, word)
    last = projector.vis[4]
    return text_to_pixel_contrastive_loss(
        features, kernel, mask, bias, pointwise_weight=last.weight, pointwise_bias=last.bias
    )


def projector_forward(projector: Any, x: Tensor, word: Tensor) -> Any:
    """The forward of any module with the attributes of :class:`Projector`: logits (B, Q, 4h, 4w) of Q text kernels.

    Where its last 1x1 convolution gives M maps of in_dim channels, all are scored by the one text kernel, and the
    answer is a tuple of M logits (B, 1, 4h, 4w).
    """
    last = projector.vis[4]
    maps = last.out_channels // projector.in_dim
    features, kernel, bias = _features_and_kernel(projector, x, word)
    if maps > 1:
        kernel, bias = _kernel_of_each_map(kernel[:, 0], maps), bias.expand(-1, maps)
    logits = text_to_pixel_similarity(features, kernel, bias, pointwise_weight=last.weight, pointwise_bias=last.bias)
    return tuple(one.contiguous() for one in logits.split(1, dim=1)) if maps > 1 else logits


def text_projection(projector: Any) -> Any:
    """The module that projects the sentence: ``txt``, or ``txt_fc`` where there are several text kernels."""
    return projector.txt if hasattr(projector, "txt") else projector.txt_fc


def _features_and_kernel(projector: Any, x: Tensor, word: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The map before the last 1x1 convolution (B, C, 4h, 4w), text kernels (B, Q, in_dim, k, k) and biases (B, Q).

    The text projection gives all kernels first and then all biases.
    """
    for convolution, norm, activation in (projector.vis[1], projector.vis[3]):
        x = activation(norm(upsample2x_conv3x3(x, convolution.weight, convolution.bias)))
    parameters = text_projection(projector)(word)
    size = projector.kernel_size
    queries = parameters.shape[-1] // (projector.in_dim * size * size + 1)
    kernels = parameters[:, :-queries].reshape(-1, queries, projector.in_dim, size, size)
    return x, kernels, parameters[:, -queries:]


def _kernel_of_each_map(kernel: Tensor, maps: int) -> Tensor:
    """(B, C, k, k) -> (B, M, M*C, k, k): query m is the kernel on the channels of map m and zero on the others."""
    own = torch.eye(maps, dtype=kernel.dtype, device=kernel.device)[None, :, :, None, None, None]
    return (own * kernel[:, None, None]).flatten(2, 3)
