"""MagNet's mask decoder: one learned query that reads three maps in turn, where its last mask says there is something.

Mask2Former's (arXiv 2112.01527) with a single query and two classes. Shapes: B batch, D width, h x w pixels of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris import reference
from fastris.dispatch import requested_impl
from fastris.nn.positions import box_positions
from fastris.nn.separate_attention import xavier
from fastris.ops.few_query_attention import few_query_attention
from fastris.reference import SeparateAttentionWeights

READ = 3
"""Maps that the layers read in turn, from low to high resolution."""


class Predictions(NamedTuple):
    """One prediction before the first layer and one after each: normed queries (B, P, D), and mask kernels (B, P, D).

    A mask is the product of its kernel with the mask features.
    """

    queries: Tensor
    kernels: Tensor


class MaskDecoder(nn.Module):
    """Layers of cross-attention, self-attention and FFN, post-norm; under the released names."""

    transformer_self_attention_layers: Any
    transformer_cross_attention_layers: Any
    transformer_ffn_layers: Any
    mask_embed: Any

    def __init__(self, width: int, layers: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.transformer_self_attention_layers = nn.ModuleList(
            _attention("self_attn", width, heads) for _ in range(layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            _attention("multihead_attn", width, heads) for _ in range(layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "linear1": nn.Linear(width, hidden),
                    "linear2": nn.Linear(hidden, width),
                    "norm": nn.LayerNorm(width),
                }
            )
            for _ in range(layers)
        )
        for part in self.children():
            xavier(part)
        self.decoder_norm = nn.LayerNorm(width)
        self.query_feat = nn.Embedding(1, width)
        self.query_embed = nn.Embedding(1, width)
        self.level_embed = nn.Embedding(READ, width)
        self.class_embed = nn.Linear(width, 2)
        self.mask_embed = nn.Module()
        self.mask_embed.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, levels: Sequence[Tensor], pixels: Tensor, mask_features: nn.Conv2d) -> Predictions:
        """Of three maps (B, D, h, w) from low to high resolution, and the largest one before ``mask_features``."""
        sizes = [(each.shape[-2], each.shape[-1]) for each in levels]
        memory = [each.flatten(2).transpose(1, 2) for each in levels]
        positions = [box_positions(*size, pixels.shape[1], pixels.device) for size in sizes]
        small = _Reduced(pixels, sizes, mask_features)
        query = self.query_feat.weight.expand(pixels.shape[0], 1, -1)
        queries, kernels = [self.decoder_norm(query)], []
        for number in range(len(self.transformer_ffn_layers)):
            level = number % READ
            kernels.append(self.kernel(queries[-1]))
            cross = self.transformer_cross_attention_layers[number]
            read = few_query_attention(
                query,
                self.query_embed.weight,
                memory[level],
                self.level_embed.weight[level],
                positions[level],
                _weights(cross["multihead_attn"]),
                self.heads,
                small.background(kernels[-1], level),
            )
            query = cross["norm"](query + read)
            query = self._alone(number, query)
            queries.append(self.decoder_norm(query))
        kernels.append(self.kernel(queries[-1]))
        return Predictions(torch.cat(queries, dim=1), torch.cat(kernels, dim=1))

    def kernel(self, normed: Tensor) -> Tensor:
        """The mask kernel of a normed query, both (..., D)."""
        first, second, last = self.mask_embed.layers
        return last(F.relu(second(F.relu(first(normed)))))

    def _alone(self, number: int, query: Tensor) -> Tensor:
        """The rest of a layer, the query (B, 1, D) being the only one: what it says to itself, and the FFN."""
        layer = self.transformer_self_attention_layers[number]
        query = layer["norm"](query + self._self_attention(layer["self_attn"], query))
        ffn = self.transformer_ffn_layers[number]
        return ffn["norm"](query + ffn["linear2"](F.relu(ffn["linear1"](query))))

    def _self_attention(self, parameters: Any, query: Tensor) -> Tensor:
        """Attention over one query: its softmax is 1, so what is left are the value and output projections."""
        weights = _weights(parameters)
        if requested_impl() == "reference":
            placed = query + self.query_embed.weight
            return reference.separate_attention(placed, placed, query, weights, self.heads)
        value = F.linear(query, weights.value_weight, weights.in_proj_bias.chunk(3)[2])
        return F.linear(value, weights.out_weight, weights.out_bias)


class _Reduced:
    """The largest map at the size of each level, where the masks between the layers are looked at.

    Mask features and masks are linear in that map, and resizing is, too. So the map is resized once instead of every
    mask, and the convolution ``mask_features`` goes into the kernels: <e, W y + b> = <W^T e, y> + <e, b>. Nothing of
    it has a gradient. The published formula makes each mask at full size and resizes it.
    """

    def __init__(self, pixels: Tensor, sizes: Sequence[tuple[int, int]], mask_features: nn.Conv2d):
        self.sizes, self.conv = sizes, mask_features
        self.published = requested_impl() == "reference"
        with torch.no_grad():
            self.maps = [self.conv(pixels)] if self.published else [_shrunk(pixels, size) for size in sizes]

    @torch.no_grad()
    def background(self, kernel: Tensor, level: int) -> Tensor:
        """Pixels (B, h * w) of a level where the mask of kernels (B, 1, D) is negative; none where it all would be."""
        hidden = self.logits(kernel, level) < 0
        return hidden & ~hidden.all(dim=1, keepdim=True)

    def logits(self, kernel: Tensor, level: int) -> Tensor:
        """The mask of kernels (B, 1, D) at the size of a level: (B, h * w)."""
        if self.published:
            logits = torch.einsum("bqd,bdhw->bqhw", kernel, self.maps[0])
            return F.interpolate(logits, self.sizes[level], mode="bilinear", align_corners=False).flatten(2)[:, 0]
        weight, bias = self.conv.weight[..., 0, 0], self.conv.bias
        assert bias is not None
        with torch.autocast(kernel.device.type, enabled=False):
            kernel = kernel.to(weight.dtype)
            folded = kernel @ weight  # [B, 1, D]
            return (folded @ self.maps[level].flatten(2) + kernel @ bias[:, None])[:, 0]


def _shrunk(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pixels, size, mode="bilinear", align_corners=False)


def _attention(name: str, width: int, heads: int) -> nn.ModuleDict:
    """The parameters of an attention, and the norm behind it."""
    return nn.ModuleDict({name: nn.MultiheadAttention(width, heads), "norm": nn.LayerNorm(width)})


def _weights(parameters: Any) -> SeparateAttentionWeights:
    """Those of an ``nn.MultiheadAttention``, for :func:`fastris.ops.few_query_attention`."""
    query, key, value = parameters.in_proj_weight.chunk(3)
    out = parameters.out_proj
    return SeparateAttentionWeights(query, key, value, parameters.in_proj_bias, out.weight, out.bias)
