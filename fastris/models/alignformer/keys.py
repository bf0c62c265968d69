"""State dicts of AlignFormer: which encoder they belong to, and the configuration that their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastris.models.alignformer.config import AlignFormerConfig
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
from fastris.models.state_dicts import Adopted

_ADDED = re.compile(r"\.(fusion|res_gate|sym_res_gate)\.|^backbone\.norm\d\.")


def architecture(state: Mapping[str, Tensor]) -> str:
    """The name of the Swin that these weights belong to, such as Swin-B."""
    stem = state.get("backbone.patch_embed.proj.weight")
    depths = swin_depths(state, "backbone.")
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

    pixel = "classifier.pix_dec.transformer.encoder."
    query = "classifier.dynamic_conv_gen_body."
    dims: dict[str, Any] = {
        "bert": bert_sizes(state, "text_encoder.", size),
        "word_len": size(f"{pixel}key_embed.weight", 0),
        **swin_sizes(state, "backbone.", size),
        "conv_dim": size("classifier.pix_dec.mask_features.weight", 0),
        "pixel_layers": count_blocks(state, re.escape(pixel) + r"layers\.(\d{1,9})\."),
        "pixel_ffn": size(f"{pixel}layers.0.linear1.weight", 0),
        "word_ffn": size(f"{pixel}cross_attn_layers.0.ffn.0.weight", 0),
        "query_layers": count_blocks(state, re.escape(query) + r"layers\.(\d{1,9})\."),
        "query_ffn": size(f"{query}layers.0.ffn.0.weight", 0),
        "behaviour": "compat",
    }
    return AlignFormerConfig(**{**dims, **known})
