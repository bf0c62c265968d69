"""Words that read the pixels of a map, without a map of keys or values (MagNet's language side, arXiv 2312.12198).

Keys and values are projections of the pixels, normed over the pixels, each of their T channels by itself. With X the
pixels less their mean, Cov = X^T X / N and w_c a row of W_k or W_v, the norm divides by ``sigma_c = sqrt(w_c^T Cov w_c
+ eps)``, and takes out the bias. The words are few, so with q their queries and a the softmax over the pixels

    scores = (q / sigma_k) W_k X^T / sqrt(T)   and   a v = ((a X) W_v^T) / sigma_v:

both projections meet the words and not the pixels. The norm over the words takes out the output's bias. Every step is
exact, and the same as in :mod:`fastris.ops.bidirectional_attention`: where there are few pixels for each channel, Cov
costs more than it saves, and both maps are made, without their norms.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops.absorbed_scores import read_normed, with_silent
from fastris.ops.checks import check_shape, check_tensors, compute_dtype
from fastris.ops.padding import check_valid
from fastris.reference import LanguageMask, WordPixelWeights
from fastris.reference.bidirectional_attention import instance_norm
from fastris.reference.word_pixel_attention import EPS, masked_instance_norm

NAME = "word_pixel_attention"


def word_pixel_attention(
    words: Tensor,
    pixels: Tensor,
    valid: Tensor,
    weights: WordPixelWeights,
    rule: LanguageMask,
    *,
    impl: str = "auto",
) -> Tensor:
    """The residual ``GELU(W_m (GELU(W_x l) * IN(W_o (a v))))`` of words l that read pixels: (B, L, T).

    Args:
        words: (B, L, T), L >= 1; pixels: (B, N, C), in any memory layout, N >= 1.
        valid: (B, L), bool or numbers: True or 1 where a word is not padding.
        weights: :class:`fastris.reference.WordPixelWeights`.
        rule: what padding does, ``"masked"``, ``"intended"`` or ``"released"``: see
            :func:`fastris.reference.word_pixel_attention`. ``"released"`` picks single pixels, and is computed as
            written there whatever ``impl`` says.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    All tensors but ``valid`` are on one device and of one floating-point dtype; under autocast they may differ. The
    result is in the words' dtype, or in autocast's where that is on; the products with the pixels run in the pixels'
    dtype or autocast's, everything else in float32 or wider. What padding reads is exactly 0, and so is what a single
    pixel gives. Non-finite values stay in their sample.

    Gradients reach every tensor but ``valid``; those of the biases of keys, values and output, which change nothing,
    are exactly 0. The fast path keeps the pixels and the scores for the backward pass, and the two projected maps where
    there are few pixels; it can be differentiated once. ``triton``'s tiles hold 32 words, and what is more is
    ``torch``'s.

    Raises ValueError for a wrong shape, an unknown rule, no words, no pixels or tensors on different devices; TypeError
    for dtypes that do not fit; RuntimeError when ``impl="triton"`` cannot run here.

    Source: MagNet's released code; :func:`fastris.reference.word_pixel_attention`.
    """
    _check(words, pixels, valid, weights, rule)
    dtype = compute_dtype(pixels)
    path = resolve(NAME, pixels.device, dtype, impl, pixels.shape[0])
    if path == "reference" or rule == "released":
        return reference.word_pixel_attention(words, pixels, valid, weights, rule)
    kernels = path == "triton" and _kernels_take(words.shape[1])
    with torch.autocast(pixels.device.type, enabled=False):
        wide = torch.promote_types(dtype, torch.float32)
        own = WordPixelWeights(*(each.to(wide) for each in weights))
        mask, said = valid.to(wide)[..., None], words.to(wide)
        query = mask * F.linear(said, own.query_weight, own.query_bias)
        query = with_silent(query, own.key_bias, own.value_bias, own.out_bias)
        read = mask * read_normed(query, pixels.to(dtype), own.key_weight, own.value_weight, EPS, kernels)
        out = F.linear(read, own.out_weight)
        heard = masked_instance_norm(out, mask) if rule == "masked" else instance_norm(out, EPS)
        seen = F.gelu(F.linear(said, own.project_weight, own.project_bias))
        mixed = F.gelu(F.linear(seen * heard, own.mixed_weight, own.mixed_bias))
    return mixed.to(compute_dtype(words))


def _kernels_take(words: int) -> bool:
    from fastris.kernels.bidirectional_attention import MAX_WORDS

    return words <= MAX_WORDS


_kernels_take._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile asks once, for constants


def _check(words: Tensor, pixels: Tensor, valid: Tensor, weights: WordPixelWeights, rule: str) -> None:
    check_tensors(NAME, words=words, pixels=pixels, **weights._asdict())
    check_shape(NAME, "words", words, ("B", "L", "T"))
    batch, length, text_width = words.shape
    check_shape(NAME, "pixels", pixels, (batch, "N", "C"))
    for name, tensor in (("words", words), ("pixels", pixels)):
        if 0 in tensor.shape[1:]:
            raise ValueError(f"{NAME}: {name} must not be empty, got {tuple(tensor.shape)}")
    for field, tensor in weights._asdict().items():
        columns = pixels.shape[2] if field in ("key_weight", "value_weight") else text_width
        check_shape(NAME, field, tensor, (text_width, columns) if field.endswith("weight") else (text_width,))
    check_valid(NAME, valid, "words", words, length)
    if rule not in get_args(LanguageMask):
        raise ValueError(f"{NAME}: rule must be one of {', '.join(get_args(LanguageMask))}, got {rule!r}")
