"""How MagNet's cases are built: its stages at the sizes of one image, its whole training step, and a whole answer.

Nothing draws: drop-path and dropout are off, so that all arms compute the same. Gates are open, as after training.

The mask decoder reads only the pixels where its last mask is not negative, so that the sign of a number near 0 decides
what is computed, and rounding decides the sign. Arms are checked on small copies in which no such number is near 0,
which a test holds; where they are timed each arm goes by its own signs, which changes nothing of the work.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastris import reference
from fastris.models.magnet.config import STAGES, MagNetConfig

from .alignformer import opened, step_without_draws
from .builders import Own, Preset, config_of, enliven, model_and_data
from .problem import Problem


def stage(preset: Preset, number: int, side: int, batch: int, words: int) -> Problem:
    """Stage ``number`` of the encoders, 0 to 3, without BERT's layers: Swin's blocks, both exchanges, gates, merging.

    Of the last one only the decoder's map is made, since nothing else of it is read.
    """
    from fastris.models.magnet.encoders import Stage
    from fastris.nn.cam import WordPixelAttention
    from fastris.nn.fusion import Gate
    from fastris.nn.swin import SwinBlock

    config = _config(preset)
    width, text, last = config.widths[number], config.text_width, number + 1 == STAGES
    heads, depth = config.num_heads[number], config.depths[number]
    blocks = [SwinBlock(width, heads, config.window, bool(each % 2), 0.0) for each in range(depth)]
    own: Any = Own(_stage, stage=Stage(blocks, width, text, merges=not last), last=last)
    if not last:
        rule: Any = config.language_mask
        own.reading, own.gate = WordPixelAttention(width, text, rule), Gate(text, starts_closed=True)
    inputs = {"x": torch.randn(batch, side, side, width), "words": torch.randn(batch, words, text)}
    return Problem(enliven(opened(own)), inputs, {"valid": torch.ones(batch, words, dtype=torch.bool)})


def _stage(own: Any, x: Tensor, words: Tensor, valid: Tensor) -> Any:
    x = own.stage.blocks(x)
    seen = own.stage.see(x, words, valid)
    if own.last:
        return seen.mixed
    heard = own.gate.apply_to(words, own.reading(words, x.flatten(1, 2), valid))
    return seen.mixed, own.stage.pass_on(x, seen.residual), heard


def pixel_decoder(preset: Preset, side: int, batch: int) -> Problem:
    """The pixel decoder on the four maps of images (B, 3, side, side)."""
    from fastris.models.magnet.model import Classifier

    config = _config(preset)
    decoder = Classifier(dataclasses.replace(config, query_layers=1)).pixel_decoder
    decoder.mask_features.requires_grad_(False)  # whoever scores the map folds it into the kernels
    maps = {
        f"s{level}": torch.randn(batch, width, side >> (level + 2), side >> (level + 2))
        for level, width in enumerate(config.widths)
    }
    return Problem(enliven(opened(Own(_pixel_decoder, decoder=decoder))), maps, {})


def _pixel_decoder(own: Any, **maps: Tensor) -> tuple[Tensor, ...]:
    decoded = own.decoder(tuple(maps.values()))
    return decoded.pixels, *decoded.levels


def mask_decoder(preset: Preset, side: int, batch: int) -> Problem:
    """What follows the pixel decoder: the query's layers, all masks, and the loss at the images' size."""
    from fastris.models.magnet.model import Classifier

    config = _config(preset)
    classifier: Any = Classifier(dataclasses.replace(config, pixel_layers=1))
    conv = classifier.pixel_decoder.mask_features
    classifier.pixel_decoder = nn.Module()  # without the parameters that nothing here trains
    classifier.pixel_decoder.mask_features = conv
    classifier.predictor.class_embed.requires_grad_(False)
    shape = batch, config.conv_dim
    inputs = {f"level{n}": torch.randn(*shape, side >> shift, side >> shift) for n, shift in enumerate((5, 4, 3))}
    inputs["pixels"] = torch.randn(*shape, side >> 2, side >> 2)
    mask = torch.rand(batch, 1, side, side).round()
    return Problem(enliven(Own(_mask_decoder, classifier=classifier)), inputs, {"mask": mask})


def _mask_decoder(own: Any, pixels: Tensor, mask: Tensor, **levels: Tensor) -> Tensor:
    from fastris.models.magnet.pixel_decoder import Decoded

    own.classifier.pixel_decoder.forward = lambda maps: Decoded(tuple(levels.values()), pixels)
    return reference.upsampled_bce_and_dice(own.classifier((), all_outputs=True).logits, mask)


def step(preset: Preset, side: int, batch: int, words: int) -> Problem:
    """Forward and backward of the whole model in training mode, all words real."""
    return step_without_draws(_config(preset), side, batch, words)


def answer(preset: Preset, side: int, batch: int, words: int) -> Problem:
    """The whole model in eval mode, all words real."""
    config = dataclasses.replace(_config(preset), vocabulary="built-in")  # a vocabulary to count by
    model, data = model_and_data(config, side, batch, words, (words,))
    return Problem(opened(model), {}, data, training=False)


def _config(preset: Preset) -> MagNetConfig:
    config = config_of(preset)
    assert isinstance(config, MagNetConfig), f"{preset} has no such part"
    return config
