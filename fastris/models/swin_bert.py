"""What the configurations of systems with a Swin and a BERT have in common: fields, checks, inputs and counts."""

from __future__ import annotations

from collections.abc import Mapping

from fastris.models.config import ModelConfig
from fastris.models.encoders import IMAGENET_MEAN, IMAGENET_STD, BERTConfig, swin_name
from fastris.models.inputs import Inputs
from fastris.models.limits import SIZES, check_fields, check_parameters, whole_numbers
from fastris.options.values import shown

NORM_GROUPS = 32
"""Groups of the pixel decoders' GroupNorms."""

_MAX_BLOCKS = 128  # of one stage of Swin; its largest has 18


class SwinBertConfig(ModelConfig):
    """Base of the dataclasses that describe a system with these encoders; a subclass has the fields named here."""

    bert: BERTConfig
    vocabulary: str
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window: int
    drop_path: float
    conv_dim: int

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
        """Raise ValueError, naming the field, where the sizes do not fit together; a subclass adds its own checks."""
        for stage, heads in enumerate(self.num_heads):
            if self.widths[stage] % heads:
                raise ValueError(
                    f"num_heads[{stage}] ({heads}) must divide the stage's width ({self.widths[stage]}), which is "
                    f"{2**stage} times embed_dim"
                )
        if self.conv_dim % NORM_GROUPS or self.conv_dim == NORM_GROUPS:  # a group of one channel has no norm
            raise ValueError(f"conv_dim must be a multiple of {NORM_GROUPS}, and larger, got {self.conv_dim}")
        if not 3 <= self.word_len <= self.bert.max_position_embeddings:
            raise ValueError(
                f"word_len must be between 3 and bert.max_position_embeddings ({self.bert.max_position_embeddings}), "
                f"got {self.word_len}"
            )
        number = isinstance(self.drop_path, (int, float)) and not isinstance(self.drop_path, bool)
        if not number or not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {shown(self.drop_path)}")
        if not isinstance(self.vocabulary, str) or not self.vocabulary:
            raise ValueError(f"vocabulary must be a vocab.txt or a Hugging Face id, got {shown(self.vocabulary)}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of Swin's four stages."""
        return tuple(self.embed_dim * 2**stage for stage in range(4))

    @property
    def text_width(self) -> int:
        """Width of BERT's states, and of the words in every stage."""
        return self.bert.hidden_size

    @property
    def inputs(self) -> Inputs:  # type: ignore[override]  # a class attribute elsewhere; here the vocabulary decides
        """ImageNet's statistics, images squashed, and WordPiece with the configured vocabulary."""
        return Inputs(IMAGENET_MEAN, IMAGENET_STD, f"wordpiece:{self.vocabulary}", fit="squash")

    def encoder_counts(self) -> tuple[int, int]:
        """About how many parameters BERT has, and Swin with its mergings."""
        bert, text = self.bert, self.text_width
        layer = 4 * text * text + 2 * text * bert.intermediate_size
        tables = bert.vocab_size + bert.max_position_embeddings + bert.type_vocab_size
        blocks = sum(12 * depth * size**2 for depth, size in zip(self.depths, self.widths, strict=True))
        heads = sum(depth * each for depth, each in zip(self.depths, self.num_heads, strict=True))
        mergings = sum(8 * size**2 for size in self.widths[:-1])
        swin = blocks + mergings + heads * (2 * self.window) ** 2
        return bert.num_hidden_layers * layer + tables * text, swin

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
