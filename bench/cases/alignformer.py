"""How AlignFormer's cases are built: its stages at the sizes of one image, and its whole training step.

Nothing draws: drop-path and BERT's dropout are off, so that all arms compute the same. Gates are open, as after
training.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastris.models.alignformer.config import AlignFormerConfig

from .builders import Own, Preset, config_of, enliven, training_step
from .problem import Problem

KEYS_STD = 0.3
"""Deviation of the words' key matrices, whose scores then differ from pixel to pixel."""


def stage(preset: Preset, number: int, side: int, batch: int, words: int) -> Problem:
    """Stage ``number`` of the image encoder, 0 to 3: its blocks, the exchange with the words, gates and merging."""
    from fastris.models.alignformer.swin import Stage, SwinBlock

    config = _config(preset)
    width, heads, last = config.widths[number], config.num_heads[number], number == 3
    blocks = [SwinBlock(width, heads, config.window, bool(each % 2), 0.0) for each in range(config.depths[number])]
    module = Own(_stage, stage=opened(Stage(blocks, width, config.text_width, not last, intended=True)))
    inputs = {"x": torch.randn(batch, side, side, width), "words": torch.randn(batch, words, config.text_width)}
    return Problem(enliven(module), inputs, {"valid": torch.ones(batch, words, dtype=torch.bool)})


def _stage(own: Any, x: Tensor, words: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
    x = own.stage.blocks(x)
    residuals = own.stage.fuse(x, words, valid)
    if own.stage.downsample is None:
        return tuple(residuals)
    return residuals.pixels, *own.stage.pass_on(x, words, residuals, valid)


def pixel_decoder(preset: Preset, side: int, batch: int, words: int) -> Problem:
    """The pixel decoder on the four maps of images (B, 3, side, side) and their words."""
    from fastris.models.alignformer.pixel_decoder import PixelDecoder

    config = _config(preset)
    decoder = PixelDecoder(
        config.widths,
        config.conv_dim,
        config.text_width,
        config.word_len,
        config.pixel_layers,
        config.pixel_ffn,
        config.word_ffn,
    )
    maps = {
        f"c{level}": torch.randn(batch, width, side >> (level + 2), side >> (level + 2))
        for level, width in enumerate(config.widths)
    }
    inputs = {**maps, "words": torch.randn(batch, words, config.text_width)}
    data = {"valid": torch.ones(batch, words, dtype=torch.bool)}
    return Problem(enliven(Own(_pixel_decoder, decoder=opened(decoder))), inputs, data)


def _pixel_decoder(
    own: Any, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, words: Tensor, valid: Tensor
) -> tuple[Tensor, ...]:
    from fastris.models.alignformer.pixel_decoder import Words

    decoded = own.decoder((c0, c1, c2, c3), Words(words, valid))
    return decoded.pixels, *decoded.levels


def centre_and_loss(preset: Preset, side: int, batch: int, words: int) -> Problem:
    """What follows the pixel decoder: the centre embedding, the kernels, the scores and the loss at the masks' size."""
    from fastris.models.alignformer.model import Classifier

    config = _config(preset)
    classifier: Any = Classifier(dataclasses.replace(config, pixel_layers=1))
    conv = classifier.pix_dec.mask_features
    classifier.pix_dec = nn.Module()  # without the parameters that nothing here trains
    classifier.pix_dec.mask_features = conv
    levels = {
        f"level{number}": torch.randn(batch, config.conv_dim, side >> shift, side >> shift)
        for number, shift in enumerate((5, 4, 3))
    }
    inputs = {
        **levels,
        "pixels": torch.randn(batch, config.conv_dim, side >> 2, side >> 2).relu(),
        "words": torch.randn(batch, words, config.text_width),
    }
    data = {"valid": torch.ones(batch, words, dtype=torch.bool), "mask": torch.rand(batch, 1, side, side).round()}
    return Problem(enliven(Own(_centre_and_loss, classifier=classifier)), inputs, data)


def _centre_and_loss(
    own: Any,
    level0: Tensor,
    level1: Tensor,
    level2: Tensor,
    pixels: Tensor,
    words: Tensor,
    valid: Tensor,
    mask: Tensor,
) -> Tensor:
    from fastris.models.alignformer.model import POS_WEIGHT
    from fastris.models.alignformer.pixel_decoder import Words
    from fastris.ops.upsampled_bce import upsampled_bce_with_logits

    own.classifier.pix_dec.forward = lambda maps, words: ((level0, level1, level2), pixels)
    logits = own.classifier((), Words(words, valid), all_outputs=True).logits
    return upsampled_bce_with_logits(logits, mask, pos_weight=POS_WEIGHT)


def step(preset: Preset, side: int, batch: int, words: int) -> Problem:
    """Forward and backward of the whole model in training mode, all words real."""
    return step_without_draws(_config(preset), side, batch, words)


def step_without_draws(config: Any, side: int, batch: int, words: int) -> Problem:
    """A step of a model on Swin and BERT without the optimizer; drop-path and dropout are off."""
    config = dataclasses.replace(config, drop_path=0.0, vocabulary="built-in")  # a vocabulary to count by
    problem = training_step(config, side, batch, words, (words,))
    for module in opened(problem.module).modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    problem.optimizer = False
    return problem


def opened(module: nn.Module) -> Any:
    """The module as training leaves it where a fresh one hides something, or is no fair check.

    Fresh gates let nothing pass; fresh scores between pixels and words are all alike, so that rounding is most of what
    reaches their keys; and fresh samples lie where four pixels meet, so that rounding decides which of them they read.
    """
    from fastris.nn.deformable import DeformableAttention
    from fastris.nn.fusion import Fusion, Gate

    for each in module.modules():
        if isinstance(each, Gate):
            nn.init.trunc_normal_(each[2].weight, std=0.02)  # type: ignore[arg-type]
        if isinstance(each, Fusion):
            nn.init.normal_(each.image_lang_att.key.weight, std=KEYS_STD)
        if isinstance(each, DeformableAttention):
            nn.init.normal_(each.sampling_offsets.weight, std=0.002)
            nn.init.uniform_(each.sampling_offsets.bias, -3.0, 3.0)
    return module


def _config(preset: Preset) -> AlignFormerConfig:
    config = config_of(preset)
    assert isinstance(config, AlignFormerConfig), f"{preset} has no such part"
    return config
