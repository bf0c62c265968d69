"""Pixels that read the words of a sentence and mix what they read with what they are (MagNet, arXiv 2312.12198).

The words are few, so what is projected behind the attention can be projected on their side. With x a pixel, k_j, v_j
the words' keys and values, a the softmax over the words, LN(y) = g norm(y) + h:

1. ``W_o (a v) + b_o = sum_j a_j v'_j`` with ``v'_j = W_o v_j + b_o``, as the a_j sum to 1. With v'' the v' less their
   means over the channels and ``G = v'' v''^T / C``, (L, L), the norm of the output needs no pixel's channels:
   ``LN(W_o (a v) + b_o) = (a / sqrt(a G a^T + eps)) (g v'') + h``. A C x C product of every pixel becomes L x C.
2. The norm of the query z = W_q x + b_q, centred, multiplies by one number a pixel, so it follows the product:
   ``LN(z) k_j = (z / sqrt(|z|^2 / C + eps)) (g k_j) + h k_j``, and as a vector per word ``z (g k_j) = (W_q^T g k_j) x +
   b_q g k_j``. Of z its length alone is needed.
3. The bias of the keys adds one number to all scores of a pixel, which a softmax takes out.

Every step is exact; three C x C products of every pixel are left of four, and six of eight in the backward pass. Of
the query's norm the slope, too, needs no query: see :mod:`fastris.ops.pixel_word_products`. Where there are few pixels
for each channel it costs less to make the queries again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops.absorbed_scores import with_silent
from fastris.ops.checks import check_shape, check_tensors, compute_dtype
from fastris.ops.padding import check_valid
from fastris.ops.pixel_word_products import Answers, attend_and_mix
from fastris.reference import PixelWordWeights
from fastris.reference.pixel_word_attention import MASKED

NAME = "pixel_word_attention"
EPS = 1e-5
"""Of both norms."""


def pixel_word_attention(
    pixels: Tensor, words: Tensor, valid: Tensor, weights: PixelWordWeights, *, impl: str = "auto"
) -> Tensor:
    """The residual ``GELU(W_m (GELU(W_x x) * LN(W_o (a v))))`` of pixels x that read words: (B, N, C).

    Args:
        pixels: (B, N, C), in any memory layout, N >= 1; words: (B, L, T), L >= 1.
        valid: (B, L), bool or numbers: True or 1 where a word is not padding.
        weights: :class:`fastris.reference.PixelWordWeights`.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    All tensors but ``valid`` are on one device and of one floating-point dtype; under autocast they may differ. The
    result is in the pixels' dtype, or in autocast's where that is on. Softmax, statistics and what is built of the
    words are in float32 or wider. Padding has no weight, and no gradient reaches its words; a sentence of nothing
    else is read as zeros, through the output's projection and norm. Non-finite values stay in their sample.

    Gradients reach every tensor but ``valid``; that of the keys' bias, which changes nothing, is exactly 0. The fast
    path keeps the pixels, W_x x and the argument of the last GELU for the backward pass, beside a few numbers for every
    pixel and word; it can be differentiated once. Fewer pixels than words are computed as published.
    ``triton``'s tiles hold 32 words, and what is more is ``torch``'s; of every pixel and word it keeps the score alone.

    Raises ValueError for a wrong shape, no words, no pixels or tensors on different devices; TypeError for dtypes that
    do not fit; RuntimeError when ``impl="triton"`` cannot run here.

    Source: MagNet's released code; :func:`fastris.reference.pixel_word_attention`.
    """
    _check(pixels, words, valid, weights)
    dtype = compute_dtype(pixels)
    path = resolve(NAME, pixels.device, dtype, impl, pixels.shape[0])
    if path == "reference" or pixels.shape[1] < words.shape[1]:
        return reference.pixel_word_attention(pixels, words, valid, weights)
    with torch.autocast(pixels.device.type, enabled=False):
        wide = torch.promote_types(dtype, torch.float32)
        own = PixelWordWeights(*(each.to(wide) for each in weights))
        mask, said = valid.to(wide)[..., None], words.to(wide)
        key = mask * F.linear(said, own.key_weight) * pixels.shape[-1] ** -0.5
        key = with_silent(key, own.key_bias)
        score_bias = key @ own.query_norm_bias + MASKED * (1 - mask[..., 0])
        return F.gelu(
            attend_and_mix(
                pixels.to(dtype),
                key * own.query_norm_weight,
                score_bias,
                _answers(said, mask, own),
                (own.query_weight, own.query_bias),
                (own.project_weight, own.project_bias),
                (own.mixed_weight, own.mixed_bias),
                EPS,
                path == "triton" and _kernels_take(words.shape[1]),
            )
        )


def _kernels_take(words: int) -> bool:
    from fastris.kernels.pixel_word_attention import MAX_WORDS

    return words <= MAX_WORDS


_kernels_take._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile asks once, for constants


def _check(pixels: Tensor, words: Tensor, valid: Tensor, weights: PixelWordWeights) -> None:
    check_tensors(NAME, pixels=pixels, words=words, **weights._asdict())
    check_shape(NAME, "pixels", pixels, ("B", "N", "C"))
    batch, _, width = pixels.shape
    check_shape(NAME, "words", words, (batch, "L", "T"))
    for name, tensor in (("pixels", pixels), ("words", words)):
        if 0 in tensor.shape[1:]:
            raise ValueError(f"{NAME}: {name} must not be empty, got {tuple(tensor.shape)}")
    for field, tensor in weights._asdict().items():
        columns = words.shape[2] if field in ("key_weight", "value_weight") else width
        is_matrix = field.endswith("weight") and "norm" not in field
        check_shape(NAME, field, tensor, (width, columns) if is_matrix else (width,))
    check_valid(NAME, valid, "pixels", pixels, words.shape[1])


def _answers(said: Tensor, mask: Tensor, weights: PixelWordWeights) -> Answers:
    """What the words (B, L, T) answer, with the output's projection and norm folded into them."""
    value = mask * F.linear(said, weights.value_weight, weights.value_bias)
    answer = F.linear(value, weights.out_weight, weights.out_bias)
    answer = answer - answer.mean(-1, keepdim=True)
    exact = answer.double()  # for answers that cancel: a small variance of large numbers
    gram = torch.bmm(exact, exact.mT) / answer.shape[-1]
    return Answers(answer * weights.out_norm_weight, gram, weights.out_norm_bias)
