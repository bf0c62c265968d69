"""MagNet's two encoders: Swin and BERT stage by stage, each followed by what pixels and words learn from each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from fastris.models.magnet.config import STAGES
from fastris.nn.bert import TextEncoder
from fastris.nn.cam import VisionSide, WordPixelAttention
from fastris.nn.fusion import Gate
from fastris.nn.recompute import recomputed
from fastris.nn.swin import SwinBlock, initialise_linear, stages_of_blocks, stem
from fastris.reference import LanguageMask


class Encoded(NamedTuple):
    """Four maps (B, C_i, H / 2^(i+2), W / 2^(i+2)) for the decoder, and the last gated words (B, L, T), if wanted."""

    maps: tuple[Tensor, ...]
    words: Tensor | None


class Stage(VisionSide):
    """Swin's blocks of one resolution, what their map makes of the words, and the merging to the next stage."""

    def __init__(self, blocks: Sequence[SwinBlock], width: int, text_width: int, merges: bool):
        super().__init__(width, text_width)
        self.blocks = nn.Sequential(*blocks)
        self.downsample = PatchMerging(width) if merges else None
        initialise_linear(self.blocks, *([self.downsample.reduction] if self.downsample else []))
        if not merges:  # nothing reads what the last gate lets pass, and several processes wait for every gradient
            self.res_gate.requires_grad_(False)

    def pass_on(self, x: Tensor, residual: Tensor) -> Tensor:
        """What the next stage gets of a map (B, H, W, C): gated, and merged where a stage follows."""
        x = self.res_gate.apply_to(x, residual.view_as(x))
        return x if self.downsample is None else self.downsample(x)


class ImageModel(nn.Module):
    """The stem and the four stages. The output norms are in the released files, and nothing uses them."""

    layers: Any

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window: int,
        drop_path: float,
        text_width: int,
    ):
        super().__init__()
        self.patch_embed = stem(embed_dim)
        self.layers = nn.ModuleList(
            Stage(blocks, embed_dim * 2**stage, text_width, merges=stage + 1 < len(depths))
            for stage, blocks in enumerate(stages_of_blocks(embed_dim, depths, num_heads, window, drop_path))
        )
        for stage in range(len(depths)):
            self.add_module(f"norm{stage}", nn.LayerNorm(embed_dim * 2**stage).requires_grad_(False))


class LanguageModel(TextEncoder):
    """BERT in four parts, and behind each what its words learn from the pixels.

    ``norms`` are in the released files for residuals that its forward pass does not use. The gates start closed: the
    second matrix alone is zero, since with both it could never learn.
    """

    pwams: Any
    res_gates: Any
    norms: Any

    def __init__(self, sizes: Any, widths: Sequence[int], rule: LanguageMask):
        super().__init__(sizes, "MagNet")
        text_width = sizes.hidden_size
        self.pwams = nn.ModuleList(WordPixelAttention(width, text_width, rule) for width in widths)
        self.res_gates = nn.ModuleList(Gate(text_width, starts_closed=True) for _ in widths)
        self.norms = nn.ModuleList(nn.LayerNorm(text_width) for _ in widths)
        self.norms.requires_grad_(False)
        initialise_linear(self.pwams)
        self.ask_last_words(False)

    def ask_last_words(self, wanted: bool) -> None:
        """Whether the last stage's words are ever asked for; else its language side has no gradient to wait for."""
        self.pwams[-1].learns(wanted)
        self.res_gates[-1].requires_grad_(wanted)

    def listen(self, number: int, words: Tensor, pixels: Tensor, valid: Tensor) -> Tensor:
        """The gated words (B, L, T) of a stage that read its pixels (B, N, C).

        Behind a closed gate they are the words, bit for bit, and nothing is read: the released gates start closed and
        cannot learn. It is looked for without gradients on a CPU, where looking does not wait for a device.
        """
        if _is_closed(self.res_gates[number]):
            return words
        return self.res_gates[number].apply_to(words, self.pwams[number](words, pixels, valid))


def _is_closed(gate: Gate) -> bool:
    last: Any = gate[2]
    looks = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return looks and type(last.weight) is nn.Parameter and last.weight.device.type == "cpu" and not last.weight.any()


def encode(
    image_model: ImageModel,
    language_model: LanguageModel,
    images: Tensor,
    tokens: Tensor,
    recompute: str,
    last_words: bool = False,
) -> Encoded:
    """Encode images (B, 3, H, W) with sentences (B, L), padding 0; both sides of a stage read what was before them.

    Sides that are no multiples of 4 are padded with zeros, right and bottom. Each block, each part of BERT and each
    exchange is computed again by itself, as ``recompute`` says. What nothing reads is not computed: the last stage's
    gate, and its language side unless ``last_words`` are asked for.
    """
    valid = tokens != 0
    x = image_model.patch_embed(images)
    words, mask = language_model.embed(tokens, valid)
    whole, maps = recompute == "stages", []
    for number, stage in enumerate(image_model.layers):
        for block in stage.blocks:
            x = recomputed([block], recompute, block, x, whole=whole)
        words = language_model.part(number, STAGES, words, mask)
        last = number + 1 == STAGES

        def exchange(
            x: Tensor, words: Tensor, valid: Tensor, number: int = number, stage: Any = stage, last: bool = last
        ) -> tuple[Tensor, Tensor, Tensor]:
            seen = stage.see(x, words, valid)
            heard = words if last and not last_words else language_model.listen(number, words, x.flatten(1, 2), valid)
            return seen.mixed, (x if last else stage.pass_on(x, seen.residual)), heard

        parts = [stage, language_model.pwams[number], language_model.res_gates[number]]
        mixed, x, words = recomputed(parts, recompute, exchange, x, words, valid, whole=whole)
        maps.append(mixed)
    return Encoded(tuple(maps), words if last_words else None)
