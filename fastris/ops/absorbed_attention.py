"""The absorbed cross-attention sub-layer in plain PyTorch: attention with keys and values of the full width D.

:mod:`fastris.ops.cross_attention` explains where keys and values come from. The backward pass is hand-written to keep
little: autograd alone would keep the normalised pixels, the queries, the scores, and input and output of the second
norm.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        scores = torch.bmm(keys, query.mT).to(affine.dtype).add_(key_bias.flatten(1)[..., None])
        weights = torch.softmax(scores.unflatten(1, key_bias.shape[1:]), dim=2).to(keys.dtype)
        if silent is not None:
            weights = weights.masked_fill_(silent[:, None, None, None], 0)
        if attention_dropout > 0:
            dropped = torch.empty_like(weights, dtype=torch.bool).bernoulli_(attention_dropout)
            weights = torch.where(dropped, -weights, weights)
        gathered = _gather(weights, values, affine, attention_dropout)
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
        gathered = _gather(weights, values, affine, attention_dropout)
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


def _gather(weights: Tensor, values: Tensor, affine: Tensor, attention_dropout: float) -> Tensor:
    """The attention's output (B, N, D): the kept weights times the values, plus the output bias."""
    return torch.bmm(_kept(weights, attention_dropout).mT, values).to(affine.dtype).add_(affine[2])


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
