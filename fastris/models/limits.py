"""Upper limits of a configuration's sizes, so that an untrusted file cannot request a model that fills the memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastris.options.values import shown

MAX_PARAMETERS = 2_000_000_000
"""The most that are built. For scale: CRIS on RN50x64, the largest of OpenAI's ResNets, has about 0.7 billion."""

CLIP_LIMITS = {
    "embed_dim": 16384,
    "image_resolution": 4096,
    "vision_width": 1024,
    "context_length": 4096,
    "vocab_size": 1_000_000,
    "transformer_width": 16384,
    "transformer_heads": 1024,
    "transformer_layers": 128,
}
MAX_SIDE, MAX_WORDS = 16384, 4096  # pixels of the letterboxed square; tokens of a sentence
MAX_BLOCKS = 128  # of one stage of the ResNet; RN50x64 has 36
CRIS_LIMITS = {
    "word_len": MAX_WORDS,
    "word_dim": 16384,
    "vis_dim": 16384,
    "num_layers": 128,
    "num_head": 1024,
    "dim_ffn": 131072,
    "input_size": MAX_SIDE,
}
MAX_WIDTH = 16384


def check_whole(name: str, value: Any, largest: int) -> None:
    """Raise ValueError, naming the field, unless ``value`` is a whole number from 1 to ``largest``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise ValueError(f"{name} must be a whole number from 1 to {largest}, got {shown(value)}")


def whole_numbers(name: str, values: Any, count: int, largest: int) -> tuple[int, ...]:
    """``count`` whole numbers from 1 to ``largest``, as a tuple. Raises ValueError, naming the field, otherwise."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise ValueError(f"{name} must hold {count} whole numbers, got {shown(values)}")
    for index, value in enumerate(values):
        check_whole(f"{name}[{index}]", value, largest)
    return tuple(values)


def check_fields(config: Any, limits: Mapping[str, int], prefix: str = "") -> None:
    """Call :func:`check_whole` for each field in ``limits``; ``prefix`` precedes the names in messages."""
    for name, largest in limits.items():
        check_whole(prefix + name, getattr(config, name), largest)


def check_parameters(config: Any) -> None:
    """Raise ValueError, naming the largest part, if a CRIS configuration has more than ``MAX_PARAMETERS``."""
    clip, width = config.clip, config.clip.transformer_width
    pooled = 32 * clip.vision_width
    parts = {
        "clip.transformer_width, clip.transformer_layers, clip.vocab_size": width
        * (12 * clip.transformer_layers * width + clip.vocab_size + clip.context_length + clip.embed_dim),
        "clip.vision_width, clip.vision_layers": sum(
            17 * blocks * (clip.vision_width * 2**stage) ** 2 for stage, blocks in enumerate(clip.vision_layers)
        )
        + pooled * (3 * pooled + 2 * clip.embed_dim + (clip.image_resolution // 32) ** 2),
        "num_layers, vis_dim, dim_ffn": config.num_layers * 2 * config.vis_dim * (4 * config.vis_dim + config.dim_ffn),
        "fpn_out": sum(9 * a * b for a in config.fpn_out for b in config.fpn_out),
    }
    if sum(parts.values()) > MAX_PARAMETERS:
        largest = max(parts, key=lambda name: parts[name])
        raise ValueError(
            f"these sizes make a model of about {sum(parts.values()) / 1e9:.1f} billion parameters, and at most "
            f"{MAX_PARAMETERS / 1e9:g} are built; make {largest} smaller"
        )
