"""State dicts of AlignFormer: which encoder they belong to, and the configuration that their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fastris.models.alignformer.config import AlignFormerConfig
from fastris.models.encoder_weights import bert_weights, fitted_table, swin_weights
from fastris.models.encoders import BERTConfig, swin_name
from fastris.models.state_dicts import Adopted

_BLOCK = "backbone.layers.{}.blocks."
_ADDED = re.compile(r"\.(fusion|res_gate|sym_res_gate)\.|^backbone\.norm\d\.")
_HEAD_WIDTH = 64  # of BERT's attentions, in every size that was published


def architecture(state: Mapping[str, Tensor]) -> str:
    """The name of the Swin that these weights belong to, such as Swin-B."""
    stem = state.get("backbone.patch_embed.proj.weight")
    depths = _depths(state)
    if stem is None or not any(depths):
        return "an unknown image encoder"
    return swin_name(stem.shape[0], depths)


def adopt_encoder(state: Mapping[str, Tensor]) -> Adopted | None:
    """Swin's weights, renamed for the ``backbone``, or BERT's, for the ``text_encoder``; None for others.

    Of the backbone, what Swin does not have may be missing: the exchange with the words, its gates, the output norms.
    Tables of relative positions are resized to the model's windows.
    """
    if (swin := swin_weights(state)) is not None:
        named = {f"backbone.{name}": tensor for name, tensor in swin.items()}
        return Adopted(named, "backbone.", _is_not_swins, fitted_table)
    if (bert := bert_weights(state)) is not None:
        return Adopted({f"text_encoder.{name}": tensor for name, tensor in bert.items()}, "text_encoder.")
    return None


def _is_not_swins(name: str) -> bool:
    return bool(_ADDED.search(name)) or name.endswith("relative_position_index")


def infer_config(state: Mapping[str, Tensor], **known: Any) -> AlignFormerConfig:
    """Derive an AlignFormer's configuration from its weights' shapes (released names).

    The heads of BERT are taken as 64 wide. What shapes do not tell takes its default unless given in ``known``, and
    ``behaviour`` is ``compat``: weights without a configuration are those of the released code.

    Raises ValueError when these are not the weights of an AlignFormer, naming what is missing.
    """

    def size(name: str, axis: int) -> int:
        if name not in state or state[name].ndim <= axis:
            raise ValueError(f"this is no AlignFormer state dict: {name} is missing, so the model's sizes are unknown")
        return state[name].shape[axis]

    bert = "text_encoder.embeddings."
    width = size(f"{bert}word_embeddings.weight", 1)
    table = "0.attn.relative_position_bias_table"
    pixel = "classifier.pix_dec.transformer.encoder."
    query = "classifier.dynamic_conv_gen_body."
    dims: dict[str, Any] = {
        "bert": BERTConfig(
            vocab_size=size(f"{bert}word_embeddings.weight", 0),
            hidden_size=width,
            num_hidden_layers=_count(state, r"text_encoder\.encoder\.layer\.(\d{1,9})\."),
            num_attention_heads=max(1, width // _HEAD_WIDTH),
            intermediate_size=size("text_encoder.encoder.layer.0.intermediate.dense.weight", 0),
            max_position_embeddings=size(f"{bert}position_embeddings.weight", 0),
            type_vocab_size=size(f"{bert}token_type_embeddings.weight", 0),
        ),
        "word_len": size(f"{pixel}key_embed.weight", 0),
        "embed_dim": size("backbone.patch_embed.proj.weight", 0),
        "depths": _depths(state),
        "num_heads": tuple(size(_BLOCK.format(stage) + table, 1) for stage in range(4)),
        "window": (round(size(_BLOCK.format(0) + table, 0) ** 0.5) + 1) // 2,
        "conv_dim": size("classifier.pix_dec.mask_features.weight", 0),
        "pixel_layers": _count(state, re.escape(pixel) + r"layers\.(\d{1,9})\."),
        "pixel_ffn": size(f"{pixel}layers.0.linear1.weight", 0),
        "word_ffn": size(f"{pixel}cross_attn_layers.0.ffn.0.weight", 0),
        "query_layers": _count(state, re.escape(query) + r"layers\.(\d{1,9})\."),
        "query_ffn": size(f"{query}layers.0.ffn.0.weight", 0),
        "behaviour": "compat",
    }
    return AlignFormerConfig(**{**dims, **known})


def _depths(state: Iterable[str]) -> tuple[int, ...]:
    names = list(state)
    return tuple(_count(names, re.escape(_BLOCK.format(stage)) + r"(\d{1,9})\.") for stage in range(4))


def _count(names: Iterable[str], pattern: str) -> int:
    """The number of blocks: the largest number that ``pattern`` finds in the names plus one, 0 if it finds none."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)
