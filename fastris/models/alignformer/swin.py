"""AlignFormer's image encoder: Swin's stages of timm's blocks, each followed by attention between pixels and words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from fastris.nn.fusion import Fusion, Gate, Residuals
from fastris.nn.recompute import recomputed

PATCH = 4


class Encoded(NamedTuple):
    """What the image encoder gives: four maps (B, C_i, H / 2^(i+2), W / 2^(i+2)), and the last words (B, L, T)."""

    maps: tuple[Tensor, ...]
    words: Tensor


class SwinBlock(SwinTransformerBlock):
    """timm's block with the padding of the segmentation Swin: zeros first, then the shift; windows are never clipped.

    timm shifts first, which differs wherever a map is padded by another width than the shift's. Padded pixels are keys.
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

    def _attn(self, x: Tensor) -> Tensor:
        """Attention in windows of a normed map (B, H, W, C)."""
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


class Stage(nn.Module):
    """Swin's blocks of one resolution, the exchange with the words, its gates, and the merging to the next stage."""

    def __init__(self, blocks: Sequence[SwinBlock], width: int, text_width: int, merges: bool, intended: bool):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.fusion = Fusion(width, text_width, lone_word_is_zero=intended)
        self.res_gate = Gate(width, starts_closed=intended)
        self.sym_res_gate = Gate(text_width, starts_closed=intended)
        self.downsample = PatchMerging(width) if merges else None
        if not merges:  # nothing reads what the last gates let pass, and several processes wait for every gradient
            self.res_gate.requires_grad_(False)
            self.sym_res_gate.requires_grad_(False)

    def fuse(self, x: Tensor, words: Tensor, valid: Tensor) -> Residuals:
        """The residuals of a map (B, H, W, C) behind the blocks, its pixels row by row, and of its words (B, L, T)."""
        return self.fusion(x.flatten(1, 2), words, valid)

    def pass_on(self, x: Tensor, words: Tensor, residuals: Residuals, valid: Tensor) -> tuple[Tensor, Tensor]:
        """What the next stage gets: the gated map, merged where a stage follows, and the gated words."""
        mask = valid.to(words.dtype)[..., None]
        x = self.res_gate.apply_to(x, residuals.pixels.view_as(x))
        words = mask * self.sym_res_gate.apply_to(words, residuals.words)
        return (x if self.downsample is None else self.downsample(x)), words


class SwinWithWords(nn.Module):
    """The four stages. Each hands its *ungated* residual, behind a LayerNorm, to the decoders.

    ``recompute`` is set by :meth:`fastris.AlignFormer.set_recompute`. Each block, and each exchange with its norm and
    gates, is computed again by itself, so that one of them at a time needs its intermediate results in backward.
    """

    layers: Any
    recompute = "none"

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window: int,
        drop_path: float,
        text_width: int,
        intended: bool,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(
            None, PATCH, 3, embed_dim, nn.LayerNorm, flatten=False, output_fmt="NHWC", dynamic_img_pad=True
        )
        first = [sum(depths[:stage]) for stage in range(len(depths) + 1)]
        last = max(1, first[-1] - 1)
        stages = []
        for stage, (begin, end) in enumerate(pairwise(first)):
            width, heads = embed_dim * 2**stage, num_heads[stage]
            blocks = [
                SwinBlock(width, heads, window, shifted=bool((number - begin) % 2), drop_path=drop_path * number / last)
                for number in range(begin, end)
            ]
            stages.append(Stage(blocks, width, text_width, stage + 1 < len(depths), intended))
        self.layers = nn.ModuleList(stages)
        for stage in range(len(depths)):
            self.add_module(f"norm{stage}", nn.LayerNorm(embed_dim * 2**stage))
        self.blocks_initialised()

    def blocks_initialised(self) -> None:
        """Swin's own initialisation of its matrices: truncated normal of deviation 0.02, biases zero."""
        for stage in self.layers:
            for module in (*stage.blocks.modules(), *([stage.downsample.reduction] if stage.downsample else [])):
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, words: Tensor, valid: Tensor) -> Encoded:
        """Encode images (B, 3, H, W) with words (B, L, T), of which ``valid`` (B, L) are not padding.

        Sides that are no multiples of 4 are padded with zeros, right and bottom. The last stage's gates are not
        computed: nothing reads what they let pass.
        """
        x = self.patch_embed(images)
        maps: list[Tensor] = []
        for number, stage in enumerate(self.layers):
            normed, x, words = self._stage(number, stage, x, words, valid)
            maps.append(normed)
        return Encoded(tuple(maps), words)

    def _stage(
        self, number: int, stage: Stage, x: Tensor, words: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A stage's map for the decoders, and the map and the words that the next stage gets.

        Of the last stage the words are the residual, and the map is the one for the decoders.
        """
        norm, last = self.get_submodule(f"norm{number}"), number + 1 == len(self.layers)

        def exchange(x: Tensor, words: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            residuals = stage.fuse(x, words, valid)
            normed = norm(residuals.pixels).view_as(x).permute(0, 3, 1, 2)
            if last:
                return normed, normed, residuals.words
            return normed, *stage.pass_on(x, words, residuals, valid)

        whole = self.recompute == "stages"
        if self.recompute == "none":
            x = stage.blocks(x)
        else:
            for block in stage.blocks:
                x = recomputed([block], self.recompute, block, x, whole=whole)
        return recomputed([stage, norm], self.recompute, exchange, x, words, valid, whole=whole)
