"""Swin's attention in windows, which keeps queries, keys and values alone for the backward pass.

Autograd keeps every window's attention weights, and of queries, keys and values two copies each. Here the backward pass
makes the weights again from q and k: half a percent more products in a Swin-B at 480x480.

Windows that reach over the map's border are filled up with zeros *before* queries, keys and values are made, so that a
padded pixel's are their bias. The products are therefore computed of the map's own pixels, and the bias is put where
padding is. On a CPU windows are taken in parts whose weights stay in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MASKED = -100.0
"""Added to the scores of pixels that only the shift has made neighbours, as published."""
CPU_PART_BYTES = 2**22
"""Attention weights of a part on a CPU."""


class Windows(NamedTuple):
    """How the N pixels of a batch of maps fall into W windows of A places.

    Attributes:
        source: (W, A) the pixel in each place, counted over all maps; any where padding is.
        padded: (W, A) True where padding is; None where it is nowhere.
        place: (N,) where among the W * A places each pixel is.
        region: (W, A) which side of the shift's seams a place is on; None without a shift.
    """

    source: Tensor
    padded: Tensor | None
    place: Tensor
    region: Tensor | None


def windows_of(batch: int, height: int, width: int, side: int, shift: int, device: torch.device) -> Windows:
    """The windows of ``side`` x ``side`` of maps padded at the right and bottom, then rolled back by ``shift``."""
    lengths = [length + -length % side for length in (height, width)]
    rows, columns = (torch.arange(length, device=device).roll(-shift).view(-1, side) for length in lengths)
    first = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1) * (height * width)
    row, column = rows[:, None, :, None], columns[:, None]  # of windows [down, across, down, across]
    outside = (row >= height) | (column >= width)
    source = (first + (row * width + column).masked_fill(outside, 0)).view(-1, side * side)
    padded = outside.expand(batch, *outside.shape).reshape(source.shape) if lengths != [height, width] else None
    pixels = batch * height * width
    place = torch.empty(pixels + 1, dtype=torch.long, device=device)
    target = source if padded is None else source.masked_fill(padded, pixels)  # padding writes behind the last
    place[target.flatten()] = torch.arange(source.numel(), device=device)
    return Windows(source, padded, place[:-1], _regions(batch, lengths, side, shift, device) if shift else None)


def _regions(batch: int, lengths: list[int], side: int, shift: int, device: torch.device) -> Tensor:
    """Seams are where the last window begins, and where what was rolled round begins."""
    down, across = (
        ((at >= len(at) - side).int() + (at >= len(at) - shift)).view(-1, side)
        for at in (torch.arange(length, device=device) for length in lengths)
    )
    regions = 3 * down[:, None, :, None] + across[:, None]
    return regions.expand(batch, *regions.shape).reshape(-1, side * side)


def window_attention(qkv: Tensor, fill: Tensor, table: Tensor, index: Tensor, heads: int, shift: int) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias) v`` in each window, ``bias = table[index]``: (B, H, W, D).

    ``qkv`` (B, H, W, 3 D) holds queries, keys and values, heads within each; ``fill`` (3 D,) is what they are where
    windows reach over the border; ``table`` (P, heads) has what is added for each relative position, and ``index``
    (A, A) which of these two of a square window's A places have. Softmax runs in the table's dtype. With a ``shift``
    the windows' grid begins that many pixels to the right and below, and goes round.
    """
    return _WindowAttention.apply(qkv, fill, table, index, heads, shift)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, fill: Tensor, table: Tensor, index: Tensor, heads: int, shift: int) -> Tensor:
        ctx.save_for_backward(qkv, fill, table, index)
        ctx.heads, ctx.shift = heads, shift
        bias = _bias(table, index)
        windows = _windows(qkv, bias, shift)
        pixels, (count, area) = qkv.flatten(0, 2), windows.source.shape
        read = qkv.new_empty(count, area, heads, pixels.shape[1] // 3 // heads)
        for part in _parts(count, bias):
            query, key, value = _gathered(pixels, fill, windows, part, heads)
            weights = _weights(query, key, bias, windows, part)
            read[part] = torch.bmm(weights.to(qkv.dtype), value).view(-1, heads, *value.shape[1:]).transpose(1, 2)
        return read.view(count * area, -1).index_select(0, windows.place).view(*qkv.shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        qkv, fill, table, index = ctx.saved_tensors
        bias = _bias(table, index)
        windows, heads = _windows(qkv, bias, ctx.shift), ctx.heads
        pixels, upstream, (count, area) = qkv.flatten(0, 2), upstream.flatten(0, 2), windows.source.shape
        width = upstream.shape[1] // heads
        silent = upstream.new_zeros(upstream.shape[1])
        d_rows = qkv.new_empty(count, area, 3, heads, width)
        d_bias = torch.zeros_like(bias)
        for part in _parts(count, bias):
            query, key, value = _gathered(pixels, fill, windows, part, heads)
            weights = _weights(query, key, bias, windows, part)
            d_read = _rows(upstream, silent, windows, part).view(-1, area, heads, width)
            d_read = d_read.transpose(1, 2).reshape(-1, area, width)
            d_value = torch.bmm(weights.to(qkv.dtype).mT, d_read)
            d_weights = torch.bmm(d_read, value.mT).to(bias.dtype)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, bias.dtype)
            d_bias += d_scores.view(-1, *bias.shape).sum(0)
            d_scores = d_scores.to(qkv.dtype).mul_(width**-0.5)
            found = torch.bmm(d_scores, key), torch.bmm(d_scores.mT, query), d_value
            for number, each in enumerate(found):
                d_rows[part, :, number] = each.view(-1, heads, area, width).transpose(1, 2)
        d_rows = d_rows.view(count * area, -1)
        d_fill = None
        if windows.padded is not None:
            d_fill = windows.padded.flatten().to(d_rows.dtype) @ d_rows
        d_qkv = d_rows.index_select(0, windows.place).view(qkv.shape)
        d_table = torch.zeros_like(table).index_put_((index,), d_bias.permute(1, 2, 0), accumulate=True)
        return d_qkv, d_fill, d_table, None, None, None


def _bias(table: Tensor, index: Tensor) -> Tensor:
    """What is added to the scores of a window, (heads, A, A)."""
    return table[index].permute(2, 0, 1).contiguous()


def _windows(qkv: Tensor, bias: Tensor, shift: int) -> Windows:
    batch, height, width = qkv.shape[:3]
    return windows_of(batch, height, width, round(bias.shape[-1] ** 0.5), shift, qkv.device)


def _parts(count: int, bias: Tensor) -> Iterator[slice]:
    """Windows that are worked on together: all of them, but on a CPU."""
    step = count if bias.device.type != "cpu" else max(1, CPU_PART_BYTES // bias.nbytes)
    return (slice(at, min(at + step, count)) for at in range(0, count, step))


def _rows(pixels: Tensor, fill: Tensor, windows: Windows, part: slice) -> Tensor:
    """``pixels`` (N, D) in each place of some windows, ``fill`` (D,) where padding is: (W * A, D)."""
    rows = pixels.index_select(0, windows.source[part].flatten())
    return rows if windows.padded is None else torch.where(windows.padded[part].reshape(-1, 1), fill, rows)


def _gathered(pixels: Tensor, fill: Tensor, windows: Windows, part: slice, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (W * heads, A, d) of some windows, of ``pixels`` (N, 3 D)."""
    rows = _rows(pixels, fill, windows, part)
    rows = rows.view(-1, windows.source.shape[1], 3, heads, rows.shape[1] // 3 // heads).permute(2, 0, 3, 1, 4)
    query, key, value = rows.reshape(3, -1, *rows.shape[3:])
    return query, key, value


def _weights(query: Tensor, key: Tensor, bias: Tensor, windows: Windows, part: slice) -> Tensor:
    """Attention weights (W * heads, A, A) in the bias's dtype."""
    if windows.region is None:
        added = bias.repeat(part.stop - part.start, 1, 1)
    else:
        region = windows.region[part]
        apart = (region[:, None, :, None] != region[:, None, None]).to(bias.dtype)
        added = torch.add(bias, apart, alpha=MASKED).flatten(0, 1)
    scale = query.shape[-1] ** -0.5
    if query.dtype == bias.dtype:
        return added.baddbmm_(query, key.mT, alpha=scale).softmax(-1)
    return added.add_(torch.bmm(query * scale, key.mT)).softmax(-1)
