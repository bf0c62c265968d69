"""Every pixel looks at every word: the decoder's cross-attention sub-layer, with the text absorbed into the projections.

The words are few, so both projections of the pixels can be moved to the words. With q = LN(x) + pos and, for head h,
the slices Wq_h, bq_h, Wo_h of the query and output projections and the projected words K_h, V_h:

    (q Wq_h^T + bq_h) K_h^T / sqrt(d)  =  q K'_h^T + b_h     K'_h = K_h Wq_h / sqrt(d)  (L, D),  b_h = K_h bq_h / sqrt(d)
    sum_h P_h V_h Wo_h^T + bo          =  sum_h P_h V'_h + bo      V'_h = V_h Wo_h^T    (L, D)

Both are exact. What is left for each pixel is attention with D-wide keys and values, heads * L of them, in place of two
D x D projections. b_h is -inf where a word is padding. V keeps its bias, so dropout on the weights P is still exact.
K', b and V' are built once per sample, in float32 under ordinary autograd, and then rounded to the compute dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops.absorbed_attention import absorbed_attention
from fastris.ops.common import check_shape, check_tensors, compute_dtype
from fastris.reference import AttentionWeights

# The kernels' softmax holds one head's words in a tile of at most this many columns.
MAX_KERNEL_WORDS = 128


def cross_attention(
    x: Tensor,
    text: Tensor,
    positions: Tensor,
    text_positions: Tensor,
    padding_mask: Tensor | None,
    weights: AttentionWeights,
    num_heads: int,
    *,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """``x + drop(LN(CrossAttn(q = LN(x) + pos, k = text + textpos, v = text)))`` of pixels and words: (B, N, D).

    Args:
        x: pixels (B, N, D). Any memory layout; sequence-first storage seen through ``transpose(0, 1)`` is read in place.
        text: words (B, L, D), L >= 1.
        positions: (N, D), added to the normalised pixels; text_positions: (L, D), added to the words' keys.
        padding_mask: (B, L) bool, True where a word is padding, or None.
        weights: the sub-layer's parameters, :class:`fastris.reference.AttentionWeights`.
        num_heads: any divisor of D.
        dropout: probability that a channel of the branch is dropped; attention_dropout: that an attention weight is.
            Both act only when ``training``. ``torch.manual_seed`` makes the fast paths repeat; each path and device
            draws its own masks, of the same distribution.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    Returns (B, N, D) in x's dtype: the residual keeps its precision. The matrix products run in autocast's dtype where
    autocast is on, else in x's dtype; normalisation and softmax inside the kernels run in float32.

    Where heads * L >= D absorbing the text costs more than it saves (at D = 512 and 8 heads: from 64 words on), and the
    fast paths project the pixels as published and call PyTorch's ``scaled_dot_product_attention``; so does ``triton``
    for more than 128 words. On a CPU, outside ``torch.compile``, words behind the longest real sentence of the batch are
    cut off first: they have no weight, so nothing changes.

    A sample whose words are all padding: the published formula divides 0 by 0 there and answers NaN. The fast paths
    attend to nothing: all weights are 0, and output and gradients are finite. Non-finite inputs at real positions pass
    through as IEEE arithmetic says.

    Raises ValueError for a wrong shape, no words, a dropout outside [0, 1] or tensors on different devices; TypeError
    for dtypes that do not fit; RuntimeError when ``impl="triton"`` cannot run here.

    Source: CRIS section 3.3, published ``TransformerDecoderLayer.forward``; :func:`fastris.reference.cross_attention`.
    """
    _check(x, text, positions, text_positions, padding_mask, weights, num_heads, dropout, attention_dropout)
    dtype = compute_dtype(x)
    path = resolve("cross_attention", x.device, dtype, impl)
    if path == "reference":
        options = {"dropout": dropout, "attention_dropout": attention_dropout, "training": training, "eps": eps}
        words_first = text.transpose(0, 1), positions[:, None], text_positions[:, None]
        output = reference.cross_attention(
            x.transpose(0, 1), *words_first, padding_mask, weights, num_heads, **options
        )
        return output.transpose(0, 1)
    if not training:
        dropout = attention_dropout = 0.0
    if padding_mask is not None and x.device.type == "cpu" and not torch.compiler.is_compiling():
        text, text_positions, padding_mask = _trim(text, text_positions, padding_mask)
    words, dim = text.shape[1:]
    with torch.autocast(x.device.type, enabled=False):
        if num_heads * words >= dim or (path == "triton" and words > MAX_KERNEL_WORDS):
            drops = dropout, attention_dropout
            return _projected(x, text, positions, text_positions, padding_mask, weights, num_heads, drops, eps, dtype)
        keys, key_bias, values = absorb_text(text, text_positions, padding_mask, weights, num_heads)
        values = values * _keep_scale(attention_dropout)
        affine = _affine(weights, keys.dtype)
        operands = (x, positions, keys.to(dtype), key_bias, values.to(dtype), affine, dropout, attention_dropout, eps)
        if path == "triton":
            from fastris.kernels.cross_attention import absorbed_attention as fused_attention

            return fused_attention(*operands)
        return absorbed_attention(*operands)
