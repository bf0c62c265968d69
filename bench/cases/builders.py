"""How each case is built: modules with lively random weights, and inputs such as CRIS sees.

A builder returns a :class:`~bench.cases.problem.Problem` in float32 on the CPU, drawn from PyTorch's global generator.
A module that is trained returns its loss first. Operators are imported when a case runs: a broken one spoils no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastris import CRIS, CLIPConfig, CRISConfig, reference
from fastris.models.cris import Projector, TransformerDecoder
from fastris.reference import AttentionWeights

from .problem import Problem


def similarity_loss(batch: int, channels: int, side: int) -> Problem:
    """The projector's last 1x1 convolution, the sentences' 3x3 kernels, and the loss."""
    inputs = {
        "features": torch.randn(batch, channels, side, side).relu(),
        "kernel": torch.randn(batch, channels, 3, 3) / (9 * channels) ** 0.5,
        "bias": torch.randn(batch),
    }
    return Problem(SimilarityLoss(channels), inputs, {"target": torch.rand(batch, 1, side, side)})


class SimilarityLoss(nn.Module):
    """:func:`fastris.ops.contrastive.text_to_pixel_contrastive_loss` with its 1x1 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, features: Tensor, kernel: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        from fastris.ops.contrastive import text_to_pixel_contrastive_loss

        weight, constant = self.pointwise.weight, self.pointwise.bias
        return text_to_pixel_contrastive_loss(
            features, kernel, target, bias, pointwise_weight=weight, pointwise_bias=constant
        )


def upsample_conv(batch: int, channels: int, outputs: int, side: int) -> Problem:
    """One of the projector's two heavy layers, without its BatchNorm."""
    return Problem(UpsampleConv(channels, outputs), {"x": torch.randn(batch, channels, side, side).relu()}, {})


class UpsampleConv(nn.Module):
    """:func:`fastris.ops.upsample_conv.upsample2x_conv3x3` with its weight."""

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        from fastris.ops.upsample_conv import upsample2x_conv3x3

        return upsample2x_conv3x3(x, self.weight)


def cross_attention(
    batch: int, height: int, width: int, dim: int, heads: int, words: int, lengths: Sequence[int] = ()
) -> Problem:
    """The decoder's second sub-layer; sentences of ``lengths`` tokens, or all ``words`` of them real."""
    inputs = {"x": torch.randn(batch, height * width, dim), "text": torch.randn(batch, words, dim)}
    data = {
        "positions": reference.sine_positions_2d(height, width, dim),
        "text_positions": reference.sine_positions_1d(words, dim),
        "padding_mask": make_tokens(batch, words, lengths) == 0,
    }
    return Problem(CrossAttention(dim, heads), inputs, data)


class CrossAttention(nn.Module):
    """:func:`fastris.ops.cross_attention.cross_attention` with its parameters, dropout 0."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.post_norm = (enliven(nn.LayerNorm(dim)) for _ in range(2))
        self.attention = enliven(nn.MultiheadAttention(dim, heads))

    def forward(
        self, x: Tensor, text: Tensor, positions: Tensor, text_positions: Tensor, padding_mask: Tensor
    ) -> Tensor:
        from fastris.ops.cross_attention import cross_attention

        attention = self.attention
        weights = AttentionWeights(
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            in_proj_weight=attention.in_proj_weight,
            in_proj_bias=attention.in_proj_bias,
            out_proj_weight=attention.out_proj.weight,
            out_proj_bias=attention.out_proj.bias,
            post_norm_weight=self.post_norm.weight,
            post_norm_bias=self.post_norm.bias,
        )
        return cross_attention(x, text, positions, text_positions, padding_mask, weights, self.heads, training=True)


def projector_loss(batch: int, side: int, word_dim: int, in_dim: int) -> Problem:
    """The whole projector and the loss against masks of the logits' size."""
    inputs = {"x": torch.randn(batch, 2 * in_dim, side, side), "word": torch.randn(batch, word_dim)}
    projector = enliven(Projector(word_dim, in_dim))
    return Problem(projector, inputs, {"mask": torch.rand(batch, 1, 4 * side, 4 * side)})


def decoder(
    batch: int,
    height: int,
    width: int,
    dim: int,
    heads: int,
    words: int,
    layers: int,
    dim_ffn: int,
    dropout: float,
    lengths: Sequence[int],
) -> Problem:
    """The whole decoder, as CRIS calls it."""
    module = enliven(TransformerDecoder(layers, dim, heads, dim_ffn, dropout))
    inputs = {"vis": torch.randn(batch, dim, height, width), "txt": torch.randn(batch, words, dim)}
    return Problem(module, inputs, {"pad_mask": make_tokens(batch, words, lengths) == 0})


def training_step(
    preset: str | None, side: int, words: int, lengths: Sequence[int], batch: int, dropout: float
) -> Problem:
    """Forward, backward and Adam of the whole model. No gradient reaches the images."""
    model, data = _model(preset, side, words, lengths, batch, dropout)
    return Problem(TrainingLoss(model), {}, {**data, "mask": torch.rand(batch, 1, side, side)}, optimizer=True)


class TrainingLoss(nn.Module):
    """The model in training mode, its loss first."""

    def __init__(self, model: CRIS):
        super().__init__()
        self.model = model

    def forward(self, img: Tensor, word: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        prediction, _, loss = self.model(img, word, mask)
        return loss, prediction


def inference(preset: str | None, side: int, words: int, lengths: Sequence[int], batch: int) -> Problem:
    """The whole model in eval mode."""
    model, data = _model(preset, side, words, lengths, batch, 0.0)
    return Problem(model, {}, data, training=False)


def _model(
    preset: str | None, side: int, words: int, lengths: Sequence[int], batch: int, dropout: float
) -> tuple[CRIS, dict[str, Tensor]]:
    config = dataclasses.replace(CRISConfig.preset(preset) if preset else small_config(), dropout=dropout)
    tokens = make_tokens(batch, words, lengths, config.clip.vocab_size)
    return enliven(CRIS(config)), {"img": torch.randn(batch, 3, side, side), "word": tokens}


def small_config() -> CRISConfig:
    """A CRIS with the published proportions at a quarter of the width or less, for float64."""
    clip = CLIPConfig(
        embed_dim=96,
        vision_layers=(1, 1, 1, 1),
        image_resolution=64,
        vision_width=8,
        vocab_size=256,
        transformer_width=128,
        transformer_heads=2,
        transformer_layers=2,
    )
    return CRISConfig(
        clip,
        word_dim=96,
        vis_dim=128,
        fpn_in=(64, 128, 96),
        fpn_out=(64, 128, 96),
        num_layers=2,
        num_head=4,
        dim_ffn=160,
        input_size=96,
    )


def make_tokens(batch: int, words: int, lengths: Sequence[int] = (), vocab_size: int = 49408) -> Tensor:
    """Sentences (B, L) as CLIP's tokenizer leaves them, of ``lengths`` in turn, or of L tokens each.

    Start is the largest id but one, end the largest, padding 0.
    """
    tokens = torch.randint(1, vocab_size - 2, (batch, words))
    tokens[:, 0] = vocab_size - 2
    for row in range(batch):
        length = min(lengths[row % len(lengths)], words) if lengths else words
        tokens[row, length - 1] = vocab_size - 1
        tokens[row, length:] = 0
    return tokens


M = TypeVar("M", bound=nn.Module)


def enliven(module: M) -> M:
    """The module with random norms and biases, as after training: fresh ones are 1 and 0 and hide mistakes.

    A fresh CLIP even starts with scales of 0, under which most gradients of its ResNet are 0.
    """
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.1)
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                statistics = dict(part.named_buffers())
                statistics["running_mean"].normal_(0, 0.1)
                statistics["running_var"].uniform_(0.5, 1.5)
            if isinstance(part, nn.MultiheadAttention):
                part.in_proj_bias.normal_(0, 0.1)
                part.out_proj.bias.normal_(0, 0.1)
    return module
