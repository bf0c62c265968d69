"""Bidirectional attention between pixels and words on a CRIS, as a switch: AlignFormer's, arXiv 2301.06429.

Each exchange changes a map and the words by gated residuals (:mod:`fastris.nn.fusion`), and both go on. Its gates start
closed, so that a new model computes what CRIS computes.

``neck``: between the images' encoding and the neck's ``fuse``, on f3, f4 and f5 in that order. This place is ours; an
image is still encoded once for all phrases. ``trunk``: behind each of the ResNet's four stages, which is AlignFormer's
place in its Swin. There the *ungated* residual, behind a LayerNorm, goes to the decoders, and the gated map only to the
next stage; that the gated map goes on everywhere is ours, because only so does the model start as CRIS.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastris.models.cris.config import CRISConfig
from fastris.nn.clip import DenseResNet
from fastris.nn.fusion import Fusion, Gate


class Exchange(Fusion):
    """Attention in both directions and its two gates, under AlignFormer's names."""

    def __init__(self, width: int, text_width: int):
        super().__init__(width, text_width, lone_word_is_zero=True)
        self.res_gate = Gate(width, starts_closed=True)
        self.sym_res_gate = Gate(text_width, starts_closed=True)

    def forward(self, x: Tensor, words: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """A map (B, C, H, W) and the words (B, L, T), changed; ``valid`` (B, L) is False at padding, whose rows are 0.

        The map keeps its memory format.
        """
        pixels = x.flatten(2).transpose(1, 2)
        residuals = super().forward(pixels, words, valid)
        pixels = self.res_gate.apply_to(pixels, residuals.pixels)
        words = valid.to(words.dtype)[..., None] * self.sym_res_gate.apply_to(words, residuals.words)
        return pixels.transpose(1, 2).unflatten(2, x.shape[2:]), words


def exchanges(config: CRISConfig) -> Any:
    """The ``nn.ModuleList`` of a configuration's exchanges; None where it has none."""
    widths = config.vlba_widths
    return nn.ModuleList(Exchange(width, config.vis_dim) for width in widths) if widths else None


def encode_with_words(
    visual: DenseResNet, exchanges: Any, images: Tensor, words: Tensor, valid: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """C3, C4, C5 of ``images`` (E, 3, H, W), one for each sentence, and the words after the last stage."""
    x, maps = visual.stem_map(images), []
    for number, exchange in enumerate(exchanges, 1):
        x, words = visual.stage(number, x, exchange, words, valid)
        maps.append(x)
    return (maps[1], maps[2], maps[3]), words
