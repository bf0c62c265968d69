"""AlignFormer's centre embedding: one query that starts as the sentence and reads the pixel decoder's maps in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastris.nn.positions import box_positions
from fastris.nn.separate_attention import CrossAttentionLayer, stacked
from fastris.ops.few_query_attention import few_query_attention

HEADS = 8
"""Heads of the attention, as published."""
LEVELS = 3
"""Maps that the layers read in turn."""


class QueryDecoder(nn.Module):
    """Layers without self-attention and without masks; layer i reads map i mod 3, from low to high resolution."""

    layers: Any
    table: Callable[..., Tensor] = staticmethod(box_positions)
    """The pixels' fixed positions: (height, width, pixel width, device) -> (height * width, pixel width)."""

    def __init__(self, width: int, pixel_width: int, layers: int, hidden: int):
        super().__init__()
        self.layers = stacked(CrossAttentionLayer(width, pixel_width, hidden), layers)
        self.query_embed = nn.Embedding(1, width)
        self.level_embed = nn.Embedding(LEVELS, pixel_width)
        nn.init.normal_(self.query_embed.weight)
        nn.init.normal_(self.level_embed.weight)

    def forward(self, centre: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """The embeddings (B, 1, T) before the first and after each layer, of ``centre`` (B, 1, T) and three maps."""
        positions = [self.table(each.shape[2], each.shape[3], each.shape[1], each.device) for each in maps]
        pixels = [each.flatten(2).transpose(1, 2) for each in maps]
        found = [centre]
        for number, layer in enumerate(self.layers):
            level = number % LEVELS
            attended = few_query_attention(
                centre,
                self.query_embed.weight,
                pixels[level],
                self.level_embed.weight[level],
                positions[level],
                layer.cross_attn.weights(),
                HEADS,
            )
            centre = layer.after(centre, attended)
            found.append(centre)
        return found
