"""Attention to few words with the pixels' projections absorbed into them, alone and as CRIS's whole sub-layer.

:mod:`fastris.ops.cross_attention` explains the algebra: :func:`absorb` makes keys and values of the pixels' full width
D, once per sample. The backward passes are hand-written to keep little: autograd alone would keep the scores too, and
of the sub-layer the normalised pixels, the queries, and input and output of the second norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastris.reference import SeparateAttentionWeights


def absorb(
    key: Tensor, value: Tensor, weights: SeparateAttentionWeights, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys K' (B, heads, L, D), their bias b (B, heads, L) and values V' (B, heads, L, D) of words (B, L, their width).

    In the dtype of ``key`` and ``value``. The output's bias is left to the caller.
    """
    batch, words = key.shape[:2]
    dim = weights.out_weight.shape[0]
    width = dim // num_heads
    query_weight, key_weight, value_weight = (each.to(key.dtype) for each in weights[:3])
    query_bias, key_bias, value_bias = weights.in_proj_bias.to(key.dtype).chunk(3)
    output_weight = weights.out_weight.to(key.dtype)

    def by_head(projected: Tensor) -> Tensor:  # (B, L, D) -> (heads, B * L, d)
        return projected.reshape(batch * words, num_heads, width).transpose(0, 1)

    def by_sample(absorbed: Tensor) -> Tensor:  # (heads, B * L, D) -> (B, heads, L, D)
        return absorbed.unflatten(1, (batch, words)).transpose(0, 1)

    projected_key = by_head(F.linear(key, key_weight, key_bias) * width**-0.5)
    projected_value = by_head(F.linear(value, value_weight, value_bias))
    keys = torch.bmm(projected_key, query_weight.reshape(num_heads, width, dim))
    bias = torch.bmm(projected_key, query_bias.reshape(num_heads, width, 1))
    values = torch.bmm(projected_value, output_weight.T.reshape(num_heads, width, dim))
    return by_sample(keys), by_sample(bias).squeeze(-1), by_sample(values)


def bare_attention(
    query: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, bias: Tensor, silent: Tensor | None
) -> Tensor:
    """``sum_h softmax(query K_h^T + b_h) V_h + bo``: (B, N, D) in query's dtype, which is that of the products.

    query (B, N, D), ``bias`` bo (D,) in the dtype of ``key_bias``; the others as in :func:`absorbed_attention`.
    """
    return _BareAttention.apply(query, keys, key_bias, values, bias, silent)


class _BareAttention(torch.autograd.Function):
    """Keeps the queries and the attention weights for the backward pass."""

    @staticmethod
    def forward(ctx, query, keys, key_bias, values, bias, silent):
        keys, values = keys.flatten(1, 2), values.flatten(1, 2)
        weights = _attention_weights(query, keys, key_bias, silent)
        ctx.save_for_backward(query, keys, values, weights)
        ctx.wide = key_bias.dtype
        return _gather(weights, values, bias, 0.0).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        query, keys, values, weights = ctx.saved_tensors
        need_query, need_keys, _, need_values, need_bias, _ = ctx.needs_input_grad
        d_bias = upstream.sum((0, 1), dtype=ctx.wide) if need_bias else None
        d_values = _by_head(weights, torch.bmm(weights.flatten(1, 2), upstream)) if need_values else None
        d_scores = _softmax_backward(torch.bmm(values, upstream.mT).view_as(weights), weights, 0.0)
        d_key_bias = d_scores.sum(-1, dtype=ctx.wide)
        d_scores = d_scores.flatten(1, 2)
        d_keys = _by_head(weights, torch.bmm(d_scores, query)) if need_keys else None
        return torch.bmm(d_scores.mT, keys) if need_query else None, d_keys, d_key_bias, d_values, d_bias, None


def absorbed_attention(
    x: Tensor,
    positions: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    affine: Tensor,
    silent: Tensor | None,
    dropout: float,
    attention_dropout: float,
    eps: float,
) -> Tensor:
    """``x + drop(LN(sum_h drop(softmax((LN(x) + pos) K_h^T + b_h)) V_h + bo))``: (B, N, D) in x's dtype.

    x (B, N, D), positions (N, D); keys and values (B, heads, L, D) in the dtype of the matrix products; ``key_bias``
    (B, heads, L), -inf where a word is padding, and ``affine`` (5, D), both in float32 (float64 for float64): weight
    and bias of the first norm, bo, weight and bias of the second norm. ``silent`` (B,) is True for samples whose
    words are all padding. ``values`` already carry :func:`kept_scale` of ``attention_dropout``.
    """
    return _AbsorbedAttention.apply(
        x, positions, keys, key_bias, values, affine, silent, dropout, attention_dropout, eps
    )


def kept_scale(dropout: float) -> float:
    """The factor by which dropout scales the kept numbers: 1 / (1 - p), or 0 where all are dropped."""
    return 1 / (1 - dropout) if dropout < 1 else 0.0


class _AbsorbedAttention(torch.autograd.Function):
    """Keeps for the backward pass: x, the attention weights, the branch's mask, the norms' means and deviations.

    Scores and weights are (B, heads, L, N): a softmax over a few words is fast where the pixels are contiguous. Softmax
    has no negative weights, so a weight that dropout drops is stored with its sign flipped. The queries and the output
    of the attention are cheap to compute again.
    """

    @staticmethod
    def forward(ctx, x, positions, keys, key_bias, values, affine, silent, dropout, attention_dropout, eps):
        keys, values = keys.flatten(1, 2), values.flatten(1, 2)
        query, *norm = _query(x, positions, affine, eps, keys.dtype)
        weights = _attention_weights(query, keys, key_bias, silent)
        if attention_dropout > 0:
            dropped = torch.empty_like(weights, dtype=torch.bool).bernoulli_(attention_dropout)
            weights = torch.where(dropped, -weights, weights)
        gathered = _gather(weights, values, affine[2], attention_dropout)
        branch, *post_norm = torch.native_layer_norm(gathered, x.shape[-1:], affine[3], affine[4], eps)
        kept = None
        if dropout > 0:
            kept = torch.empty_like(branch, dtype=torch.bool).bernoulli_(1 - dropout)
            branch = branch.mul_(kept).mul_(kept_scale(dropout))
        ctx.save_for_backward(x, positions, keys, values, affine, weights, kept, *norm, *post_norm)
        ctx.dropouts, ctx.eps = (dropout, attention_dropout), eps
        return (x + branch).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, positions, keys, values, affine, weights, kept, mean, rstd, post_mean, post_rstd = ctx.saved_tensors
        need_x, need_positions, need_keys, _, need_values, need_affine, *_ = ctx.needs_input_grad
        dropout, attention_dropout = ctx.dropouts
        d_branch = upstream.to(affine.dtype)
        if kept is not None:
            d_branch = d_branch * kept * kept_scale(dropout)
        gathered = _gather(weights, values, affine[2], attention_dropout)
        d_gathered, *d_post = _norm_backward(d_branch, gathered, post_mean, post_rstd, affine[3], affine[4])
        d_affine = [d_gathered.sum((0, 1)), *d_post]
        d_gathered = d_gathered.to(values.dtype)
        d_values = _by_head(weights, torch.bmm(_kept(weights, attention_dropout), d_gathered)) if need_values else None

        d_scores = _softmax_backward(torch.bmm(values, d_gathered.mT).view_as(weights), weights, attention_dropout)
        d_key_bias = d_scores.sum(-1, dtype=affine.dtype)
        d_scores = d_scores.flatten(1, 2)
        d_keys = None
        if need_keys:
            query, *_ = _query(x, positions, affine, ctx.eps, keys.dtype)
            d_keys = _by_head(weights, torch.bmm(d_scores, query))
        d_query = torch.bmm(d_scores.mT, keys).to(affine.dtype)
        d_positions = d_query.sum(0).to(positions.dtype) if need_positions else None
        d_x, *d_norm = _norm_backward(d_query, x.to(affine.dtype), mean, rstd, affine[0], affine[1])
        d_x = d_x.add_(upstream).to(x.dtype) if need_x else None
        d_affine = torch.stack([*d_norm, *d_affine]) if need_affine else None
        return d_x, d_positions, d_keys, d_key_bias, d_values, d_affine, None, None, None, None


def _query(x: Tensor, positions: Tensor, affine: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``LN(x) + pos`` in ``dtype``, and the norm's mean and reciprocal deviation."""
    normed, mean, rstd = torch.native_layer_norm(x.to(affine.dtype), x.shape[-1:], affine[0], affine[1], eps)
    return normed.add_(positions).to(dtype), mean, rstd


def _attention_weights(query: Tensor, keys: Tensor, key_bias: Tensor, silent: Tensor | None) -> Tensor:
    """(B, heads, L, N) from queries (B, N, D), keys (B, heads * L, D) and their bias (B, heads, L); 0 where silent."""
    scores = torch.bmm(keys, query.mT) + key_bias.flatten(1)[..., None]  # in place, checkpoints could not keep products
    weights = torch.softmax(scores.unflatten(1, key_bias.shape[1:]), dim=2).to(keys.dtype)
    return weights if silent is None else weights.masked_fill_(silent[:, None, None, None], 0)


def _gather(weights: Tensor, values: Tensor, bias: Tensor, attention_dropout: float) -> Tensor:
    """The attention's output (B, N, D): the kept weights times the values, plus the output bias."""
    return torch.bmm(_kept(weights, attention_dropout).mT, values) + bias


def _kept(weights: Tensor, attention_dropout: float) -> Tensor:
    """The weights (B, heads * L, N) with 0 in place of the dropped ones."""
    return (weights.clamp_min(0) if attention_dropout > 0 else weights).flatten(1, 2)


def _softmax_backward(d_weights: Tensor, weights: Tensor, attention_dropout: float) -> Tensor:
    """The gradient of the scores; all of (B, heads, L, N)."""
    if attention_dropout > 0:
        d_weights = torch.where(torch.signbit(weights), 0, d_weights)
        weights = weights.abs()
    product = d_weights * weights
    return torch.addcmul(product, weights, product.sum(2, keepdim=True), value=-1)


def _norm_backward(upstream, x, mean, rstd, weight, bias) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a LayerNorm's input, weight and bias."""
    shape = x.shape[-1:]
    return torch.ops.aten.native_layer_norm_backward(upstream, x, shape, mean, rstd, weight, bias, [True, True, True])


def _by_head(weights: Tensor, gradient: Tensor) -> Tensor:
    """(B, heads * L, D) -> (B, heads, L, D)."""
    return gradient.unflatten(1, weights.shape[1:3])
