"""State dicts of MagNet: which encoder they belong to, and the configuration that their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastris.models.encoder_weights import (
    bert_sizes,
    bert_weights,
    count_blocks,
    fitted_table,
    swin_depths,
    swin_sizes,
    swin_weights,
)
from fastris.models.encoders import swin_name
from fastris.models.magnet.config import LEVELS, POINTS, MagNetConfig
from fastris.models.state_dicts import Adopted

_IMAGE, _LANGUAGE = "image_model.", "language_model."
_NOT_SWINS = re.compile(r"\.(fusion|fusions|pyramids|mixer|res_gate)\.|^image_model\.norm\d\.")
_NOT_BERTS = re.compile(r"^language_model\.(pwams|res_gates|norms)\.")


def architecture(state: Mapping[str, Tensor]) -> str:
    """The name of the Swin that these weights belong to, such as Swin-B."""
    stem = state.get(f"{_IMAGE}patch_embed.proj.weight")
    depths = swin_depths(state, _IMAGE)
    if stem is None or not any(depths):
        return "an unknown image encoder"
    return swin_name(stem.shape[0], depths)


def adopt_encoder(state: Mapping[str, Tensor]) -> Adopted | None:
    """Swin's weights, renamed for the ``image_model``, or BERT's, for the ``language_model``; None for others.

    What these encoders do not have may be missing: the exchange between pixels and words, its gates, the output norms.
    Tables of relative positions are resized to the model's windows.
    """
    if (swin := swin_weights(state)) is not None:
        return Adopted({_IMAGE + name: tensor for name, tensor in swin.items()}, _IMAGE, _is_not_swins, fitted_table)
    if (bert := bert_weights(state)) is not None:
        return Adopted({_LANGUAGE + name: tensor for name, tensor in bert.items()}, _LANGUAGE, _is_not_berts)
    return None


def _is_not_swins(name: str) -> bool:
    return bool(_NOT_SWINS.search(name)) or name.endswith("relative_position_index")


def _is_not_berts(name: str) -> bool:
    return bool(_NOT_BERTS.match(name))


def infer_config(state: Mapping[str, Tensor], **known: Any) -> MagNetConfig:
    """Derive a MagNet's configuration from its weights' shapes (released names).

    The heads of BERT are taken as 64 wide. What shapes do not tell takes its default unless given in ``known``, and
    ``language_mask`` is ``released``: weights without a configuration are those of the released code.

    Raises ValueError when these are not the weights of a MagNet, naming what is missing.
    """

    def size(name: str, axis: int) -> int:
        if name not in state or state[name].ndim <= axis:
            raise ValueError(f"this is no MagNet state dict: {name} is missing, so the model's sizes are unknown")
        return state[name].shape[axis]

    pixel = "classifier.pixel_decoder."
    layers = f"{pixel}transformer.encoder.layers."
    ffn = "classifier.predictor.transformer_ffn_layers."
    bert = bert_sizes(state, _LANGUAGE, size)
    dims: dict[str, Any] = {
        "bert": bert,
        "word_len": min(MagNetConfig.word_len, bert.max_position_embeddings),
        **swin_sizes(state, _IMAGE, size),
        "conv_dim": size(f"{pixel}mask_features.weight", 0),
        "decoder_heads": size(f"{layers}0.self_attn.attention_weights.weight", 0) // (LEVELS * POINTS),
        "pixel_layers": count_blocks(state, re.escape(layers) + r"(\d{1,9})\."),
        "pixel_ffn": size(f"{layers}0.linear1.weight", 0),
        "query_layers": count_blocks(state, re.escape(ffn) + r"(\d{1,9})\."),
        "query_ffn": size(f"{ffn}0.linear1.weight", 0),
        "language_mask": "released",
    }
    return MagNetConfig(**{**dims, **known})
