"""MagNet's configuration: the sizes of its encoders and decoders, and its two switches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastris.models.encoders import BERT_TINY, BERTConfig
from fastris.models.inputs import Inputs
from fastris.models.limits import check_whole
from fastris.models.recipe import Recipe
from fastris.models.swin_bert import SwinBertConfig
from fastris.options.values import shown

LEVELS, POINTS = 4, 4
"""Maps of the deformable attention, and its samples in each of them."""
STAGES = 4
"""Of Swin, and the parts that BERT is cut into."""

LANGUAGE_MASKS = ("masked", "intended", "released")
CLASS_SCORES = ("off", "on")
_GROUNDING: dict[str, Any] = {
    "mask_grounding": 0.0,
    "mask_rate": 0.15,
    "predictor_layers": 4,
    "predictor_ffn": 0,
    "predictor_heads": 0,
    "whole_words": True,
    "clean_segmentation": False,
}
_TRAINING: dict[str, Any] = {**_GROUNDING, "alignment_loss": 0.0}
_MAX_LAYERS = 128

MAGNET_PRESETS: dict[str, dict[str, Any]] = {
    "magnet_swin_b": {},
    "magnet_tiny": {
        "bert": {**BERT_TINY, "num_hidden_layers": 4},
        "vocabulary": "built-in",
        "embed_dim": 24,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
        "window": 4,
        "drop_path": 0.0,
        "conv_dim": 64,
        "decoder_heads": 4,
        "pixel_layers": 1,
        "pixel_ffn": 128,
        "query_layers": 3,
        "query_ffn": 128,
        "input_size": 64,
    },
}
"""``magnet_swin_b`` as released; ``magnet_tiny`` is for the built-in scenes on a laptop's CPU."""


@dataclass
class MagNetConfig(SwinBertConfig):
    """Dimensions of a MagNet; the defaults are those of the released Swin-B weights.

    ``window`` is the side in patches of Swin's windows, ``conv_dim`` the width of both decoders and ``decoder_heads``
    their heads, ``drop_path`` the chance of leaving out the last Swin block (the first is never left out).
    ``vocabulary`` is where the WordPiece vocabulary comes from: a vocab.txt, a Hugging Face id, or ``built-in``, the
    words of the built-in scenes. ``word_len`` counts [CLS] and [SEP].

    ``language_mask`` says what padding does where words read pixels: ``released``, what the released code computes and
    its weights were made with; ``intended``, the same with the mask that was meant; ``masked``, ours, where padding
    changes nothing. See :func:`fastris.reference.word_pixel_attention`. ``class_score`` is ``off``, as released, where
    the score is the mask's probability, or ``on``: times the probability of the class head, which nothing trains.

    The paper's two further losses are on in training where their weights are above 0
    (:mod:`fastris.models.magnet.training_parts`): ``mask_grounding``, of which the paper's weight is 1, with
    ``mask_rate``, the probability with which a word is hidden, ``predictor_layers``, ``predictor_ffn`` and
    ``predictor_heads``, 0 for 4 times BERT's width and for BERT's heads (the predictor that MagNet's authors point to,
    ovr-cnn's, has 6 layers, 768 and 8), ``whole_words``, whether the pieces of a word are hidden together, and
    ``clean_segmentation``, which encodes every sample twice so that the
    segmentation sees whole sentences alone; and ``alignment_loss``, 0.5 in the paper. They are off in files for others.
    Raises ValueError, naming the fields, where the sizes do not fit together.
    """

    system: ClassVar[str] = "magnet"
    title: ClassVar[str] = "MagNet"
    published: ClassVar[str] = "arXiv 2312.12198 (Mask Grounding, CVPR 2024), and its released evaluation code"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MAGNET_PRESETS
    parts: ClassVar[tuple[str, ...]] = ("image_model", "language_model", "classifier", "lang_proj")
    added_parts: ClassVar[tuple[str, ...]] = ("grounding",)
    training_parts: ClassVar[tuple[str, ...]] = ("grounding", "cal")
    stages: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "stem": ("image_model.patch_embed",),
        **{f"layer{number + 1}": (f"image_model.layers.{number}", f"image_model.norm{number}") for number in range(4)},
        "text": ("language_model.embeddings", "language_model.encoder"),
    }
    not_in_shapes: ClassVar[tuple[str, ...]] = (
        "vocabulary",
        "word_len",
        "drop_path",
        "input_size",
        "language_mask",
        "class_score",
    )
    limits: ClassVar[Mapping[str, int]] = {
        "embed_dim": 4096,
        "window": 64,
        "conv_dim": 16384,
        "decoder_heads": 1024,
        "pixel_layers": 128,
        "pixel_ffn": 131072,
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
        val_rule="magnet",
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
    decoder_heads: int = 8
    pixel_layers: int = 4
    pixel_ffn: int = 1024
    query_layers: int = 9
    query_ffn: int = 2048
    input_size: int = 480
    language_mask: str = "masked"
    class_score: str = "off"
    mask_grounding: float = 0.0
    mask_rate: float = 0.15
    predictor_layers: int = 4
    predictor_ffn: int = 0
    predictor_heads: int = 0
    whole_words: bool = True
    clean_segmentation: bool = False
    alignment_loss: float = 0.0

    def _validate(self) -> None:
        super()._validate()
        if self.embed_dim % 4:  # the pooled maps have a quarter of each stage's width
            raise ValueError(f"embed_dim must be a multiple of 4, got {self.embed_dim}")
        if self.bert.num_hidden_layers % STAGES:
            raise ValueError(
                f"bert.num_hidden_layers must be a multiple of {STAGES}, an equal part for each stage of Swin, "
                f"got {self.bert.num_hidden_layers}"
            )
        if self.conv_dim % self.decoder_heads:
            raise ValueError(f"decoder_heads ({self.decoder_heads}) must divide conv_dim ({self.conv_dim})")
        for name, values in (("language_mask", LANGUAGE_MASKS), ("class_score", CLASS_SCORES)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {shown(getattr(self, name))}")

        self._validate_training()

    def _validate_training(self) -> None:
        for name in ("mask_grounding", "alignment_loss"):
            value = getattr(self, name)
            if value is False:  # what YAML makes of a bare off
                setattr(self, name, 0.0)
            elif not _is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be the weight of a loss, 0 (off) or more, got {shown(value)}")
        if not _is_number(self.mask_rate) or not 0 < self.mask_rate <= 1:
            raise ValueError(f"mask_rate must be a probability above 0 and at most 1, got {shown(self.mask_rate)}")
        check_whole("predictor_layers", self.predictor_layers, _MAX_LAYERS)
        for name in ("predictor_ffn", "predictor_heads"):
            if (value := getattr(self, name)) != 0 or isinstance(value, bool):
                check_whole(name, value, self.limits["pixel_ffn" if name == "predictor_ffn" else "decoder_heads"])
        for name in ("whole_words", "clean_segmentation"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {shown(getattr(self, name))}")
        idle = [name for name, default in _GROUNDING.items() if getattr(self, name) != default]
        if idle and not self.mask_grounding:
            raise ValueError(
                f"{idle[0]}={getattr(self, idle[0])} would do nothing without mask_grounding; give that a weight such "
                f"as 1.0, or leave {idle[0]} out"
            )
        if self.mask_grounding and self.text_width % 4:
            raise ValueError(
                f"bert.hidden_size ({self.text_width}) must be a multiple of 4 for Mask Grounding's positions; change "
                "it, or give mask_grounding=0"
            )
        if self.predictor_heads and self.text_width % self.predictor_heads:
            raise ValueError(
                f"predictor_heads ({self.predictor_heads}) must divide bert.hidden_size ({self.text_width})"
            )

    def for_others(self) -> MagNetConfig:
        """The same model without what only training uses."""
        return dataclasses.replace(self, **_TRAINING)

    def to_dict(self) -> dict[str, Any]:
        """As for every model; the switches of training are named where they are not at their defaults."""
        found = super().to_dict()
        return {name: value for name, value in found.items() if name not in _TRAINING or value != _TRAINING[name]}

    @property
    def inputs(self) -> Inputs:  # type: ignore[override]  # as in the base class
        """As for AlignFormer; but a sentence that is cut keeps its [SEP], unless words are masked as released."""
        found = super().inputs
        if self.language_mask == "released":
            return found
        return dataclasses.replace(found, tokenizer=f"wordpiece_ended:{self.vocabulary}")

    def parameter_counts(self) -> dict[str, int]:
        """Of the text encoder, the image encoder, what is between them, and the two decoders."""
        text, width = self.text_width, self.conv_dim
        bert, swin = self.encoder_counts()
        exchange = sum(43 * size**2 + 7 * text**2 + 6 * size * text for size in self.widths)
        samples = self.decoder_heads * LEVELS * POINTS
        pixel = 2 * width**2 + 3 * samples * width + 2 * width * self.pixel_ffn
        query = 8 * width**2 + 2 * width * self.query_ffn
        layer = 4 * text**2 + 2 * text * (self.predictor_ffn or 4 * text)
        predictor = self.predictor_layers * layer + text * (2 * text + self.widths[-1]) + self.bert.vocab_size
        return {
            "bert.hidden_size, bert.num_hidden_layers, bert.vocab_size": bert,
            "embed_dim, depths, window": swin + exchange,
            "conv_dim, pixel_layers, pixel_ffn": self.pixel_layers * pixel + width * sum(self.widths) + width**2,
            "predictor_layers, predictor_ffn, bert.hidden_size": predictor if self.mask_grounding else 0,
            "query_layers, query_ffn": self.query_layers * query + 3 * width**2 + text * width,
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
