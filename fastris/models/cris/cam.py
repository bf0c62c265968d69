"""MagNet's cross-modal alignment module on a CRIS, as a switch: arXiv 2312.12198.

``trunk``: behind layer2, layer3 and layer4 of CLIP's ResNet, before its attention pool, and behind each third of the
text encoder's layers. Both sides read what was before the exchange. The map that goes on is ``x + tanh(W_2 GELU(W_1 s))
s`` with s the mixer's output, so that the pooled maps take part; it goes into the next layer and into the neck. What
differs from MagNet is ours: the gate is on s, the pooled maps are not widened, and ``W_2`` and the words' second matrix
start at zero, so that a new model computes what CRIS computes. Padding changes nothing (``language_mask`` "masked").
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fastris.models.cris.config import CRISConfig
from fastris.nn.cam import VisionSide, WordPixelAttention
from fastris.nn.clip import CLIPBackbone
from fastris.nn.fusion import Gate
from fastris.nn.swin import initialise_linear

STAGES = (2, 3, 4)
"""The ResNet's stages with a module behind them; the text encoder is cut into as many parts."""


class AlignmentModule(VisionSide):
    """What a stage's pixels and words learn from each other, and the gates, under MagNet's names."""

    def __init__(self, width: int, text_width: int):
        super().__init__(width, text_width, expansion=1, starts_closed=True)
        self.pwam = WordPixelAttention(width, text_width, "masked")
        self.sym_res_gate = Gate(text_width, starts_closed=True)
        initialise_linear(self.pwam)

    def forward(self, x: Tensor, words: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """A map (B, C, H, W) and the words (B, L, T), changed; ``valid`` (B, L) is False at padding."""
        pixels = x.permute(0, 2, 3, 1)
        mixed = self.see(pixels, words, valid).mixed.permute(0, 2, 3, 1)
        heard = self.pwam(words, pixels.flatten(1, 2), valid)
        return self.res_gate.apply_to(pixels, mixed).permute(0, 3, 1, 2), self.sym_res_gate.apply_to(words, heard)


class Encoded(NamedTuple):
    """C3, C4, C5 of E images, the words (E, L, T) and the sentences' states (E, S)."""

    maps: tuple[Tensor, ...]
    words: Tensor
    state: Tensor


def alignment_modules(config: CRISConfig) -> Any:
    """The ``nn.ModuleList`` of a configuration's modules; None where it has none."""
    widths = config.alignment_widths
    return nn.ModuleList(AlignmentModule(width, config.vis_dim) for width in widths) if widths else None


def encode_aligned(backbone: CLIPBackbone, modules: Any, images: Tensor, tokens: Tensor) -> Encoded:
    """Encode ``images`` (E, 3, H, W), one for each sentence of ``tokens`` (E, L), padding 0, stage by stage."""
    valid, visual = tokens != 0, backbone.visual
    x = visual.stage(1, visual.stem_map(images))
    words, maps = backbone.embed_text(tokens), []
    for part, (number, module) in enumerate(zip(STAGES, modules, strict=True)):
        words = backbone.text_part(part, len(STAGES), words)
        x, words = visual.stage(number, x, module, words, valid)
        maps.append(x)
    words = backbone.ln_final(words)
    return Encoded(tuple(maps), words, backbone.sentence(words, tokens))
