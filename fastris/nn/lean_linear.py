"""Linear layers behind a LayerNorm or a GELU that keep one tensor for the backward pass where autograd keeps two.

What a norm or a GELU makes is a pointwise function of its input, so the backward pass computes it again: of
``linear(LN(x))`` only x is kept, and of ``linear(gelu(h))`` only h. No product is computed twice. On the reference path
and under ``torch.compile``, which decides by itself what to keep, the modules run as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastris.dispatch import requested_impl
from fastris.ops.checks import compute_dtype
from fastris.runtime import cpu_products


def runs_as_published() -> bool:
    """Whether blocks run their published code: on the reference path, and while compiling."""
    return requested_impl() == "reference" or torch.compiler.is_compiling()


def normed_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """``(norm(x), linear(norm(x)))`` for ``x`` (..., D); x is kept. The norm runs in its parameters' dtype or wider.

    Both results have gradients, and one that nobody reads costs nothing. They can be differentiated once.
    """
    if runs_as_published():
        normed = norm(x)
        return normed, linear(normed)
    weight, bias = _cast(x, linear.weight, linear.bias)
    with torch.autocast(x.device.type, enabled=False):
        return _NormedLinear.apply(x, norm.weight, norm.bias, norm.eps, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(x)`` for ``x`` (..., D), by the products of :mod:`fastris.runtime.cpu_products` where those are others.

    It can be differentiated once there.
    """
    if runs_as_published() or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    weight, bias = _cast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return _Linear.apply(x.to(weight.dtype), weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` that runs :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., D')."""
        return linear(input, self.weight, self.bias)


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(gelu(hidden))`` for ``hidden`` (..., D), which is kept; exact GELU. It can be differentiated once."""
    if runs_as_published():
        return F.linear(F.gelu(hidden), weight, bias)
    weight, bias = _cast(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        return _GeluLinear.apply(hidden, weight, bias)


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A layer's parameters in the dtype that it computes in."""
    dtype = compute_dtype(x)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        normed, _, _ = layer_norm(x, norm_weight, norm_bias, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return normed, cpu_products.linear(normed.to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor | None, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        normed, *statistics = layer_norm(x, norm_weight, norm_bias, ctx.eps)
        need_x, *need_norm, _, need_weight, need_bias = ctx.needs_input_grad
        d_weight = d_bias = None
        if upstream is not None:
            d_normed, d_weight, d_bias = linear_gradients(
                upstream, normed, weight, (True, need_weight, need_bias), d_normed
            )
        if d_normed is None:
            return None, None, None, None, d_weight, d_bias
        d_x, d_norm_weight, d_norm_bias = layer_norm_gradients(
            d_normed, x, statistics, norm_weight, norm_bias, (need_x, *need_norm)
        )
        return d_x, d_norm_weight, d_norm_bias, None, d_weight, d_bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return cpu_products.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return linear_gradients(upstream, x, weight, ctx.needs_input_grad)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return cpu_products.linear(F.gelu(hidden).to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        activated, needs = F.gelu(hidden), ctx.needs_input_grad
        d_activated, d_weight, d_bias = linear_gradients(upstream, activated, weight, needs)
        d_hidden = None if d_activated is None else torch.ops.aten.gelu_backward(d_activated, hidden)
        return d_hidden, d_weight, d_bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm in its parameters' dtype, with every row's mean and 1/deviation."""
    return torch.ops.aten.native_layer_norm(x.to(weight.dtype), (x.shape[-1],), weight, bias, eps)


def layer_norm_gradients(
    upstream: Tensor, x: Tensor, statistics: Sequence[Tensor], weight: Tensor, bias: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the norm's input, in x's dtype, weight and bias, where they are needed."""
    found = torch.ops.aten.native_layer_norm_backward(
        upstream.contiguous(), x.to(weight.dtype), (x.shape[-1],), *statistics, weight, bias, needs
    )
    d_x, d_weight, d_bias = (each if need else None for each, need in zip(found, needs, strict=True))
    return None if d_x is None else d_x.to(x.dtype), d_weight, d_bias


def linear_gradients(
    upstream: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...], also: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients of ``linear(x)``'s input, in x's dtype, ``also`` added, weight and bias, where they are needed."""
    rows = upstream.flatten(0, -2)
    d_x = d_weight = d_bias = None
    if needs[0]:
        d_x = cpu_products.product(rows, weight).to(x.dtype).view(x.shape)
        if also is not None:
            d_x = d_x.add_(also)
    if needs[1]:
        d_weight = rows.T @ x.flatten(0, -2).to(weight.dtype)
    if needs[2]:
        d_bias = rows.sum(0)
    return d_x, d_weight, d_bias
