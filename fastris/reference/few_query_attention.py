"""Attention between tensors of different widths, which AlignFormer's decoders use.

Few queries over many pixels for its centre embedding (and for MagNet's mask decoder), many pixels over few words in its
pixel decoder (arXiv 2301.06429, section 3.3, and its released code). Shapes: B batch, Q queries of width D, N pixels of
width K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class SeparateAttentionWeights(NamedTuple):
    """The parameters of ``torch.nn.MultiheadAttention(D, heads, kdim=K, vdim=V)``.

    ``query_weight`` (D, D), ``key_weight`` (D, K), ``value_weight`` (D, V), ``in_proj_bias`` (3D,) with their three
    biases one behind the other, ``out_weight`` (D, D), ``out_bias`` (D,).
    """

    query_weight: Tensor
    key_weight: Tensor
    value_weight: Tensor
    in_proj_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


def few_query_attention(
    query: Tensor,
    query_positions: Tensor,
    pixels: Tensor,
    level: Tensor,
    positions: Tensor,
    weights: SeparateAttentionWeights,
    num_heads: int,
    forbidden: Tensor | None = None,
) -> Tensor:
    """``MHA(query + query_positions, y + positions, y)`` with ``y = pixels + level``: (B, Q, D).

    ``query`` (B, Q, D), ``query_positions`` (Q, D), ``pixels`` (B, N, K), ``level`` (K,) the embedding of their
    resolution, ``positions`` (N, K). Values carry the level's embedding but no positions. No query reads a pixel that
    is ``forbidden`` (B, N), as in MagNet's mask decoder.
    """
    values = pixels + level
    keys = values + positions.to(values.dtype)
    forbidden = forbidden if query.shape[0] else None  # PyTorch takes no mask of nothing
    return separate_attention(query + query_positions, keys, values, weights, num_heads, forbidden)


def separate_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: SeparateAttentionWeights,
    num_heads: int,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Attention of ``query`` (B, Q, D) over ``key`` (B, N, K) and ``value`` (B, N, V): (B, Q, D).

    ``padding_mask`` (B, N) is True at keys that are padding; a row of nothing else gives what PyTorch makes of it.
    """
    output, _ = F.multi_head_attention_forward(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        embed_dim_to_check=query.shape[-1],
        num_heads=num_heads,
        in_proj_weight=None,
        in_proj_bias=weights.in_proj_bias,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=weights.out_weight,
        out_proj_bias=weights.out_bias,
        key_padding_mask=padding_mask,
        need_weights=False,
        use_separate_proj_weight=True,
        q_proj_weight=weights.query_weight,
        k_proj_weight=weights.key_weight,
        v_proj_weight=weights.value_weight,
    )
    return output.transpose(0, 1)
