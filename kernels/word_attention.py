"""Attention of many pixels to few absorbed words in one kernel a pass: ``sum_h softmax(q K_h^T + b_h) V_h + bo``.

q (B, N, D); the absorbed words K, V (B, heads, L, D) and b (B, heads, L), float32 and -inf at padding, as
:mod:`fastris.ops.word_attention` derives them; bo (D,) float32. L is no constant: another length up to the tile's 16 or
32 words compiles nothing.

* answer: BLOCK_N pixels go through the heads; scores and weights stay in registers.
* gradients: the scores again, dP = g V^T, the softmax's slope dS and dq = dS K. P and dS (B, N, heads * L) are written.

dV = P^T g and dK = dS^T q are left to ``torch.bmm``. Kept for the backward pass is q alone, and what belongs to words:
the plain path keeps P beside it. Nothing is added by atomics, so every run gives the same bits.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .common import dot_precision
from .configs import Config, choose, device_class
from .cross_attention_tiles import as_rows, load_tile, row_block, softmax_by_head, store_tile
from .launch import launch

MAX_DIM = 256
"""Width of the pixels whose answer a tile holds."""
MAX_WORDS = 32

SIZES = ("rows", "words")
_SINGLE = Config((("BLOCK_N", 16), ("BLOCK_D", 32)), 4, 1)
_MORE_ROWS = Config((("BLOCK_N", 32), ("BLOCK_D", 32)), 8, 1)
_FEW_WARPS = replace(_MORE_ROWS, num_warps=4)
_HALF = Config((("BLOCK_N", 64), ("BLOCK_D", 64)), 8, 2, (Config((("BLOCK_N", 32), ("BLOCK_D", 64)), 4, 2),))
_FEWER_ROWS = Config((("BLOCK_N", 32), ("BLOCK_D", 64)), 8, 2, (Config((("BLOCK_N", 16), ("BLOCK_D", 64)), 8, 2),))
_TINY = {("tiny", 2): _MORE_ROWS, ("tiny", 4): replace(_SINGLE, num_warps=8)}
# (shared-memory class, bytes per element of the products' dtype) -> launch.
# In float32 the narrow answer of 16 rows spilled on sm_80 by 4 warps and on sm_100 by 8; the gradients by 4 on sm_86.
ANSWER = {("large", 2): _HALF, ("small", 2): _HALF, ("large", 4): _FEW_WARPS, ("small", 4): _SINGLE, **_TINY}
GRADIENTS = {("large", 2): _FEWER_ROWS, ("small", 2): _FEWER_ROWS, ("large", 4): _SINGLE, ("small", 4): _MORE_ROWS}
GRADIENTS |= _TINY
WIDE_ANSWER = replace(_SINGLE, num_warps=8)
"""In float32, of more than 128 channels."""


def fits(words: int, dim: int) -> bool:
    """Whether the kernels take so many words and pixels of this width."""
    return words <= MAX_WORDS and dim <= MAX_DIM


@triton.jit
def _products(
    pixel_rows, present, words_ptr, word, real,
    DIM: tl.constexpr, PRECISION: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of every pixel's row with every word's: [BLOCK_N, WORDS] in float32."""
    total = tl.zeros((BLOCK_N, WORDS), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        pixels = load_tile(pixel_rows, present, channel, DIM)
        mask = real[None, :] & (channel < DIM)[:, None]
        words = tl.load(words_ptr + word[None, :] * DIM + channel[:, None], mask=mask, other=0.0)
        total = tl.dot(pixels.to(words.dtype), words, total, input_precision=PRECISION)
    return total


@triton.jit
def _weights(
    query_rows, present, keys_ptr, key_bias_ptr, word, real,
    DIM: tl.constexpr, PRECISION: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention weights [BLOCK_N, WORDS] of one head."""
    scores = _products(query_rows, present, keys_ptr, word, real, DIM, PRECISION, WORDS, BLOCK_N, BLOCK_D)
    scores += tl.load(key_bias_ptr + word, mask=real, other=float("-inf"))[None, :]
    return softmax_by_head(scores, 1, WORDS, BLOCK_N)


@triton.jit
def _mixed(total, weights, words_ptr, word, real, channel, DIM: tl.constexpr, PRECISION: tl.constexpr):
    """``total`` [BLOCK_N, channels] with the words' rows added, as the weights [BLOCK_N, WORDS] say."""
    mask = real[:, None] & (channel < DIM)[None, :]
    words = tl.load(words_ptr + word[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
    return tl.dot(weights.to(words.dtype), words, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def _answer_kernel(
    answer_ptr,  # [B, N, D]
    query_ptr,
    keys_ptr,  # [B, heads * L, D]
    key_bias_ptr,  # [B, heads * L] float32
    values_ptr,  # [B, heads * L, D]
    bias_ptr,  # [D] float32
    stride_b,
    stride_n,
    rows,
    words,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample, row, present = row_block(rows, BLOCK_N)
    channel = tl.arange(0, WIDTH)
    of_sample = sample * HEADS * words
    keys_ptr += of_sample * DIM
    values_ptr += of_sample * DIM
    query_rows = query_ptr + sample * stride_b + row * stride_n
    bias = tl.load(bias_ptr + channel, mask=channel < DIM, other=0.0)
    total = tl.zeros((BLOCK_N, WIDTH), tl.float32) + bias[None, :]
    for head in range(HEADS):
        word, real = head * words + tl.arange(0, WORDS), tl.arange(0, WORDS) < words
        weights = _weights(
            query_rows, present, keys_ptr, key_bias_ptr + of_sample, word, real,
            DIM, PRECISION, WORDS, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        total = _mixed(total, weights, values_ptr, word, real, channel, DIM, PRECISION)
    store_tile(answer_ptr + (sample * rows + row) * DIM, total, present, channel, DIM)


@triton.jit(do_not_specialize=SIZES)
def _gradients_kernel(
    d_query_ptr,  # [B, N, D]
    weights_ptr,  # [B, N, heads * L]
    d_scores_ptr,  # [B, N, heads * L]
    upstream_ptr,
    query_ptr,
    keys_ptr,  # [B, heads * L, D]
    key_bias_ptr,  # [B, heads * L] float32
    values_ptr,  # [B, heads * L, D]
    stride_gb,
    stride_gn,
    stride_b,
    stride_n,
    rows,
    words,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample, row, present = row_block(rows, BLOCK_N)
    channel = tl.arange(0, WIDTH)
    of_sample = sample * HEADS * words
    keys_ptr += of_sample * DIM
    values_ptr += of_sample * DIM
    query_rows = query_ptr + sample * stride_b + row * stride_n
    upstream_rows = upstream_ptr + sample * stride_gb + row * stride_gn
    columns = (sample * rows + row) * HEADS * words
    d_query = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for head in range(HEADS):
        word, real = head * words + tl.arange(0, WORDS), tl.arange(0, WORDS) < words
        weights = _weights(
            query_rows, present, keys_ptr, key_bias_ptr + of_sample, word, real,
            DIM, PRECISION, WORDS, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        d_weights = _products(upstream_rows, present, values_ptr, word, real, DIM, PRECISION, WORDS, BLOCK_N, BLOCK_D)
        product = weights * d_weights
        d_scores = product - weights * tl.sum(product, axis=1)[:, None]
        mask = present[:, None] & real[None, :]
        tl.store(weights_ptr + columns[:, None] + word[None, :], weights, mask=mask)
        tl.store(d_scores_ptr + columns[:, None] + word[None, :], d_scores, mask=mask)
        d_query = _mixed(d_query, d_scores, keys_ptr, word, real, channel, DIM, PRECISION)
    store_tile(d_query_ptr + (sample * rows + row) * DIM, d_query, present, channel, DIM)


def _config(table: dict[tuple[str, int], Config], keys: Tensor, width: int) -> Config:
    kind = device_class(keys.device), keys.dtype.itemsize
    return WIDE_ANSWER if table is ANSWER and kind[1] == 4 and width > 128 else table[kind]


def _launch(
    kernel, table: dict[tuple[str, int], Config], rows: int, *tensors: Tensor, keys: Tensor, strides: tuple
) -> None:
    """``kernel`` over ``rows`` pixels a sample of the absorbed ``keys``' words."""
    batch, heads, words, dim = keys.shape
    width = max(16, triton.next_power_of_2(dim))
    tile = 16 if words <= 16 else 32
    config = _config(table, keys, width)
    config = choose(kernel, config, keys.device, keys.dtype, batch * rows, f"W{tile}D{width}")
    launch(
        kernel, (batch * triton.cdiv(rows, config["BLOCK_N"]),), *tensors, *strides, rows, words,
        DIM=dim, HEADS=heads, WORDS=tile, WIDTH=width, PRECISION=dot_precision(keys.dtype), config=config,
    )  # fmt: skip


@torch.library.custom_op("fastris::word_attention", mutates_args=())
def _answer(query: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """(B, N, D) in query's dtype."""
    query = as_rows(query)
    answer = query.new_empty(query.shape)
    if answer.numel():
        tensors = answer, query, keys, key_bias, values, bias
        _launch(_answer_kernel, ANSWER, query.shape[1], *tensors, keys=keys, strides=query.stride()[:2])
    return answer


@_answer.register_fake
def _(query: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("fastris::word_attention_gradients", mutates_args=())
def gradients(
    upstream: Tensor, query: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, N, D), the attention weights P and the scores' gradient dS, both (B, N, heads * L), in query's dtype."""
    upstream, query = as_rows(upstream), as_rows(query)
    d_query = query.new_empty(query.shape)
    weights = keys.new_empty(*query.shape[:2], keys.shape[1] * keys.shape[2])
    d_scores = torch.empty_like(weights)
    if d_query.numel():
        tensors = d_query, weights, d_scores, upstream, query, keys, key_bias, values
        strides = *upstream.stride()[:2], *query.stride()[:2]
        _launch(_gradients_kernel, GRADIENTS, query.shape[1], *tensors, keys=keys, strides=strides)
    return d_query, weights, d_scores


@gradients.register_fake
def _(upstream: Tensor, query: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor):
    weights = keys.new_empty(*query.shape[:2], keys.shape[1] * keys.shape[2])
    return query.new_empty(query.shape), weights, torch.empty_like(weights)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx, upstream: Tensor):
    query, keys, key_bias, values = ctx.saved_tensors
    need_query, need_keys, need_key_bias, need_values, need_bias = ctx.needs_input_grad
    with torch.autocast(query.device.type, enabled=False):
        d_query, weights, d_scores = gradients(upstream, query, keys, key_bias, values)
        d_keys = torch.bmm(d_scores.mT, query).view_as(keys) if need_keys else None
        d_key_bias = d_scores.sum(1, dtype=key_bias.dtype).view_as(key_bias) if need_key_bias else None
        d_values = torch.bmm(weights.mT, upstream).view_as(values) if need_values else None
        d_bias = upstream.sum((0, 1), dtype=key_bias.dtype) if need_bias else None
    return d_query if need_query else None, d_keys, d_key_bias, d_values, d_bias


_answer.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastris.word_attention)
def _(query, keys, *_, out_shape=None, **__) -> int:
    return 4 * math.prod(query) * keys[1] * keys[2]


@register_flop_formula(torch.ops.fastris.word_attention_gradients)
def _(upstream, query, keys, *_, out_shape=None, **__) -> int:
    return 6 * math.prod(query) * keys[1] * keys[2]  # the scores again, and what the two bmm leave


def fused_word_attention(query: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """The answer (B, N, D) in query's dtype, that of keys and values (B, heads, L, D), L <= 32 and D <= 256.

    ``key_bias`` (B, heads, L) and ``bias`` (D,) in float32. A sample whose words are all at -inf is given ``bias``.
    """
    return _answer(query, keys.contiguous(), key_bias.contiguous(), values.contiguous(), bias.contiguous())
