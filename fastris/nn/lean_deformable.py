"""A stack of deformable layers that keeps three tensors a layer for the backward pass, where the layers keep eleven.

A layer is ``a = y + read(y + positions, y)``, ``n = LN1(a)``, ``s = n + W2 relu(W1 n)``, and the next one's y is
``LN2(s)``. Kept are s, a and what the samples sum up to; that sum is the layer's expensive part and is not made again.
Everything else follows from the three by norms, which cost next to nothing, and by four products, which are made again
in the backward pass: value, offsets, logits and ``W1 n``, the last one four times as wide as the first two. They are
6.5 products of a pixel with weights DxD, where a step of a layer has 34.5.

A norm lies between two layers, and of its two sides s alone is kept: the second layer takes s and the norm, and finds
its own input again. Numbers and gradients are those of the layers one after the other, bit for bit on a CPU: the same
products, and sums in the order in which autograd adds them.

Shapes: B batch, D width, M pixels of all maps one behind the other (low to high resolution).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastris.dispatch import resolve
from fastris.nn.deformable import DeformableAttention, DeformableLayer
from fastris.nn.lean_linear import (
    Linear,
    layer_norm,
    layer_norm_gradients,
    linear_gradients,
    runs_as_published,
)
from fastris.nn.plain_modules import is_plainly
from fastris.ops.multiscale_deformable_attention import OPERATOR, gradients_of_sums, multiscale_deformable_attention
from fastris.runtime import cpu_products

Sizes = tuple[tuple[int, int], ...]
Gradients = tuple[Tensor | None, ...]


def lean_stack(
    layers: Sequence[DeformableLayer], y: Tensor, positions: Tensor, sizes: Sequence[tuple[int, int]], places: Tensor
) -> Tensor | None:
    """The layers one after the other: (B, M, D) to (B, M, D), or None where they have to be called.

    ``positions`` (M, D); ``places`` (M, 2) has no gradient. The result can be differentiated once.

    They have to be called where nothing is kept, on the reference path, under ``torch.compile`` and autocast, for an
    empty batch, and where a module is not what a layer was built of, hooks and dtypes included.
    """
    path = _path(layers, y, positions, places)
    if path is None:
        return None
    levels = tuple((int(height), int(width)) for height, width in sizes)
    before: Any = None
    for layer in layers:
        attention: Any = layer.self_attn
        shape = attention.heads, attention.levels, attention.points
        eps = None if before is None else before.eps, layer.norm1.eps
        weights = [weight for part in _parts(layer, before) for weight in part]
        y = _Layer.apply(_Plan(levels, shape, eps, path), y, positions, places, *weights)
        before = layer.norm2
    return before(y)


def _path(layers: Sequence[DeformableLayer], y: Tensor, positions: Tensor, places: Tensor) -> str | None:
    """The path of deformable attention, or None where the layers have to be called."""
    if runs_as_published() or not torch.is_grad_enabled():  # first: a traced batch's size must not be asked for
        return None
    if not (len(layers) and y.shape[0]):
        return None
    if torch.is_autocast_enabled(y.device.type) or places.requires_grad or not all(map(_is_as_built, layers)):
        return None
    weights = [weight for layer in layers for weight in layer.parameters()]
    if any(each.dtype != y.dtype for each in (positions, *weights)) or not y.is_floating_point():
        return None
    path = resolve(OPERATOR, y.device, y.dtype, batch=y.shape[0])
    return None if path == "reference" else path


def _is_as_built(layer: Any) -> bool:
    """Whether all of the layer is what :class:`DeformableLayer` made of it."""
    if not (is_plainly(DeformableLayer, layer) and is_plainly(DeformableAttention, layer.self_attn)):
        return False
    attention = layer.self_attn
    products = attention.value_proj, attention.sampling_offsets, attention.attention_weights, attention.output_proj
    norms = layer.norm1, layer.norm2
    kinds = [(Linear, each) for each in (*products, layer.linear1, layer.linear2)]
    if not all(is_plainly(kind, each) for kind, each in [*kinds, *((nn.LayerNorm, each) for each in norms)]):
        return False
    return all(isinstance(part[0], Tensor) and isinstance(part[1], Tensor) for part in _parts(layer, layer.norm2))


class _Parts(NamedTuple):
    """Weight and bias of the norm before a layer, of its products and of its norm, or what is said of each of them."""

    before: tuple[Any, Any]
    value: tuple[Any, Any]
    offsets: tuple[Any, Any]
    logits: tuple[Any, Any]
    output: tuple[Any, Any]
    norm: tuple[Any, Any]
    first: tuple[Any, Any]
    second: tuple[Any, Any]

    @classmethod
    def of(cls, flat: Sequence[Any]) -> _Parts:
        return cls(*zip(flat[::2], flat[1::2], strict=True))


def _parts(layer: Any, before: nn.LayerNorm | None) -> _Parts:
    attention = layer.self_attn
    modules = (
        attention.value_proj,
        attention.sampling_offsets,
        attention.attention_weights,
        attention.output_proj,
        layer.norm1,
        layer.linear1,
        layer.linear2,
    )
    first = (None, None) if before is None else (before.weight, before.bias)
    return _Parts(first, *((each.weight, each.bias) for each in modules))


class _Plan(NamedTuple):
    """What a layer's numbers depend on beside its tensors."""

    sizes: Sizes
    shape: tuple[int, int, int]  # heads, levels, points
    eps: tuple[float | None, float]  # of the norm before the layer, and of its first
    path: str

    def input_of(self, x: Tensor, parts: _Parts) -> tuple[Tensor, ...]:
        """The layer's y from what was before the norm, with the norm's statistics; or x, where there is none."""
        eps = self.eps[0]
        return (x,) if eps is None else layer_norm(x, *parts.before, eps)

    def asked(self, y: Tensor, positions: Tensor, parts: _Parts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``y + positions``, value (B, M, H, D / H), offsets (B, M, H, S, P, 2) and logits (B, M, H, S P)."""
        heads, levels, points = self.shape
        query = y + positions
        value = _linear(y, parts.value).unflatten(2, (heads, -1))
        offsets = _linear(query, parts.offsets).unflatten(2, (heads, levels, points, 2))
        return query, value, offsets, _linear(query, parts.logits).unflatten(2, (heads, -1))


def _linear(x: Tensor, part: tuple[Any, Any]) -> Tensor:
    """A product in its own dtype: also where a backward pass that makes it again runs under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return cpu_products.linear(x, *part)


class _Layer(torch.autograd.Function):
    """A layer but for its second norm, behind the second norm of the layer before: s of that one to s of this one.

    The gradients of y and of the queries are added in the order of autograd, and under whatever autocast it runs.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, positions: Tensor, places: Tensor, *weights: Tensor | None) -> Tensor:
        parts = _Parts.of(weights)
        y = plan.input_of(x, parts)[0]
        _, value, offsets, logits = plan.asked(y, positions, parts)
        sums = multiscale_deformable_attention(value, plan.sizes, places, offsets, logits)
        attended = _linear(sums, parts.output).add_(y)
        ctx.save_for_backward(x, positions, places, sums, attended, *weights)
        ctx.plan = plan
        normed = layer_norm(attended, *parts.norm, plan.eps[1])[0]
        return _linear(_linear(normed, parts.first).relu_(), parts.second).add_(normed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        x, positions, places, sums, attended, *weights = ctx.saved_tensors
        _, need_x, need_positions, _, *rest = ctx.needs_input_grad
        parts, needs = _Parts.of(weights), _Parts.of(rest)
        need_y = need_x or any(needs.before)
        reads = need_y or need_positions or any(map(any, (needs.value, needs.offsets, needs.logits)))
        d_attended, *behind = _feed_forward_gradients(
            ctx.plan.eps[1], attended, parts, needs, reads or any(needs.output), upstream
        )
        if d_attended is None:
            return (None,) * 14 + (*behind,)
        d_sums, *d_output = linear_gradients(d_attended, sums, parts.output[0], (reads, *needs.output))
        if d_sums is None:
            return (None,) * 12 + (*d_output, *behind)
        y, *statistics = ctx.plan.input_of(x, parts)
        d_y, d_positions, *read = _reading_gradients(
            ctx.plan, y, positions, places, parts, needs, (need_y, need_positions), d_sums, d_attended
        )
        d_before: Sequence[Tensor | None] = (None, None)
        if d_y is not None and statistics:
            d_y, *d_before = layer_norm_gradients(d_y, x, statistics, *parts.before, (need_x, *needs.before))
        return None, d_y, d_positions, None, *d_before, *read, *d_output, *behind


def _feed_forward_gradients(
    eps: float, attended: Tensor, parts: _Parts, needs: _Parts, deeper: bool, upstream: Tensor
) -> Gradients:
    """Gradients of ``attended`` if ``deeper``, and of weight and bias of the norm and the two products behind it."""
    normed, *statistics = layer_norm(attended, *parts.norm, eps)
    hidden = _linear(normed, parts.first).relu_()
    trains_norm = deeper or any(needs.norm)
    need_hidden = trains_norm or any(needs.first)
    d_hidden, *d_second = linear_gradients(upstream, hidden, parts.second[0], (need_hidden, *needs.second))
    if d_hidden is None:
        return None, None, None, None, None, *d_second
    torch.ops.aten.threshold_backward.grad_input(d_hidden, hidden, 0, grad_input=d_hidden)
    del hidden
    d_normed, *d_first = linear_gradients(
        d_hidden, normed, parts.first[0], (trains_norm, *needs.first), upstream if trains_norm else None
    )
    d_norm: Gradients = (None, None, None)
    if d_normed is not None:
        d_norm = layer_norm_gradients(d_normed, attended, statistics, *parts.norm, (deeper, *needs.norm))
    return *d_norm, *d_first, *d_second


def _reading_gradients(
    plan: _Plan,
    y: Tensor,
    positions: Tensor,
    places: Tensor,
    parts: _Parts,
    needs: _Parts,
    inputs: tuple[bool, bool],
    upstream: Tensor,
    also: Tensor,
) -> Gradients:
    """Gradients of y, ``also`` added, and of positions, and of weight and bias of value, offsets and logits."""
    need_y, need_query = inputs[0], any(inputs)
    query, value, offsets, logits = plan.asked(y, positions, parts)
    wanted = need_y or any(needs.value), need_query or any(needs.offsets), need_query or any(needs.logits)
    found = gradients_of_sums(upstream, value, plan.sizes, places, offsets, logits, plan.path, wanted)
    d_value, d_offsets, d_logits = (None if each is None else each.flatten(2, -1) for each in found)
    del value, offsets, logits, found

    def through(gradient: Tensor | None, x: Tensor, part: Any, need: Any, need_input: bool) -> Gradients:
        if gradient is None:
            return None, None, None
        return linear_gradients(gradient, x, part[0], (need_input, *need))

    from_logits, *of_logits = through(d_logits, query, parts.logits, needs.logits, need_query)
    from_offsets, *of_offsets = through(d_offsets, query, parts.offsets, needs.offsets, need_query)
    from_value, *of_value = through(d_value, y, parts.value, needs.value, need_y)
    d_y = d_positions = None
    if from_logits is not None and from_offsets is not None:
        d_query = from_logits.add_(from_offsets)
        d_positions = d_query.sum(0) if inputs[1] else None
        d_y = None if from_value is None else from_value.add_(also).add_(d_query)
    return d_y, d_positions, *of_value, *of_offsets, *of_logits
