"""AlignFormer's configuration: the sizes of its text encoder, image encoder and decoders, and the published preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastris.models.config import ModelConfig
from fastris.models.encoders import BERT_TINY, IMAGENET_MEAN, IMAGENET_STD, BERTConfig, swin_name
from fastris.models.inputs import Inputs
from fastris.models.limits import SIZES, check_fields, check_parameters, whole_numbers
from fastris.models.recipe import Recipe
from fastris.options.values import shown

HEADS = 8
"""Heads of every attention of the two decoders."""
NORM_GROUPS = 32
"""Groups of the pixel decoder's GroupNorms."""
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

_MAX_BLOCKS = 128  # of one stage of Swin; its largest has 18


@dataclass
class AlignFormerConfig(ModelConfig):
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

    def __post_init__(self) -> None:
        if isinstance(self.bert, Mapping):
            self.bert = BERTConfig.from_dict(self.bert)
        if not isinstance(self.bert, BERTConfig):
            raise ValueError(f"bert must be a BERTConfig or a mapping of its fields, got {shown(self.bert)}")
        self.depths = whole_numbers("depths", self.depths, 4, _MAX_BLOCKS)
        self.num_heads = whole_numbers("num_heads", self.num_heads, 4, 1024)
        check_fields(self, {**self.limits, **SIZES})
        self._validate()
        check_parameters(self.parameter_counts())

    def _validate(self) -> None:
        for stage, heads in enumerate(self.num_heads):
            if self.widths[stage] % heads:
                raise ValueError(
                    f"num_heads[{stage}] ({heads}) must divide the stage's width ({self.widths[stage]}), which is "
                    f"{2**stage} times embed_dim"
                )
        if self.conv_dim % NORM_GROUPS or self.conv_dim == NORM_GROUPS:  # a group of one channel has no norm
            raise ValueError(f"conv_dim must be a multiple of {NORM_GROUPS}, and larger, got {self.conv_dim}")
        if self.bert.hidden_size % HEADS:
            raise ValueError(f"bert.hidden_size must be a multiple of {HEADS}, got {self.bert.hidden_size}")
        if not 3 <= self.word_len <= self.bert.max_position_embeddings:
            raise ValueError(
                f"word_len must be between 3 and bert.max_position_embeddings ({self.bert.max_position_embeddings}), "
                f"got {self.word_len}"
            )
        number = isinstance(self.drop_path, (int, float)) and not isinstance(self.drop_path, bool)
        if not number or not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {shown(self.drop_path)}")
        if self.behaviour not in BEHAVIOURS:
            raise ValueError(f"behaviour must be one of {', '.join(BEHAVIOURS)}, got {shown(self.behaviour)}")
        if not isinstance(self.vocabulary, str) or not self.vocabulary:
            raise ValueError(f"vocabulary must be a vocab.txt or a Hugging Face id, got {shown(self.vocabulary)}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of Swin's four stages."""
        return tuple(self.embed_dim * 2**stage for stage in range(4))

    @property
    def text_width(self) -> int:
        """Width of BERT's states, of the words in every stage, and of the centre embedding."""
        return self.bert.hidden_size

    @property
    def inputs(self) -> Inputs:  # type: ignore[override]  # a class attribute elsewhere; here the vocabulary decides
        """ImageNet's statistics, images squashed, and WordPiece with the configured vocabulary."""
        return Inputs(IMAGENET_MEAN, IMAGENET_STD, f"wordpiece:{self.vocabulary}", fit="squash")

    def parameter_counts(self) -> dict[str, int]:
        """Of the text encoder, the image encoder with its fusions, the pixel decoder and the centre embedding."""
        bert, text, width = self.bert, self.text_width, self.conv_dim
        layer = 4 * text * text + 2 * text * bert.intermediate_size
        tables = bert.vocab_size + bert.max_position_embeddings + bert.type_vocab_size
        blocks = sum(12 * depth * size**2 for depth, size in zip(self.depths, self.widths, strict=True))
        heads = sum(depth * each for depth, each in zip(self.depths, self.num_heads, strict=True))
        mergings = sum(8 * size**2 for size in self.widths[:-1])
        fusions = sum(8 * size**2 + 7 * text**2 + 3 * size * text for size in self.widths)
        pixel = 2 * width**2 + 2 * width * self.pixel_ffn + HEADS * LEVELS * POINTS * 3 * width
        words = 2 * width**2 + 2 * width * text + 2 * width * self.word_ffn
        query = 2 * text**2 + 2 * width * text + 2 * text * self.query_ffn
        return {
            "bert.hidden_size, bert.num_hidden_layers, bert.vocab_size": bert.num_hidden_layers * layer + tables * text,
            "embed_dim, depths, window": blocks + mergings + fusions + heads * (2 * self.window) ** 2,
            "conv_dim, pixel_layers, pixel_ffn, word_ffn": self.pixel_layers * (pixel + words) + 10 * width**2,
            "query_layers, query_ffn": self.query_layers * query + 3 * text**2 + text * width,
        }

    def in_words(self) -> str:
        """The model and its encoder, such as ``AlignFormer, Swin-B``."""
        return f"{self.title}, {swin_name(self.embed_dim, self.depths)}"

    def without_weights(self) -> str:
        """Says that the published recipe starts from Swin's and BERT's own weights, where the sizes are theirs."""
        if self.bert != BERTConfig() or swin_name(self.embed_dim, self.depths).startswith("a "):
            return ""
        return (
            "BERT or Swin starts from random weights, which is not the published recipe; give "
            "bert_pretrain=google-bert/bert-base-uncased and swin_pretrain=swin_base_patch4_window12_384_22k.pth"
        )
