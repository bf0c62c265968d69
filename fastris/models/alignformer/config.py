"""AlignFormer's configuration: the sizes of its text encoder, image encoder and decoders, and the published preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastris.models.encoders import BERT_TINY, BERTConfig
from fastris.models.recipe import Recipe
from fastris.models.swin_bert import SwinBertConfig
from fastris.options.values import shown

HEADS = 8
"""Heads of every attention of the two decoders."""
LEVELS, POINTS = 3, 4
"""Maps of the deformable attention, and its samples in each of them."""

BEHAVIOURS = ("intended", "compat")

ALIGNFORMER_PRESETS: dict[str, dict[str, Any]] = {
    "alignformer_swin_b": {},
    "alignformer_tiny": {
        "bert": BERT_TINY,
        "vocabulary": "built-in",
        "embed_dim": 24,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
        "window": 4,
        "drop_path": 0.0,
        "conv_dim": 64,
        "pixel_layers": 2,
        "pixel_ffn": 128,
        "word_ffn": 128,
        "query_layers": 3,
        "query_ffn": 128,
        "input_size": 64,
    },
}
"""``alignformer_swin_b`` as released; ``alignformer_tiny`` is for the built-in scenes on a laptop's CPU."""


@dataclass
class AlignFormerConfig(SwinBertConfig):
    """Dimensions of an AlignFormer; the defaults are those of the released Swin-B weights.

    ``window`` is the side in patches of Swin's windows, ``conv_dim`` the width of the pixel decoder, ``drop_path`` the
    chance of leaving out the last Swin block (the first is never left out). ``vocabulary`` is where the WordPiece
    vocabulary comes from: a vocab.txt, a Hugging Face id, or ``built-in``, the words of the built-in scenes.
    ``word_len`` counts [CLS] and [SEP].

    ``behaviour`` is ``compat``, which computes what the released code does for its weights, or ``intended``: sentences
    are trimmed (which changes nothing), a sentence of one token attends to exactly zero, and a new model's gates start
    closed. Raises ValueError, naming the fields, where the sizes do not fit together.
    """

    system: ClassVar[str] = "alignformer"
    title: ClassVar[str] = "AlignFormer"
    published: ClassVar[str] = "arXiv 2301.06429, in the code released as LGFormer"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = ALIGNFORMER_PRESETS
    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "backbone", "classifier")
    stages: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "stem": ("backbone.patch_embed",),
        **{f"layer{number + 1}": (f"backbone.layers.{number}", f"backbone.norm{number}") for number in range(4)},
        "text": ("text_encoder",),
    }
    not_in_shapes: ClassVar[tuple[str, ...]] = ("vocabulary", "drop_path", "input_size", "behaviour")
    limits: ClassVar[Mapping[str, int]] = {
        "embed_dim": 4096,
        "window": 64,
        "conv_dim": 16384,
        "pixel_layers": 128,
        "pixel_ffn": 131072,
        "word_ffn": 131072,
        "query_layers": 128,
        "query_ffn": 131072,
    }

    recipe: ClassVar[Recipe] = Recipe(
        epochs=40,
        batch_size=32,
        optimizer="adamw",
        base_lr=5e-5,
        lr_multi=1.0,
        weight_decay=0.01,
        schedule="poly",
        val_rule="alignformer",
        val_sentences="all",
    )
    threshold: ClassVar[float] = 0.5
    smallest_batch: ClassVar[int] = 1

    bert: BERTConfig = field(default_factory=BERTConfig)
    vocabulary: str = "google-bert/bert-base-uncased"
    word_len: int = 20
    embed_dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 12
    drop_path: float = 0.3
    conv_dim: int = 256
    pixel_layers: int = 6
    pixel_ffn: int = 1024
    word_ffn: int = 2048
    query_layers: int = 6
    query_ffn: int = 2048
    input_size: int = 480
    behaviour: str = "intended"

    def _validate(self) -> None:
        super()._validate()
        if self.bert.hidden_size % HEADS:
            raise ValueError(f"bert.hidden_size must be a multiple of {HEADS}, got {self.bert.hidden_size}")
        if self.behaviour not in BEHAVIOURS:
            raise ValueError(f"behaviour must be one of {', '.join(BEHAVIOURS)}, got {shown(self.behaviour)}")

    def parameter_counts(self) -> dict[str, int]:
        """Of the text encoder, the image encoder with its fusions, the pixel decoder and the centre embedding."""
        text, width = self.text_width, self.conv_dim
        bert, swin = self.encoder_counts()
        fusions = sum(8 * size**2 + 7 * text**2 + 3 * size * text for size in self.widths)
        pixel = 2 * width**2 + 2 * width * self.pixel_ffn + HEADS * LEVELS * POINTS * 3 * width
        words = 2 * width**2 + 2 * width * text + 2 * width * self.word_ffn
        query = 2 * text**2 + 2 * width * text + 2 * text * self.query_ffn
        return {
            "bert.hidden_size, bert.num_hidden_layers, bert.vocab_size": bert,
            "embed_dim, depths, window": swin + fusions,
            "conv_dim, pixel_layers, pixel_ffn, word_ffn": self.pixel_layers * (pixel + words) + 10 * width**2,
            "query_layers, query_ffn": self.query_layers * query + 3 * text**2 + text * width,
        }
