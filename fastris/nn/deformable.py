"""The layer of deformable attention that the pixel decoders of several systems are stacks of.

Shapes: B batch, D width, M pixels of all maps one behind the other (low to high resolution).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.nn.lean_linear import Linear, normed_linear, runs_as_published
from fastris.nn.plain_modules import is_plainly
from fastris.nn.separate_attention import xavier
from fastris.ops.multiscale_deformable_attention import multiscale_deformable_attention


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention with its four projections, of a map's pixels over all maps."""

    def __init__(self, width: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = Linear(width, heads * levels * points * 2)
        self.attention_weights = Linear(width, heads * levels * points)
        self.value_proj = Linear(width, width)
        self.output_proj = Linear(width, width)
        xavier(self)
        self.reset()

    def reset(self) -> None:
        """Samples start 1 to 4 pixels away in eight directions, one for each head, all with the same weight."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # [H, 2]
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        start = (direction[:, None, None] * steps[:, None]).expand(self.heads, self.levels, self.points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(start.flatten())
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, value: Tensor, sizes: Sequence[tuple[int, int]], places: Tensor) -> Tensor:
        """Queries and values (B, M, D) of maps of these sizes, whose centres are ``places`` (M, 2): (B, M, D)."""
        batch, count, width = query.shape
        sampled = multiscale_deformable_attention(
            self.value_proj(value).view(batch, count, self.heads, width // self.heads),
            sizes,
            places,
            self.sampling_offsets(query).view(batch, count, self.heads, self.levels, self.points, 2),
            self.attention_weights(query).view(batch, count, self.heads, self.levels * self.points),
        )
        return self.output_proj(sampled)


class DeformableLayer(nn.Module):
    """``y = LN(y + attention(y + positions, y))``, then ``y = LN(y + FFN(y))``."""

    def __init__(self, width: int, hidden: int, heads: int, levels: int, points: int):
        super().__init__()
        self.self_attn = DeformableAttention(width, heads, levels, points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = Linear(width, hidden)
        self.linear2 = Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)
        xavier(self.linear1)
        xavier(self.linear2)

    def forward(self, y: Tensor, positions: Tensor, sizes: Sequence[tuple[int, int]], places: Tensor) -> Tensor:
        """(B, M, D) to (B, M, D); ``positions`` (M, D)."""
        attended = y + self.self_attn(y + positions, y, sizes, places)
        if runs_as_published() or not (is_plainly(nn.LayerNorm, self.norm1) and is_plainly(Linear, self.linear1)):
            y = self.norm1(attended)
            hidden = self.linear1(y)  # an adapter in its place is heard
        else:
            y, hidden = normed_linear(attended, self.norm1, self.linear1)
        return self.norm2(y + self.linear2(F.relu(hidden)))
