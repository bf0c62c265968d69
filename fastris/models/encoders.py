"""Sizes of the encoders that several systems have, Swin and BERT, and the statistics of the images Swin expects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastris.models.limits import check_fields

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

BERT_TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
}
"""BERT's sizes in the tiny presets."""

_BERT_LIMITS = {
    "vocab_size": 1_000_000,
    "hidden_size": 16384,
    "num_hidden_layers": 128,
    "num_attention_heads": 1024,
    "intermediate_size": 131072,
    "max_position_embeddings": 4096,
    "type_vocab_size": 1024,
}


@dataclass
class BERTConfig:
    """Sizes of the text encoder, under the names of BERT's own configuration. The defaults are BERT-base-uncased's."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2

    def __post_init__(self) -> None:
        check_fields(self, _BERT_LIMITS, "bert.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"bert.hidden_size ({self.hidden_size}) must be divisible by bert.num_attention_heads "
                f"({self.num_attention_heads})"
            )

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> BERTConfig:
        """Build from a plain mapping. Raises ValueError, naming the keys, where some are unknown."""
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(str(key)[:40] for key in set(mapping) - set(names))
        if unknown:
            raise ValueError(f"bert has unknown keys {', '.join(unknown[:10])}; its keys are {', '.join(names)}")
        return cls(**mapping)


_SWINS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "Swin-T",
    (96, (2, 2, 18, 2)): "Swin-S",
    (128, (2, 2, 18, 2)): "Swin-B",
    (192, (2, 2, 18, 2)): "Swin-L",
}


def swin_name(embed_dim: int, depths: tuple[int, ...]) -> str:
    """The name of the Swin of these sizes: Swin-T, -S, -B or -L, else its sizes."""
    return _SWINS.get((embed_dim, depths), f"a Swin of width {embed_dim} and depths {'-'.join(map(str, depths))}")
