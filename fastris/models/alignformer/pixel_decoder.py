"""AlignFormer's pixel decoder: deformable attention over three maps, attention to words, and an FPN step.

Shapes: B batch, D width, M pixels of the three maps one behind the other (low to high resolution), L words of width T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris import reference
from fastris.models.alignformer.config import HEADS, LEVELS, POINTS
from fastris.models.swin_bert import NORM_GROUPS
from fastris.nn.deformable import DeformableLayer
from fastris.nn.recompute import recomputed
from fastris.nn.separate_attention import CrossAttentionLayer, stacked, xavier
from fastris.ops.word_attention import word_attention


class Words(NamedTuple):
    """A batch of sentences: states (B, L, T), 0 at padding, and ``valid`` (B, L), False there."""

    states: Tensor
    valid: Tensor


class Decoded(NamedTuple):
    """Three maps (B, D, h, w) from low to high resolution, and the map (B, D, H/4, W/4) before ``mask_features``.

    Whoever scores that map folds the convolution into the kernels.
    """

    levels: tuple[Tensor, ...]
    pixels: Tensor


class Encoder(nn.Module):
    """The layers in turn: pixels look at each other, then at the words.

    ``recompute`` is set by :meth:`fastris.AlignFormer.set_recompute`; each layer is computed again by itself.
    """

    layers: Any
    cross_attn_layers: Any
    recompute = "none"

    def __init__(self, width: int, text_width: int, word_len: int, layers: int, pixel_ffn: int, word_ffn: int):
        super().__init__()
        self.key_embed = nn.Embedding(word_len, text_width)
        self.layers = stacked(DeformableLayer(width, pixel_ffn, HEADS, LEVELS, POINTS), layers)
        self.cross_attn_layers = stacked(CrossAttentionLayer(width, text_width, word_ffn), layers)

    def forward(
        self, y: Tensor, positions: Tensor, sizes: Sequence[tuple[int, int]], places: Tensor, words: Words
    ) -> Tensor:
        """(B, M, D) to (B, M, D); ``positions`` (M, D) with their level's embedding, ``places`` (M, 2)."""
        keys = words.states + self.key_embed.weight[: words.states.shape[1]]
        padding = ~words.valid
        padding = padding & ~padding.all(dim=1, keepdim=True)  # nothing but padding: its zeros are heard
        for look, listen in zip(self.layers, self.cross_attn_layers, strict=True):

            def layer(y: Tensor, keys: Tensor, states: Tensor, look: Any = look, listen: Any = listen) -> Tensor:
                y = look(y, positions, sizes, places)
                weights = listen.cross_attn.weights()
                return listen.after(y, word_attention(y + positions, keys, states, weights, HEADS, padding))

            whole = self.recompute == "stages"
            y = recomputed([look, listen], self.recompute, layer, y, keys, words.states, whole=whole)
        return y


class PixelTransformer(nn.Module):
    """The encoder and the embedding of the three resolutions."""

    def __init__(self, encoder: Encoder, width: int):
        super().__init__()
        self.encoder = encoder
        self.level_embed = nn.Parameter(torch.empty(LEVELS, width))


class PixelDecoder(nn.Module):
    """See the module. ``widths`` are those of the four maps, from high to low resolution."""

    input_proj: Any
    mask_features: Any
    adapter_1: Any
    layer_1: Any

    def __init__(
        self,
        widths: Sequence[int],
        width: int,
        text_width: int,
        word_len: int,
        layers: int,
        pixel_ffn: int,
        word_ffn: int,
    ):
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(each, width, 1), nn.GroupNorm(NORM_GROUPS, width)) for each in widths[:0:-1]
        )
        encoder = Encoder(width, text_width, word_len, layers, pixel_ffn, word_ffn)
        self.transformer = PixelTransformer(encoder, width)
        self.mask_features = nn.Conv2d(width, width, 1)
        self.adapter_1 = nn.Sequential(nn.Conv2d(widths[0], width, 1, bias=False), nn.GroupNorm(NORM_GROUPS, width))
        self.layer_1 = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(NORM_GROUPS, width), nn.ReLU()
        )
        self._reset()

    def _reset(self) -> None:
        """The released initialisation."""
        xavier(self.transformer.encoder.key_embed)
        nn.init.normal_(self.transformer.level_embed)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for conv in (self.mask_features, self.adapter_1[0], self.layer_1[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, maps: Sequence[Tensor], words: Words) -> Decoded:
        """Decode the encoder's four maps with the words. Runs in the weights' dtype: autocast is off, as released."""
        with torch.autocast(maps[0].device.type, enabled=False):
            dtype = self.mask_features.weight.dtype
            words = words._replace(states=words.states.to(dtype))
            return self._decode([each.to(dtype) for each in maps], words)

    def _decode(self, maps: Sequence[Tensor], words: Words) -> Decoded:
        levels = self.decode_levels(maps[1:], words)
        lateral = self.adapter_1(maps[0])
        up = F.interpolate(levels[-1], lateral.shape[-2:], mode="bilinear", align_corners=False)
        return Decoded(levels, self.layer_1(lateral + up))

    def decode_levels(self, maps: Sequence[Tensor], words: Words) -> tuple[Tensor, ...]:
        """The three maps, given from high to low resolution, after the transformer: from low to high."""
        projected = [project(each) for project, each in zip(self.input_proj, reversed(maps), strict=True)]
        sizes = [(each.shape[-2], each.shape[-1]) for each in projected]
        y = torch.cat([each.flatten(2).transpose(1, 2) for each in projected], dim=1)
        positions = torch.cat(
            [
                reference.sine_positions_of_box(*size, y.shape[-1], y.device).to(y.dtype) + level
                for size, level in zip(sizes, self.transformer.level_embed, strict=True)
            ]
        )
        y = self.transformer.encoder(y, positions, sizes, reference.pixel_centres(sizes, y.device), words)
        parts = y.split([height * width for height, width in sizes], dim=1)
        return tuple(part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True))
