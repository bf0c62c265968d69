"""Swin: timm's blocks with the padding of the segmentation Swin, its stem and its initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from fastris.nn.lean_linear import gelu_linear, linear, normed_linear, runs_as_published
from fastris.nn.window_attention import window_attention

PATCH = 4


class SwinBlock(SwinTransformerBlock):
    """timm's block with the padding of the segmentation Swin: zeros first, then the shift; windows are never clipped.

    timm shifts first, which differs wherever a map is padded by another width than the shift's. Padded pixels are keys.

    But on the reference path and under ``torch.compile``, a training step keeps less than half of what timm's block
    does, see :mod:`fastris.nn.lean_linear` and :mod:`fastris.nn.window_attention`, and can be differentiated once.
    """

    def __init__(self, width: int, num_heads: int, window: int, shifted: bool, drop_path: float):
        super().__init__(
            width,
            (window, window),
            num_heads,
            window_size=window,
            shift_size=window // 2 if shifted else 0,
            always_partition=True,
            dynamic_mask=True,
            drop_path=drop_path,
        )
        index: Any = self.attn.relative_position_index  # the released files have it
        self.attn.register_buffer("relative_position_index", index, persistent=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        if runs_as_published():
            return super().forward(x)
        norm: Any = self.norm2
        first: Any = self.mlp.fc1
        second: Any = self.mlp.fc2
        x = x + self.drop_path1(self._attended(x))
        hidden = normed_linear(x, norm, first)[1]
        return x + self.drop_path2(gelu_linear(hidden, second.weight, second.bias))

    def _attended(self, x: Tensor) -> Tensor:
        """``_attn(norm1(x))``, keeping less."""
        norm: Any = self.norm1
        attn: Any = self.attn
        qkv = normed_linear(x, norm, attn.qkv)[1]
        table = attn.relative_position_bias_table
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        fill, index = attn.qkv.bias.to(qkv.dtype), attn.relative_position_index
        read = window_attention(qkv, fill, table, index, attn.num_heads, self.shift_size[0])
        return linear(read, attn.proj.weight, attn.proj.bias)

    def _attn(self, x: Tensor) -> Tensor:
        """Attention in windows of a normed map (B, H, W, C), as published."""
        height, width = x.shape[1:3]
        side, shift = self.window_size[0], self.shift_size[0]
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        padded = x.shape
        mask = self.get_attn_mask(x) if shift else None
        if shift:
            x = torch.roll(x, (-shift, -shift), dims=(1, 2))
        windows = window_partition(x, self.window_size).view(-1, self.window_area, padded[-1])
        windows = self.attn(windows, mask=mask).view(-1, side, side, padded[-1])
        x = window_reverse(windows, self.window_size, padded[1], padded[2])
        if shift:
            x = torch.roll(x, (shift, shift), dims=(1, 2))
        return x[:, :height, :width]


def stem(embed_dim: int) -> PatchEmbed:
    """Normed patches of 4x4 pixels, images (B, 3, H, W) to (B, ceil(H/4), ceil(W/4), C); zeros pad right and bottom."""
    return PatchEmbed(None, PATCH, 3, embed_dim, nn.LayerNorm, flatten=False, output_fmt="NHWC", dynamic_img_pad=True)


def stages_of_blocks(
    embed_dim: int, depths: Sequence[int], num_heads: Sequence[int], window: int, drop_path: float
) -> list[list[SwinBlock]]:
    """The blocks of each stage; every second one is shifted, and drop path grows from 0 to ``drop_path``."""
    first = [sum(depths[:stage]) for stage in range(len(depths) + 1)]
    last = max(1, first[-1] - 1)
    return [
        [
            SwinBlock(
                embed_dim * 2**stage,
                num_heads[stage],
                window,
                shifted=bool((number - begin) % 2),
                drop_path=drop_path * number / last,
            )
            for number in range(begin, end)
        ]
        for stage, (begin, end) in enumerate(pairwise(first))
    ]


def initialise_linear(*parts: nn.Module) -> None:
    """Swin's own initialisation of the matrices in ``parts``: truncated normal of deviation 0.02, biases zero."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
