"""The one tiny CRIS of the tests, of a few thousand weights with the published structure, and sentences for it."""

from __future__ import annotations

from typing import Any

import torch

from fastris import CRISConfig

CLIP = {
    "embed_dim": 48,
    "vision_layers": (1, 1, 1, 1),
    "image_resolution": 64,
    "vision_width": 4,
    "vocab_size": 96,
    "transformer_width": 32,
    "transformer_heads": 1,
    "transformer_layers": 1,
}
MODEL = {
    "word_dim": 48,
    "vis_dim": 32,
    "fpn_in": (32, 64, 48),
    "fpn_out": (16, 32, 48),
    "num_layers": 1,
    "num_head": 4,
    "dim_ffn": 64,
    "dropout": 0.1,
    "input_size": 64,
    "word_len": 17,
}


def small_fields(clip: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The configuration as a mapping, with these fields of CLIP and these of CRIS changed."""
    return {"clip": CLIP | (clip or {})} | MODEL | changes


def small_config(**changes: Any) -> CRISConfig:
    return CRISConfig.from_dict(small_fields(**changes))


def make_tokens(*lengths: int, width: int = 9) -> torch.Tensor:
    """Sentences of the given lengths: start 94, words, end 95, padding 0."""
    tokens = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(1, 94, (length,))
        tokens[row, 0], tokens[row, length - 1] = 94, 95
    return tokens
