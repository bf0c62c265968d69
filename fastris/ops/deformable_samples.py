"""Bilinear samples of several maps, weighted and summed, in plain PyTorch: sums of a few rows of a table.

:mod:`fastris.ops.multiscale_deformable_attention` says what is sampled. The maps are a table of D-wide rows, one per
pixel. A sample is a weighted sum of four of them, so what a query gets is a weighted sum of 4 S P rows, and that is
what ``F.embedding_bag`` computes: no sample is ever stored. The backward pass finds the samples again from offsets and
logits. It sorts them by the first of their four rows; the gradient of a row is then a sum over a run of sorted samples,
and every sum has a fixed order: two runs give the same bits.

Round each map lie two rows and columns of zeros. A sample outside a map is moved among them, where all its four rows
are zeros, so that it needs no case of its own.

Shapes: B batch, H heads of width D, Q queries, S levels, P points, N = B H Q S P samples, R rows of one head's table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BORDER = 2
"""Rows and columns of zeros on each side of a map."""

CHUNK = 2**21
"""At most so many samples are worked on at once on a CPU, or one head's: a bound for what is there beside inputs."""

Sizes = tuple[tuple[int, int], ...]


def sampled_sum(value: Tensor, reference_points: Tensor, offsets: Tensor, logits: Tensor, sizes: Sizes) -> Tensor:
    """The sum over samples j of ``softmax(logits)_j * value(place_j)``: (B, Q, H, D) in value's dtype.

    ``value`` (B, M, H, D), ``reference_points`` (Q, 2), ``offsets`` (B, Q, H, S, P, 2), ``logits`` (B, Q, H, S P), each
    in a dtype of its own; computed in float32, or in float64 for a float64 value. ``sizes``: levels' height and width.
    """
    return _SampledSum.apply(value, reference_points, offsets, logits, sizes)


class _SampledSum(torch.autograd.Function):
    """Keeps its inputs for the backward pass, and nothing else."""

    @staticmethod
    def forward(ctx, value, reference_points, offsets, logits, sizes):
        ctx.save_for_backward(value, reference_points, offsets, logits)
        ctx.sizes = sizes
        origins = _origins(reference_points, sizes, value)
        output = value.new_empty(*logits.shape[:3], value.shape[-1])
        for chunk in _chunks(logits):
            table = _table(chunk.of(value), sizes, origins.dtype)
            chunk.of(output).copy_(_summed(table, _find(origins, chunk.of(offsets), chunk.of(logits), sizes)))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *sampled_gradients(upstream, *ctx.saved_tensors, ctx.sizes, ctx.needs_input_grad[:4]), None


def sampled_gradients(
    upstream: Tensor,
    value: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    sizes: Sizes,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`sampled_sum`'s four tensors where they are needed, from that of its sums (B, Q, H, D)."""
    need_value, *need_others = needs
    origins = _origins(reference_points, sizes, value)
    d_value, d_offsets, d_logits = (
        torch.empty_like(each, memory_format=torch.contiguous_format) for each in (value, offsets, logits)
    )
    d_origins = torch.zeros_like(origins)
    for chunk in _chunks(logits):
        samples = _find(origins, chunk.of(offsets), chunk.of(logits), sizes)
        gradient = chunk.of(upstream).to(origins.dtype, memory_format=torch.contiguous_format)
        if need_value:
            chunk.of(d_value).copy_(_value_gradient(gradient, samples, sizes))
        if any(need_others):
            table = _table(chunk.of(value), sizes, origins.dtype)
            d_places, d_scores = _sample_gradients(gradient, table, samples)
            chunk.of(d_offsets).copy_(d_places.movedim(0, -1))
            chunk.of(d_logits).copy_(d_scores.flatten(-2))
            if need_others[0]:
                d_origins += d_places.sum((1, 2, 5)).movedim(0, -1)
    d_points = (d_origins * _scale(sizes, origins)).sum(1).to(reference_points.dtype)
    found = zip((d_value, d_points, d_offsets, d_logits), needs, strict=True)
    return tuple(gradient if needed else None for gradient, needed in found)


def _scale(sizes: Sizes, like: Tensor) -> Tensor:
    """(S, 2): pixels of each level in x and in y."""
    return like.new_tensor([(width, height) for height, width in sizes])


def _origins(reference_points: Tensor, sizes: Sizes, value: Tensor) -> Tensor:
    """(Q, S, 2): each query's own x and y in pixels of each level, whole numbers at the centres of pixels."""
    points = reference_points.to(torch.promote_types(value.dtype, torch.float32))
    return points[:, None] * _scale(sizes, points) - 0.5


class _Chunk(NamedTuple):
    """Some heads of some samples of the batch."""

    batch: slice
    heads: slice

    def of(self, tensor: Tensor) -> Tensor:
        """Its part of a tensor (B, Q or M, H, ...), heads before queries: (b, h, Q or M, ...)."""
        return tensor[self.batch, :, self.heads].transpose(1, 2)


def _chunks(logits: Tensor) -> Iterator[_Chunk]:
    """Parts of few samples on a CPU; on other devices, and to ``torch.compile``, there is one."""
    batch, queries, heads, samples = logits.shape
    many = max(queries * samples, 1)
    rows, columns = batch, heads
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        rows, columns = max(1, CHUNK // (many * heads)), min(heads, max(1, CHUNK // many))
    for row in range(0, batch, max(rows, 1)):
        for column in range(0, heads, columns):
            yield _Chunk(slice(row, row + rows), slice(column, column + columns))


class _Samples(NamedTuple):
    """Where samples lie, each tensor of shape (b, h, Q, S, P).

    ``above`` and ``below`` are rows of the table: a sample's upper left pixel and the one under it; their neighbours to
    the right come next in the table. ``right`` and ``down`` say how far the sample lies from the first towards the
    others, from 0 to 1; ``weight`` is its share in the sum.
    """

    above: Tensor
    below: Tensor
    right: Tensor
    down: Tensor
    weight: Tensor

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the four rows, in the order above, above's right, below, below's right."""
        lower = self.weight * self.down
        upper = self.weight - lower
        lower_right, upper_right = lower * self.right, upper * self.right
        return upper - upper_right, upper_right, lower - lower_right, lower_right


def _bordered(sizes: Sizes) -> list[tuple[int, int]]:
    return [(height + 2 * BORDER, width + 2 * BORDER) for height, width in sizes]


def _table(value: Tensor, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """Rows (b h R, D) of the maps (b, h, M, D) with their borders, in ``dtype``."""
    areas = [height * width for height, width in _bordered(sizes)]
    table = value.new_zeros(*value.shape[:2], sum(areas), value.shape[-1], dtype=dtype)
    maps = value.split([height * width for height, width in sizes], dim=2)
    for level, (bordered, pixels) in enumerate(zip(table.split(areas, dim=2), maps, strict=True)):
        _inner(bordered, sizes[level]).copy_(pixels.unflatten(2, sizes[level]))
    return table.flatten(0, 2)


def _inner(bordered: Tensor, size: tuple[int, int]) -> Tensor:
    """The map (b, h, height, width, D) inside its border, a view of rows (b, h, R', D)."""
    whole = bordered.unflatten(2, _bordered((size,))[0])
    return whole[:, :, BORDER:-BORDER, BORDER:-BORDER]


def _find(origins: Tensor, offsets: Tensor, logits: Tensor, sizes: Sizes) -> _Samples:
    """The samples at origins (Q, S, 2) plus offsets (b, h, Q, S, P, 2), weighted by logits (b, h, Q, S P)."""
    batch, heads, _, levels, points, _ = offsets.shape
    weight = _softmax(logits.to(origins.dtype).contiguous()).unflatten(-1, (levels, points))
    place = offsets.movedim(-1, 0).to(origins.dtype, memory_format=torch.contiguous_format, copy=True)
    place += _each_point(origins.movedim(-1, 0)[:, None, None], points)
    corner = place.floor()
    right, down = place.sub_(corner)  # NaN where the place is infinite
    last = _each_point(_scale(sizes, origins).T.view(2, 1, 1, 1, levels), points)
    corner = corner.nan_to_num_(nan=-BORDER).clamp_(torch.full_like(last, -BORDER), last).to(torch.int32)
    shapes = _bordered(sizes)
    areas = [height * width for height, width in shapes]
    starts = [sum(areas[:level]) + BORDER * width + BORDER for level, (_, width) in enumerate(shapes)]
    widths, firsts = _each_point(corner.new_tensor([[width for _, width in shapes], starts]), points)
    group = torch.arange(batch * heads, dtype=torch.int32, device=corner.device) * sum(areas)
    firsts = firsts + group.view(batch, heads, 1, 1, 1)
    above = corner[0].add_(firsts).addcmul_(corner[1], widths)
    return _Samples(above, above + widths, right, down, weight)


def _softmax(logits: Tensor) -> Tensor:
    """Over the last axis; PyTorch's own is slow on a CPU for rows as short as these."""
    shares = (logits - logits.amax(-1, keepdim=True)).exp_()
    return shares.div_(shares.sum(-1, keepdim=True))


def _each_point(level: Tensor, points: int) -> Tensor:
    """(..., S) to (..., S, P), in memory: adding a number that is repeated along short rows is slow on a CPU."""
    return level[..., None].expand(*level.shape, points).contiguous()


def _summed(table: Tensor, samples: _Samples) -> Tensor:
    """(b, h, Q, D) of a table (b h R, D)."""
    batch, heads, queries, levels, points = samples.weight.shape
    total: Tensor | None = None
    rows = (samples.above, table), (samples.above, table[1:]), (samples.below, table), (samples.below, table[1:])
    for (index, source), share in zip(rows, samples.coefficients(), strict=True):
        each = F.embedding_bag(
            index.view(-1, levels * points), source, per_sample_weights=share.view(-1, levels * points), mode="sum"
        )
        total = each if total is None else total.add_(each)
    assert total is not None
    return total.view(batch, heads, queries, -1)


def _sample_gradients(gradient: Tensor, table: Tensor, samples: _Samples) -> tuple[Tensor, Tensor]:
    """Gradients of places (2, b, h, Q, S, P), x before y, and of logits, from those of the sums (b, h, Q, D)."""
    shape = samples.weight.shape
    count = shape[-2] * shape[-1]
    gradient = gradient.flatten(0, 2)
    bag = torch.arange(len(gradient), dtype=torch.int32, device=table.device)
    bags, starts = bag[:, None].expand(-1, count).flatten(), bag * count

    def products(index: Tensor, source: Tensor) -> Tensor:
        """Each sample's row times the gradient of its sum."""
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
        return dots(gradient, source, index.flatten(), starts, bags, 0).view(shape)

    upper = products(samples.above, table)
    upper_right = products(samples.above, table[1:]).sub_(upper)
    lower = products(samples.below, table)
    lower_right = products(samples.below, table[1:]).sub_(lower)
    d_right = torch.lerp(upper_right, lower_right, samples.down)
    upper = upper.addcmul_(upper_right, samples.right)
    lower = lower.addcmul_(lower_right, samples.right).sub_(upper)  # now the slope downwards
    d_weight = upper.addcmul_(lower, samples.down)
    d_scores = d_weight.mul_(samples.weight)
    d_scores = d_scores.addcmul(samples.weight, d_scores.sum((-1, -2), keepdim=True), value=-1)
    return torch.stack([d_right.mul_(samples.weight), lower.mul_(samples.weight)]), d_scores


def _value_gradient(gradient: Tensor, samples: _Samples, sizes: Sizes) -> Tensor:
    """The gradient of the maps (b, h, M, D) from that of the sums (b, h, Q, D)."""
    batch, heads, _, levels, points = samples.weight.shape
    areas = [height * width for height, width in _bordered(sizes)]
    rows, order = samples.above.flatten().sort(stable=True)
    table_rows = torch.arange(batch * heads * sum(areas), dtype=torch.int32, device=rows.device)
    starts = torch.searchsorted(rows, table_rows, out_int32=True)
    bags = torch.div(order, levels * points, rounding_mode="floor").to(torch.int32)
    gradient = gradient.flatten(0, 2)
    upper, upper_right, lower, lower_right = (
        F.embedding_bag(bags, gradient, starts, per_sample_weights=share.flatten().index_select(0, order), mode="sum")
        for share in samples.coefficients()
    )
    upper[1:] += upper_right[:-1]
    lower[1:] += lower_right[:-1]
    upper, lower = (each.view(batch, heads, sum(areas), -1) for each in (upper, lower))
    maps = []
    for size, above, below in zip(sizes, upper.split(areas, dim=2), lower.split(areas, dim=2), strict=True):
        width = size[1] + 2 * BORDER
        above[:, :, width:] += below[:, :, :-width]
        maps.append(_inner(above, size).flatten(2, 3))
    return torch.cat(maps, dim=2)
