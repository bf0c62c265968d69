"""AlignFormer's image encoder: Swin's stages of timm's blocks, each followed by attention between pixels and words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from fastris.nn.fusion import Fusion, Gate, Residuals
from fastris.nn.recompute import recomputed
from fastris.nn.swin import SwinBlock, initialise_linear, stages_of_blocks, stem


class Encoded(NamedTuple):
    """What the image encoder gives: four maps (B, C_i, H / 2^(i+2), W / 2^(i+2)), and the last words (B, L, T)."""

    maps: tuple[Tensor, ...]
    words: Tensor


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
        self.patch_embed = stem(embed_dim)
        stages = [
            Stage(blocks, embed_dim * 2**stage, text_width, stage + 1 < len(depths), intended)
            for stage, blocks in enumerate(stages_of_blocks(embed_dim, depths, num_heads, window, drop_path))
        ]
        self.layers = nn.ModuleList(stages)
        for stage in range(len(depths)):
            self.add_module(f"norm{stage}", nn.LayerNorm(embed_dim * 2**stage))
        for each in stages:
            initialise_linear(each.blocks, *([each.downsample.reduction] if each.downsample else []))

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
