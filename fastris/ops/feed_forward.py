"""The decoder's feed-forward sub-layer, keeping a third of what the published formula keeps for the backward pass.

Behind the first product come ReLU, dropout, a LayerNorm of the hidden width and the second product. With
``r = drop(ReLU(h))`` kept, nothing else of that width is needed: r > 0 says where ReLU and dropout let the gradient
through, and the normalised r is a pointwise function of r that the backward pass computes again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastris import reference
from fastris.dispatch import requested_impl
from fastris.ops.checks import compute_dtype
from fastris.ops.cpu.dropout_bits import dropout as drop
from fastris.reference import FeedForwardWeights


def feed_forward(
    x: Tensor,
    weights: FeedForwardWeights,
    *,
    dropout: float = 0.0,
    inner_dropout: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """``x + drop(W2 LN(drop(ReLU(W1 LN(x)))))`` for ``x`` (..., D), any leading shape.

    ``weights`` is :class:`fastris.reference.FeedForwardWeights`; ``inner_dropout`` acts behind the ReLU and ``dropout``
    on the branch, both only when ``training``. ``impl="reference"`` runs :func:`fastris.reference.feed_forward`, and so
    does every path under ``torch.compile``, which decides by itself what to keep. Every other choice runs the path
    here, on any device and dtype; it can be differentiated once. Returns (..., D).

    Source: CRIS section 3.3; ``ffn`` of the published ``TransformerDecoderLayer``.
    """
    if not training:
        dropout = inner_dropout = 0.0
    if requested_impl(impl) == "reference" or torch.compiler.is_compiling():
        options = {"dropout": dropout, "inner_dropout": inner_dropout, "eps": eps}
        return reference.feed_forward(x, weights, training=training, **options)
    dtype = compute_dtype(x)
    normed = F.layer_norm(x, (x.shape[-1],), weights.norm_weight, weights.norm_bias, eps).to(dtype)
    up, inner, down = (
        (weights.up_weight.to(dtype), weights.up_bias.to(dtype)),
        (weights.inner_norm_weight, weights.inner_norm_bias),
        (weights.down_weight.to(dtype), weights.down_bias.to(dtype)),
    )
    with torch.autocast(x.device.type, enabled=False):
        branch = _FeedForward.apply(normed, *up, *inner, *down, inner_dropout, eps)
    return x + drop(branch, dropout, training)


class _FeedForward(torch.autograd.Function):
    """``linear(LN(drop(relu(linear(x)))))``; the norm runs in float32 at least, as it does under autocast."""

    @staticmethod
    def forward(ctx, x, up_weight, up_bias, norm_weight, norm_bias, weight, bias, dropout: float, eps: float) -> Tensor:
        rectified = drop(F.linear(x, up_weight, up_bias).relu_(), dropout, True)
        normed, _, _ = _norm(rectified, norm_weight, norm_bias, eps)
        ctx.save_for_backward(x, rectified, up_weight, norm_weight, norm_bias, weight)
        ctx.eps = eps
        ctx.keep_scale = 1 / (1 - dropout) if dropout < 1 else 0.0
        return F.linear(normed, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        x, rectified, up_weight, norm_weight, norm_bias, weight = ctx.saved_tensors
        normed, mean, rstd = _norm(rectified, norm_weight, norm_bias, ctx.eps)
        rows = upstream.flatten(0, -2)
        d_weight = rows.T @ normed.flatten(0, -2)
        d_normed = (upstream @ weight).to(norm_weight.dtype)
        shape, wanted = (normed.shape[-1],), (True, True, True)
        d_rectified, d_norm_weight, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
            d_normed, rectified.to(norm_weight.dtype), shape, mean, rstd, norm_weight, norm_bias, wanted
        )
        if ctx.keep_scale != 1:
            d_rectified = d_rectified.mul_(ctx.keep_scale)
        d_hidden = d_rectified.to(rectified.dtype)
        torch.ops.aten.threshold_backward.grad_input(d_hidden, rectified, 0, grad_input=d_hidden)
        hidden_rows = d_hidden.flatten(0, -2)
        need_x, need_up_weight, *_ = ctx.needs_input_grad  # a frozen layer needs neither product
        d_up_weight = hidden_rows.T @ x.flatten(0, -2) if need_up_weight else None
        return (
            d_hidden @ up_weight if need_x else None,
            d_up_weight,
            hidden_rows.sum(0),
            d_norm_weight,
            d_norm_bias,
            d_weight,
            rows.sum(0),
            None,
            None,
        )


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm, computed in its parameters' dtype and returned in x's, with every row's mean and 1/deviation."""
    normed, mean, rstd = torch.ops.aten.native_layer_norm(x.to(weight.dtype), (x.shape[-1],), weight, bias, eps)
    return normed.to(x.dtype), mean, rstd
