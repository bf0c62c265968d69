"""Bidirectional attention of pixels and words, with the pixels' projections absorbed into the words.

The words are few, so what is projected on the pixels' side can be projected on theirs. With x the pixels, X = x less
its mean over the pixels, Cov = X^T X / N, IN the instance norm, m the mask and k, u the words' keys and values:

1. A projection w of the pixels has the variance w^T Cov w. With rho_c = (w_c^T Cov w_c + eps)^-1/2 of the query:
   ``S = IN(Wq x) k^T / sqrt(C) = X A^T``,  ``A = (k rho) Wq / sqrt(C)``, (L, C) per sample. The query is never made.
2. With R the softmax of S over the words, Rc = R less its mean over the pixels and Cov_R = Rc^T Rc / N (L, L):
   ``IN(Wo (R u)) = Rc (U r)``,  U = u Wo^T,  r_c = (U_c^T Cov_R U_c + eps)^-1/2. A linear map that follows is absorbed
   too: ``IN(..) Wp^T = Rc E``, ``E = (U r) Wp^T``.
3. A column of P, the softmax of S over the pixels, sums to 1: ``P^T IN(Wv x) = ((P^T X) Wv^T) rho'``, rho' as in 1.
4. A row of R sums to 1, and a norm takes constants out: the biases of query, value, out and sym_value do nothing.

Every step is exact. Left per pixel are the covariance and products with L columns, in place of three C x C projections
and one of C x T. Where there are few pixels for each channel, Cov costs more than it saves: there query and sym_value
are projected, without their norms, and steps 2 and 4 hold as before. See :mod:`fastris.ops.absorbed_scores`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops.absorbed_scores import score_and_read, with_silent
from fastris.ops.checks import check_shape, check_tensors, compute_dtype
from fastris.ops.padding import check_valid
from fastris.reference import BidirectionalAttentionWeights

NAME = "bidirectional_attention"
MAX_KERNEL_WORDS = 32
"""The kernels keep all words in one tile."""


def bidirectional_attention(
    pixels: Tensor,
    words: Tensor,
    valid: Tensor,
    weights: BidirectionalAttentionWeights,
    *,
    project_weight: Tensor | None = None,
    lone_word_is_zero: bool = False,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Pixels attend to words, and words to pixels, on one score matrix: ((B, N, C), (B, L, T)).

    Args:
        pixels: (B, N, C), in any memory layout, N >= 1; words: (B, L, T), L >= 1.
        valid: (B, L), bool or numbers: True or 1 where a word is not padding.
        weights: the projections, :class:`fastris.reference.BidirectionalAttentionWeights`.
        project_weight: (C', C), a linear map without bias that follows the pixels' answer, which is then (B, N, C').
            It is folded into the words and never computed on pixels.
        lone_word_is_zero: the pixels of a sample with fewer than two valid words get exactly 0, which is what the
            formula says; as published, a norm divides their rounding noise by its own size.
        eps: added to the norms' variances.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    All tensors but ``valid`` are on one device and of one floating-point dtype; under autocast they may differ. The
    pixels' answer is in autocast's dtype where autocast is on, else in theirs; the words' answer in the wider of that
    and their own. Scores, both softmaxes, statistics and what is built of the words are in float32 or wider. Answers to
    padding words are 0; so are those of a sample that is all padding, and of a single pixel. Non-finite values stay in
    their sample.

    Beyond 32 words ``triton`` takes the way of ``torch``.

    Gradients reach every tensor but ``valid``; those of the four biases that change nothing are exactly 0. The fast
    path keeps the pixels, the scores, the centred softmax, and the two projected maps where there are few pixels; it
    can be differentiated once.

    Raises ValueError for a wrong shape, no words, no pixels or tensors on different devices; TypeError for dtypes that
    do not fit; RuntimeError when ``impl="triton"`` cannot run here.

    Source: AlignFormer's "VLBA", arXiv 2301.06429, section 3.2;
    :func:`fastris.reference.bidirectional_attention`.
    """
    _check(pixels, words, valid, weights, project_weight)
    dtype = compute_dtype(pixels)
    path = resolve(NAME, pixels.device, dtype, impl, pixels.shape[0])
    if path == "reference":
        attended, heard = reference.bidirectional_attention(
            pixels, words, valid, weights, lone_word_is_zero=lone_word_is_zero, eps=eps
        )
        return (attended if project_weight is None else F.linear(attended, project_weight)), heard
    with torch.autocast(pixels.device.type, enabled=False):
        wide = torch.promote_types(dtype, torch.float32)
        own = BidirectionalAttentionWeights(*(each.to(wide) for each in weights))
        mask = valid.to(wide)
        said = words.to(wide)
        key = mask[..., None] * F.linear(said, own.key_weight, own.key_bias)
        key = with_silent(key, own.query_bias, own.value_bias, own.out_bias, own.sym_value_bias)
        bias = 1e4 * mask - 1e4
        kernels = path == "triton" and words.shape[1] <= MAX_KERNEL_WORDS
        scored = score_and_read(pixels.to(dtype), key, bias, own.query_weight, own.sym_value_weight, eps, kernels)
        following = None if project_weight is None else project_weight.to(wide)
        rows, absorbed = scored.rows, _absorb(said, mask, scored.spread, own, following, eps)
        if lone_word_is_zero:
            alone = (mask.sum(1) < 2)[:, None, None]
            rows, absorbed = rows.masked_fill(alone, 0), absorbed.masked_fill(alone, 0)
        attended = torch.bmm(rows.to(dtype).mT, absorbed.to(dtype))
        heard = F.linear(mask[..., None] * scored.gathered, own.sym_out_weight, own.sym_out_bias)
        return attended, (mask[..., None] * heard).to(torch.promote_types(words.dtype, dtype))


def _check(
    pixels: Tensor, words: Tensor, valid: Tensor, weights: BidirectionalAttentionWeights, project_weight: Tensor | None
) -> None:
    check_tensors(NAME, pixels=pixels, words=words, project_weight=project_weight, **weights._asdict())
    check_shape(NAME, "pixels", pixels, ("B", "N", "C"))
    batch, width = pixels.shape[0], pixels.shape[2]
    check_shape(NAME, "words", words, (batch, "L", "T"))
    length, text_width = words.shape[1:]
    for name, tensor in (("pixels", pixels), ("words", words)):
        if 0 in tensor.shape[1:]:
            raise ValueError(f"{NAME}: {name} must not be empty, got {tuple(tensor.shape)}")
    outs = {"query": width, "key": width, "value": width, "out": width}
    ins = {"query": width, "sym_value": width, "out": width}
    for field, tensor in weights._asdict().items():
        part, _, kind = field.rpartition("_")
        rows, columns = outs.get(part, text_width), ins.get(part, text_width)
        check_shape(NAME, field, tensor, (rows, columns) if kind == "weight" else (rows,))
    if project_weight is not None:
        check_shape(NAME, "project_weight", project_weight, ("C'", width))
    check_valid(NAME, valid, "pixels", pixels, length)


def _absorb(
    said: Tensor,
    mask: Tensor,
    spread: Tensor,
    weights: BidirectionalAttentionWeights,
    project_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """What each word adds to a pixel that weighs it by 1 more than the mean: (B, L, C), or C' with ``project_weight``.

    Rows of the centred softmax sum to 0, so whatever all words share does nothing; it is taken out for accuracy.
    """
    value = mask[..., None] * F.linear(F.linear(said, weights.value_weight), weights.out_weight)
    shared = value.sum(1, keepdim=True) / mask.sum(1).clamp_min(1)[:, None, None]
    value = value - shared.detach()
    variance = (value * (spread @ value)).sum(1, keepdim=True).clamp_min(0)
    value = value * (variance + eps).rsqrt()
    return value if project_weight is None else F.linear(value, project_weight)
