"""How the cases of single stages of CRIS are built; see bench/cases/builders.py for operators and whole models.

Sizes follow one image of ``side`` pixels through the configuration that ``preset`` names, or a small one for None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastris import CRISConfig, reference
from fastris.models.cris import FPN, Projector
from fastris.nn.clip import CLIPBackbone, DenseResNet
from fastris.nn.losses import TextToPixelContrastiveLoss
from fastris.reference import AttentionWeights, FeedForwardWeights

from .builders import enliven, make_tokens, small_config
from .problem import Problem


def image_encoder(preset: str | None, side: int, batch: int) -> Problem:
    """CLIP's ResNet as CRIS uses it: three maps of (B, 3, side, side). No gradient reaches the images."""
    clip = _config(preset).clip
    heads = clip.vision_width * 32 // 64
    encoder = DenseResNet(clip.vision_layers, clip.embed_dim, heads, clip.image_resolution, clip.vision_width)
    return Problem(enliven(encoder), {}, {"x": torch.randn(batch, 3, side, side)})


def text_encoder(preset: str | None, words: int, lengths: Sequence[int], batch: int) -> Problem:
    """CLIP's text transformer: tokens (B, words) to every word and the sentence."""
    clip = dataclasses.asdict(_config(preset).clip)
    backbone = CLIPBackbone(**{**clip, "vision_layers": (1, 1, 1, 1), "vision_width": 4})
    tokens = make_tokens(batch, words, lengths, clip["vocab_size"])
    return Problem(enliven(TextEncoder(backbone)), {}, {"text": tokens})


class TextEncoder(nn.Module):
    """:meth:`fastris.nn.clip.CLIPBackbone.encode_text` without the other encoder."""

    def __init__(self, backbone: CLIPBackbone):
        super().__init__()
        backbone.visual = nn.Identity()  # type: ignore[assignment]
        self.backbone = backbone

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.backbone.encode_text(text)


def neck(preset: str | None, side: int, batch: int) -> Problem:
    """The cross-modal neck: three maps and the sentence to one map."""
    config = _config(preset)
    levels = zip("345", config.fpn_in, (8, 16, 32), strict=True)
    maps = {f"c{name}": torch.randn(batch, width, side // step, side // step) for name, width, step in levels}
    inputs = {**maps, "state": torch.randn(batch, config.word_dim)}
    return Problem(enliven(Neck(config)), inputs, {})


class Neck(nn.Module):
    """:class:`fastris.models.cris.FPN` with its maps as arguments of their own."""

    def __init__(self, config: CRISConfig):
        super().__init__()
        self.neck = FPN(config.fpn_in, config.fpn_out)

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor, state: Tensor) -> Tensor:
        return self.neck((c3, c4, c5), state)


def self_attention(batch: int, height: int, width: int, dim: int, heads: int) -> Problem:
    """The decoder's first sub-layer, dropout 0."""
    inputs = {"x": torch.randn(batch, height * width, dim)}
    data = {"positions": reference.sine_positions_2d(height, width, dim)}
    return Problem(SelfAttention(dim, heads), inputs, data)


class SelfAttention(nn.Module):
    """:func:`fastris.ops.self_attention.self_attention` with its parameters, dropout 0."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.post_norm = (enliven(nn.LayerNorm(dim)) for _ in range(2))
        self.attention = enliven(nn.MultiheadAttention(dim, heads))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        from fastris.ops.self_attention import self_attention

        norm, attention, post = self.norm, self.attention, self.post_norm
        projections = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight
        ends = attention.out_proj.bias, post.weight, post.bias
        weights = AttentionWeights(norm.weight, norm.bias, *projections, *ends)
        return self_attention(x, positions, weights, self.heads, training=True)


def feed_forward(batch: int, height: int, width: int, dim: int, dim_ffn: int) -> Problem:
    """The decoder's third sub-layer, dropout 0."""
    return Problem(FeedForward(dim, dim_ffn), {"x": torch.randn(batch, height * width, dim)}, {})


class FeedForward(nn.Module):
    """:func:`fastris.ops.feed_forward.feed_forward` with its parameters, dropout 0."""

    def __init__(self, dim: int, dim_ffn: int):
        super().__init__()
        self.norm, self.inner_norm = enliven(nn.LayerNorm(dim)), enliven(nn.LayerNorm(dim_ffn))
        self.up, self.down = nn.Linear(dim, dim_ffn), nn.Linear(dim_ffn, dim)

    def forward(self, x: Tensor) -> Tensor:
        from fastris.ops.feed_forward import feed_forward

        first, second = (self.norm, self.up), (self.inner_norm, self.down)
        weights = [tensor for part in (*first, *second) for tensor in (part.weight, part.bias)]
        return feed_forward(x, FeedForwardWeights(*weights), training=True)


def projector(batch: int, side: int, word_dim: int, in_dim: int) -> Problem:
    """The whole projector, from the decoder's map to logits."""
    inputs = {"x": torch.randn(batch, 2 * in_dim, side, side), "word": torch.randn(batch, word_dim)}
    return Problem(enliven(Projector(word_dim, in_dim)), inputs, {})


def loss(batch: int, side: int, mask_side: int) -> Problem:
    """The text-to-pixel contrastive loss on given logits, the mask's resizing included."""
    inputs = {"logits": torch.randn(batch, 1, side, side)}
    mask = torch.rand(batch, 1, mask_side, mask_side)
    return Problem(TextToPixelContrastiveLoss(), inputs, {"mask": mask})


def _config(preset: str | None) -> CRISConfig:
    return CRISConfig.preset(preset) if preset else small_config()
