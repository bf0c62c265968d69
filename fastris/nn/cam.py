"""MagNet's cross-modal alignment module: what it puts behind each stage of Swin and BERT, under the released names.

Shapes: B batch, N pixels of width C (a map H x W), L words of width T.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris import reference
from fastris.dispatch import requested_impl
from fastris.nn.fusion import Gate
from fastris.nn.positions import pyramid_spread
from fastris.nn.swin import initialise_linear
from fastris.ops.pixel_word_attention import pixel_word_attention
from fastris.ops.word_pixel_attention import word_pixel_attention
from fastris.reference import LanguageMask, PixelWordWeights, WordPixelWeights

SIDES = (1, 2, 3, 6)
"""Sides of the pooled maps."""
_REDUCTION = 4


class PixelWordAttention(nn.Module):
    """Pixels that read words; see :func:`fastris.ops.pixel_word_attention`."""

    def __init__(self, width: int, text_width: int):
        super().__init__()
        self.vis_project = nn.Sequential(nn.Conv1d(width, width, 1))
        self.image_lang_att = nn.Module()
        self.image_lang_att.f_query = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.image_lang_att.f_key = nn.Sequential(nn.Conv1d(text_width, width, 1))
        self.image_lang_att.f_value = nn.Sequential(nn.Conv1d(text_width, width, 1))
        self.image_lang_att.W = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.project_mm = nn.Sequential(nn.Conv1d(width, width, 1))

    def weights(self) -> PixelWordWeights:
        """The parameters, for the operator."""
        inner: Any = self.image_lang_att
        layers = (self.vis_project[0], *inner.f_query, inner.f_key[0], inner.f_value[0], *inner.W, self.project_mm[0])
        return PixelWordWeights(*(each for layer in layers for each in _matrix_and_bias(layer)))

    def forward(self, pixels: Tensor, words: Tensor, valid: Tensor) -> Tensor:
        """The residual (B, N, C) of pixels (B, N, C); ``valid`` (B, L) is 0 at padding."""
        return pixel_word_attention(pixels, words, valid, self.weights())


class WordPixelAttention(nn.Module):
    """Words that read pixels; see :func:`fastris.ops.word_pixel_attention`, which ``rule`` is for."""

    def __init__(self, width: int, text_width: int, rule: LanguageMask):
        super().__init__()
        self.rule = rule
        self.vis_project = nn.Sequential(nn.Linear(text_width, text_width))
        self.image_lang_att = nn.Module()
        self.image_lang_att.f_query = nn.Sequential(nn.Conv1d(text_width, text_width, 1))
        self.image_lang_att.f_key = nn.Sequential(nn.Conv1d(width, text_width, 1))
        self.image_lang_att.f_value = nn.Sequential(nn.Conv1d(width, text_width, 1))
        self.image_lang_att.W = nn.Sequential(nn.Conv1d(text_width, text_width, 1))
        self.project_mm = nn.Sequential(nn.Conv1d(text_width, text_width, 1))
        self.learns(True)

    def learns(self, wanted: bool) -> None:
        """Whether anything here is trained; queries and keys have no gradient as released, and none waits for it."""
        self.requires_grad_(wanted)
        if self.rule == "released":
            inner: Any = self.image_lang_att
            for part in (inner.f_query, inner.f_key):
                part.requires_grad_(False)

    def weights(self) -> WordPixelWeights:
        """The parameters, for the operator."""
        inner: Any = self.image_lang_att
        layers = (self.vis_project, inner.f_query, inner.f_key, inner.f_value, inner.W, self.project_mm)
        return WordPixelWeights(*(each for layer in layers for each in _matrix_and_bias(layer[0])))

    def forward(self, words: Tensor, pixels: Tensor, valid: Tensor) -> Tensor:
        """The residual (B, L, T) of words (B, L, T) that read pixels (B, N, C)."""
        return word_pixel_attention(words, pixels, valid, self.weights(), self.rule)


class Pyramid(nn.Sequential):
    """A map pooled to side x side pixels and squeezed: (B, H, W, C) to (B, side * side, C / 4)."""

    def __init__(self, width: int, side: int, expansion: int):
        super().__init__(
            nn.AdaptiveAvgPool2d(side),
            nn.Conv2d(width, expansion * width, 1, bias=False),
            nn.LayerNorm(expansion * width, eps=1e-6),
            nn.Conv2d(expansion * width, width, 1, bias=False),
            nn.GELU(),
            nn.Conv2d(width, width // _REDUCTION, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        pool, widen, norm, narrow, activation, squeeze = self
        x = pool(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        x = activation(_pointwise(narrow, norm(_pointwise(widen, x))))
        return _pointwise(squeeze, x)


class Seen(NamedTuple):
    """What a map's pixels (B, N, C) learned from the words, and the map (B, C, H, W) for the decoder."""

    residual: Tensor
    mixed: Tensor


class VisionSide(nn.Module):
    """Pixel-word attention of a map and of its four pooled ones, what mixes them, and the gate to the next stage.

    ``expansion``: how many times wider the pooled maps become in between, 4 as released. ``starts_closed``: whether the
    gate lets nothing pass at first; as released it does not.
    """

    def __init__(self, width: int, text_width: int, expansion: int = 4, starts_closed: bool = False):
        super().__init__()
        small = width // _REDUCTION
        self.fusion = PixelWordAttention(width, text_width)
        self.res_gate = Gate(width, starts_closed, activation=nn.GELU)
        self.pyramids = nn.ModuleList(Pyramid(width, side, expansion) for side in SIDES)
        self.fusions = nn.ModuleList(PixelWordAttention(small, text_width) for _ in SIDES)
        self.mixer = nn.Sequential(
            nn.Linear(len(SIDES) * small + width, width), nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()
        )
        initialise_linear(self.fusion, self.fusions, self.mixer)

    def see(self, x: Tensor, words: Tensor, valid: Tensor) -> Seen:
        """What a map (B, H, W, C) makes of the words (B, L, T)."""
        residual = self.fusion(x.flatten(1, 2), words, valid)
        size = (x.shape[1], x.shape[2])
        mixed = self.mix(self.pooled(x, words, valid), residual, size)
        return Seen(residual, mixed.transpose(1, 2).unflatten(2, size))

    def pooled(self, x: Tensor, words: Tensor, valid: Tensor) -> list[Tensor]:
        """The residuals (B, p * p, C / 4) of the pooled maps."""
        parts = zip(self.pyramids, self.fusions, strict=True)
        return [fusion(pyramid(x), words, valid) for pyramid, fusion in parts]

    def mix(self, pooled: list[Tensor], residual: Tensor, size: tuple[int, int]) -> Tensor:
        """The decoder's map (B, N, C) of those, and of the residual (B, N, C).

        The first layer is linear, and so is the resizing: instead of maps of H x W pixels, the few pooled ones go
        through it, and one product spreads them all. The published formula does the same with resized maps.
        """
        layers: Any = self.mixer
        first, norm, second, activation = layers
        if requested_impl() == "reference":
            mixed = reference.pyramid_mix(pooled, residual, size, SIDES, first.weight, first.bias)
        else:
            small = pooled[0].shape[-1]
            columns = first.weight.split([small] * len(SIDES) + [residual.shape[-1]], dim=1)
            few = torch.cat([F.linear(z, weight) for z, weight in zip(pooled, columns[:-1], strict=True)], dim=1)
            spread = pyramid_spread(*size, SIDES, residual.device).to(few.dtype)
            mixed = F.linear(residual, columns[-1], first.bias) + spread @ few
        return activation(second(norm(mixed)))


def _matrix_and_bias(layer: Any) -> tuple[Tensor, Tensor]:
    """Of a linear layer, a norm, or a convolution over single places."""
    weight = layer.weight[..., 0] if isinstance(layer, nn.Conv1d) else layer.weight
    return weight, layer.bias


def _pointwise(conv: Any, x: Tensor) -> Tensor:
    """A 1x1 convolution without bias on the last axis."""
    return F.linear(x, conv.weight[..., 0, 0])
