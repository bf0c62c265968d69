"""Attention with dropout on a CPU, where ``scaled_dot_product_attention`` has no fused path for it.

With dropout, PyTorch's CPU kernel falls back to N x N maps of all heads and samples at once. Here one head of one
sample is computed at a time, so that its map stays in the cache, and nothing of size N x N is kept: the backward pass
computes the map again and draws the same mask again from the same seed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastris.ops.cpu.dropout_bits import draw_seed, dropped


def attention_with_dropout(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """``dropout(softmax(q k^T / sqrt(d))) v`` for (B, heads, N, d) tensors on a CPU: (B, heads, N, d).

    Every weight is kept with probability ``1 - dropout``, independently, and scaled by its inverse: the distribution of
    ``F.dropout``. ``torch.manual_seed`` makes it repeat.
    """
    return _DropoutAttention.apply(query, key, value, dropout, draw_seed())


def dropout_mask(batch: int, heads: int, rows: int, columns: int, dropout: float, seed: int) -> Tensor:
    """The mask (B, heads, rows, columns) of kept weights that ``seed`` stands for, True where kept."""
    bits = np.random.SFC64(seed)
    masks = [~dropped((rows, columns), dropout, bits) for _ in range(batch * heads)]
    return torch.stack(masks).reshape(batch, heads, rows, columns)


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, dropout: float, seed: int) -> Tensor:
        output = torch.empty(query.shape, dtype=query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        scale = 1 / math.sqrt(query.shape[-1])
        bits = np.random.SFC64(seed)
        for sample in range(query.shape[0]):
            for head in range(query.shape[1]):
                at = (sample, head)
                weights = _softmax(query[at], key[at], scale)
                weights.masked_fill_(dropped((query.shape[2], key.shape[2]), dropout, bits), 0)
                output[at] = (weights.to(value.dtype) @ value[at]) / (1 - dropout)
        ctx.save_for_backward(query, key, value)
        ctx.dropout, ctx.seed, ctx.scale = dropout, seed, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        query, key, value = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
        bits = np.random.SFC64(ctx.seed)
        for sample in range(query.shape[0]):
            for head in range(query.shape[1]):
                at = (sample, head)
                weights = _softmax(query[at], key[at], ctx.scale)
                gone = dropped((query.shape[2], key.shape[2]), ctx.dropout, bits)
                scaled = upstream[at] / (1 - ctx.dropout)
                d_weights = (scaled @ value[at].T).to(weights.dtype).masked_fill_(gone, 0)
                d_value[at] = weights.masked_fill(gone, 0).to(value.dtype).T @ scaled
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                d_scores = d_scores.mul_(ctx.scale).to(query.dtype)
                d_query[at] = d_scores @ key[at]
                d_key[at] = d_scores.T @ query[at]
        return d_query, d_key, d_value, None, None


def _softmax(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The attention map of one head (N, N), in float32 at least."""
    scores = query @ key.T
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    return torch.softmax(scores.mul_(scale), dim=-1)
