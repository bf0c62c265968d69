"""What AlignFormer puts behind each stage of Swin: bidirectional attention between pixels and words, and two gates.

Shapes: B batch, N pixels of width C, L words of width T. Parameters have the released names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.nn.lean_linear import Linear, gelu_linear, linear
from fastris.ops.bidirectional_attention import bidirectional_attention
from fastris.reference import BidirectionalAttentionWeights


class Residuals(NamedTuple):
    """What pixels (B, N, C) and words (B, L, T) learned from each other; words are 0 at padding."""

    pixels: Tensor
    words: Tensor


class Attended(NamedTuple):
    """What pixels (B, N, C) read from the words, and words (B, L, T) from the pixels."""

    pixels: Tensor
    words: Tensor


class Fusion(nn.Module):
    """Attention in both directions, and on each side two projections of what a place is and what it has read."""

    def __init__(self, width: int, text_width: int, lone_word_is_zero: bool):
        super().__init__()
        self.lone_word_is_zero = lone_word_is_zero
        self.vis_project = nn.Sequential(nn.Conv1d(width, width, 1), nn.GELU())
        self.lang_project = nn.Sequential(nn.Conv1d(text_width, text_width, 1), nn.GELU())
        self.image_lang_att = _Projections(width, text_width)
        self.project_mm = _two_layers(width)
        self.sym_project_mm = _two_layers(text_width)

    def attend(self, pixels: Tensor, words: Tensor, valid: Tensor) -> Attended:
        """See :func:`fastris.ops.bidirectional_attention`."""
        return self._attend(pixels, words, valid)

    def forward(self, pixels: Tensor, words: Tensor, valid: Tensor) -> Residuals:
        """Residuals of pixels (B, N, C) and words (B, L, T); ``valid`` (B, L) is 0 at padding."""
        mask = valid.to(words.dtype)[..., None]
        first: Any = self.project_mm[0]
        own, attended_weight = first.weight[..., 0].chunk(2, dim=1)  # of [seen, attended]; the latter is absorbed
        attended = self._attend(pixels, words, valid, attended_weight)
        seen = gelu_linear(_pointwise(self.vis_project[0], pixels), own, first.bias)
        said = mask * F.gelu(_pointwise(self.lang_project[0], words))
        second: Any = self.project_mm[3]
        return Residuals(
            F.gelu(gelu_linear(seen + attended.pixels, second.weight[..., 0], second.bias)),
            mask * _mixed(self.sym_project_mm, torch.cat([said, attended.words], dim=-1)),
        )

    def _attend(self, pixels: Tensor, words: Tensor, valid: Tensor, project_weight: Tensor | None = None) -> Attended:
        weights, zero = self.image_lang_att.weights(), self.lone_word_is_zero
        found = bidirectional_attention(
            pixels, words, valid, weights, project_weight=project_weight, lone_word_is_zero=zero
        )
        return Attended(*found)


class Gate(nn.Sequential):
    """``x + tanh(G2 f(G1 r)) r``: how much of a residual r goes on, at each place and channel; f is ReLU or another."""

    def __init__(self, width: int, starts_closed: bool, activation: type[nn.Module] = nn.ReLU):
        first, second = (Linear(width, width, bias=False) for _ in range(2))
        super().__init__(first, activation(), second, nn.Tanh())
        nn.init.trunc_normal_(first.weight, std=0.02)
        if starts_closed:  # with both matrices zero it could never learn
            nn.init.zeros_(second.weight)
        else:
            nn.init.trunc_normal_(second.weight, std=0.02)

    def apply_to(self, x: Tensor, residual: Tensor) -> Tensor:
        """x plus the gated residual, both (..., width)."""
        return x + self(residual) * residual


class _Projections(nn.Module):
    """The parameters of the attention, under the released names: ``query.0``, ``key``, ``value``, ``W.0``, ..."""

    def __init__(self, width: int, text_width: int):
        super().__init__()
        self.query = nn.Sequential(nn.Conv1d(width, width, 1))
        self.key = nn.Conv1d(text_width, width, 1)
        self.value = nn.Conv1d(text_width, width, 1)
        self.W = nn.Sequential(nn.Conv1d(width, width, 1))
        self.sym_value = nn.Sequential(nn.Conv1d(width, text_width, 1))
        self.sym_W = nn.Conv1d(text_width, text_width, 1)

    def weights(self) -> BidirectionalAttentionWeights:
        """They, as matrices and biases."""
        parts: Any = (self.query[0], self.key, self.value, self.W[0], self.sym_value[0], self.sym_W)
        return BidirectionalAttentionWeights(*(each for conv in parts for each in (conv.weight[..., 0], conv.bias)))


def _two_layers(width: int) -> nn.Sequential:
    """2 width -> width -> width; the released code has a dropout of 0 behind each GELU, hence the numbers 0 and 3."""
    none = nn.Identity()
    return nn.Sequential(nn.Conv1d(2 * width, width, 1), nn.GELU(), none, nn.Conv1d(width, width, 1), nn.GELU())


def _mixed(layers: nn.Sequential, x: Tensor) -> Tensor:
    return F.gelu(_pointwise(layers[3], F.gelu(_pointwise(layers[0], x))))


def _pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution on the last axis: (..., C) -> (..., C')."""
    assert isinstance(conv, nn.Conv1d)
    return linear(x, conv.weight[..., 0], conv.bias)
