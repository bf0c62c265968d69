"""What pixels read of a few words, normed and multiplied with what they are, in one launch a pass.

Shapes: source x, seen y (B, N, C) of one dtype; of the words, in float32 or wider: keys k and answers v (B, L, C),
offset o and bias b (B, L), the answers' covariance G (B, L, L); of each pixel one over a deviation, r (B, N); of the
norm behind a bias h (C,). L <= 32; another length up to the tile's 16 or 32 words compiles nothing.

    S = x k^T + o      a = softmax over the words of (r S + b)      t = 1 / sqrt(a G a^T + eps)
    out = gelu(y) * ((t a) v + h)

* factor: R with ``G = R R^T``, in float64 (Cholesky's, one sample a program). ``a G a^T = |a R|^2`` has no difference
  of large numbers, and is made in float32.
* listen: BLOCK_N pixels go through the channels for S, and once more for the output. S is kept, (B, L, N) float32.
* gradients: a, t and what was read are made again from S. d is the gradient of the output:

      d_heard = gelu(y) d      d_y = gelu'(y) d * ((t a) v + h)      the gradient of (r S + b)

  and the output itself for the weights behind it. d_heard is written, too: its products with a, of all pixels, are
  torch.bmm's, as is every product of C x C. Nothing is added by atomics, so every run gives the same bits.

In low precision the words' rows and each pixel's weights are divided by powers or numbers that make them 1 before they
are rounded, so that float16 holds them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .common import dot_precision
from .configs import Config, choose, device_class
from .launch import launch

MAX_WORDS = 32
SIZES = ("words",)
_LEAST = Config((("BLOCK_N", 16), ("BLOCK_D", 16)), num_warps=4, num_stages=1)
_NARROW = Config((("BLOCK_N", 16), ("BLOCK_D", 32)), num_warps=4, num_stages=1)
_NARROW_FLOAT = Config((("BLOCK_N", 16), ("BLOCK_D", 32)), num_warps=8, num_stages=1)
_SINGLE = Config((("BLOCK_N", 32), ("BLOCK_D", 32)), num_warps=8, num_stages=1)
_FLOAT = Config((("BLOCK_N", 64), ("BLOCK_D", 32)), num_warps=8, num_stages=1)
_FEW = Config((("BLOCK_N", 32), ("BLOCK_D", 64)), num_warps=4, num_stages=2)
_HALF = Config((("BLOCK_N", 64), ("BLOCK_D", 64)), num_warps=8, num_stages=2, alternatives=(_FEW,))
_FEW_ROWS = Config((("BLOCK_N", 16), ("BLOCK_D", 64)), num_warps=4, num_stages=2, alternatives=(_NARROW, _SINGLE))
# (shared-memory class, bytes per element of the pixels' dtype) -> launch. In low precision the gradients of 32 rows of
# 64 channels spill by 4 warps and by 8, of 32 channels on AMD's; in float32, 32 rows on sm_100 and sm_120.
LISTEN = {("large", 2): _HALF, ("small", 2): _HALF, ("large", 4): _FLOAT, ("small", 4): _FLOAT}
LISTEN |= {("tiny", 2): _SINGLE, ("tiny", 4): _SINGLE}
GRADIENTS = {("large", 2): _FEW_ROWS, ("small", 2): _FEW_ROWS, ("tiny", 2): _LEAST}
GRADIENTS |= {("large", 4): _NARROW_FLOAT, ("small", 4): _NARROW_FLOAT, ("tiny", 4): _LEAST}
ALIGNED = 16
"""Of other numbers of channels, each has an address of its own, for which the gradients' wider tiles spill."""
FACTOR = Config((), num_warps=4, num_stages=1)
NOTHING = tl.constexpr(-1e30)  # the score of a word that does not exist
RIDGE = tl.constexpr(1e-12)  # of the trace, added to a covariance: words may say the same
# Rows of the (B, 4, L) float32 numbers of words: by what keys and answers were divided, o and b.
KEY_SCALE, ANSWER_SCALE, OFFSET, BIAS = (tl.constexpr(i) for i in range(4))


@triton.jit(do_not_specialize=SIZES)
def _factor_kernel(factor_ptr, gram_ptr, words, WORDS: tl.constexpr):
    """R [B, L, L] float32 of G [B, L, L] float64, lower triangular."""
    sample = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, WORDS)[:, None], tl.arange(0, WORDS)[None, :]
    place = (sample * words + row) * words + column
    inside = (row < words) & (column < words)
    gram = tl.load(gram_ptr + place, mask=inside, other=0.0)
    ridge = RIDGE * tl.sum(tl.sum(tl.where(row == column, gram, 0.0), axis=1), axis=0) + 1e-30
    gram = tl.where(row == column, gram + ridge, gram)
    factor = tl.zeros((WORDS, WORDS), tl.float32)
    for step in range(words):
        left = tl.sum(tl.where(column == step, gram, 0.0), axis=1)[:, None]
        top = tl.sum(tl.where(row == step, gram, 0.0), axis=0)[None, :]
        pivot = tl.sum(tl.where(column == step, top, 0.0), axis=1)[:, None]
        pivot = tl.where(pivot < ridge, ridge, pivot)
        factor = tl.where((column == step) & (row >= step), (left / tl.sqrt(pivot)).to(tl.float32), factor)
        gram -= left * top / pivot
    tl.store(factor_ptr + place, factor, mask=inside)


@triton.jit
def _block(pixels, BLOCK_N: tl.constexpr):
    """This program's sample (int64), its pixels, and which of them exist; programs of a sample follow each other."""
    tiles = tl.cdiv(pixels, BLOCK_N)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    return sample, pixel, pixel < pixels


@triton.jit
def _of_words(of_words_ptr, which: tl.constexpr, words, WORDS: tl.constexpr):
    """[1, WORDS] of a sample's numbers of words; 0 where there is none."""
    word = tl.arange(0, WORDS)
    return tl.load(of_words_ptr + which * words + word, mask=word < words, other=0.0)[None, :]


@triton.jit
def _attend(raw, rstd, of_words_ptr, factor_ptr, words, EPS: tl.constexpr, WORDS: tl.constexpr):
    """a, a R [pixels, WORDS], t [pixels, 1] and R [WORDS, WORDS], from S and r [pixels, 1]."""
    row, column = tl.arange(0, WORDS)[:, None], tl.arange(0, WORDS)[None, :]
    scores = tl.where(column < words, raw * rstd + _of_words(of_words_ptr, BIAS, words, WORDS), NOTHING)
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    factor = tl.load(factor_ptr + row * words + column, mask=(row < words) & (column < words), other=0.0)
    spread = tl.dot(weights, factor, input_precision="ieee")
    return weights, spread, 1.0 / tl.sqrt(tl.sum(spread * spread, axis=1) + EPS)[:, None], factor


@triton.jit
def _to_one(rows, dtype: tl.constexpr):
    """``rows`` [pixels, K] in ``dtype``, and by what they were divided, [pixels, 1]; in float32 that is 1."""
    scale = tl.full((rows.shape[0], 1), 1.0, tl.float32)
    if dtype != tl.float32:
        scale = tl.maximum(tl.max(tl.abs(rows), axis=1), 1e-37)[:, None]
    return (rows / scale).to(dtype), scale


@triton.jit
def _normal(x):
    """The share of the normal distribution below x: gelu(x) = x _normal(x)."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def _heard(weights, scale, answers, bias_ptr, channel, channels, PRECISION: tl.constexpr):
    """What pixels read [pixels, channels], normed, from weights over ``scale`` and the words' answers."""
    bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0)[None, :]
    return tl.dot(weights, answers, input_precision=PRECISION) * scale + bias


@triton.jit(do_not_specialize=SIZES)
def _listen_kernel(
    out_ptr,  # [B, N, C]
    raw_ptr,  # [B, L, N] float32
    source_ptr,  # [B, N, C]
    seen_ptr,  # [B, N, C]
    rstd_ptr,  # [B, N] float32
    keys_ptr,  # [B, L, C]
    answers_ptr,  # [B, L, C]
    of_words_ptr,  # [B, 4, L] float32
    factor_ptr,  # [B, L, L] float32
    bias_ptr,  # [C] float32
    pixels,
    words,
    channels,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample, pixel, present = _block(pixels, BLOCK_N)
    word = tl.arange(0, WORDS)
    real = word < words
    of_sample = sample * words
    of_words_ptr += 4 * of_sample
    place = (sample * pixels + pixel)[:, None] * channels
    raw = tl.zeros((BLOCK_N, WORDS), tl.float32)
    for start in range(0, channels, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        inside = channel < channels
        x = tl.load(source_ptr + place + channel[None, :], mask=present[:, None] & inside[None, :], other=0.0)
        key_place = (of_sample + word)[None, :] * channels + channel[:, None]
        keys = tl.load(keys_ptr + key_place, mask=real[None, :] & inside[:, None], other=0.0)
        raw = tl.dot(x, keys, raw, input_precision=PRECISION)
    raw = raw * _of_words(of_words_ptr, KEY_SCALE, words, WORDS) + _of_words(of_words_ptr, OFFSET, words, WORDS)
    tl.store(
        raw_ptr + (of_sample + word)[None, :] * pixels + pixel[:, None], raw, mask=present[:, None] & real[None, :]
    )
    rstd = tl.load(rstd_ptr + sample * pixels + pixel, mask=present, other=0.0)[:, None]
    weights, _, heard_rstd, _ = _attend(raw, rstd, of_words_ptr, factor_ptr + of_sample * words, words, EPS, WORDS)
    weights, scale = _to_one(
        weights * _of_words(of_words_ptr, ANSWER_SCALE, words, WORDS), answers_ptr.dtype.element_ty
    )
    scale *= heard_rstd
    for start in range(0, channels, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        inside = channel < channels
        of_words = (of_sample + word)[:, None] * channels + channel[None, :]
        answers = tl.load(answers_ptr + of_words, mask=real[:, None] & inside[None, :], other=0.0)
        heard = _heard(weights, scale, answers, bias_ptr, channel, channels, PRECISION)
        mask = present[:, None] & inside[None, :]
        seen = tl.load(seen_ptr + place + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        out = seen * _normal(seen) * heard
        tl.store(out_ptr + place + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _gradients_kernel(
    out_ptr,  # [B, N, C]
    d_seen_ptr,  # [B, N, C]
    d_heard_ptr,  # [B, N, C]
    weights_ptr,  # [B, L, N] float32
    d_scores_ptr,  # [B, L, N] float32
    of_pixels_ptr,  # [B, 2, N] float32: t, and the gradient of half the variance
    upstream_ptr,  # [B, N, C] float32
    seen_ptr,  # [B, N, C]
    raw_ptr,  # [B, L, N] float32
    rstd_ptr,  # [B, N] float32
    answers_ptr,  # [B, L, C]
    of_words_ptr,  # [B, 4, L] float32
    factor_ptr,  # [B, L, L] float32
    bias_ptr,  # [C] float32
    pixels,
    words,
    channels,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample, pixel, present = _block(pixels, BLOCK_N)
    word = tl.arange(0, WORDS)
    real = word < words
    of_sample = sample * words
    of_words_ptr += 4 * of_sample
    dtype = answers_ptr.dtype.element_ty
    both = present[:, None] & real[None, :]
    at = (of_sample + word)[None, :] * pixels + pixel[:, None]
    raw = tl.load(raw_ptr + at, mask=both, other=0.0)
    rstd = tl.load(rstd_ptr + sample * pixels + pixel, mask=present, other=0.0)[:, None]
    weights, spread, heard_rstd, factor = _attend(
        raw, rstd, of_words_ptr, factor_ptr + of_sample * words, words, EPS, WORDS
    )
    tl.store(weights_ptr + at, weights, mask=both)
    answer_scale = _of_words(of_words_ptr, ANSWER_SCALE, words, WORDS)
    rounded, scale = _to_one(weights * answer_scale, dtype)
    scale *= heard_rstd
    place = (sample * pixels + pixel)[:, None] * channels
    d_scaled = tl.zeros((BLOCK_N, WORDS), tl.float32)  # of t a
    for start in range(0, channels, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        inside = channel < channels
        of_words = (of_sample + word)[:, None] * channels + channel[None, :]
        answers = tl.load(answers_ptr + of_words, mask=real[:, None] & inside[None, :], other=0.0)
        heard = _heard(rounded, scale, answers, bias_ptr, channel, channels, PRECISION)
        mask = present[:, None] & inside[None, :]
        seen = tl.load(seen_ptr + place + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(upstream_ptr + place + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        share = _normal(seen)
        tl.store(out_ptr + place + channel[None, :], (seen * share * heard).to(dtype), mask=mask)
        slope = share + seen * tl.exp(-0.5 * seen * seen) * 0.3989422804014327
        tl.store(d_seen_ptr + place + channel[None, :], (slope * upstream * heard).to(dtype), mask=mask)
        d_heard = seen * share * upstream
        tl.store(d_heard_ptr + place + channel[None, :], d_heard.to(dtype), mask=mask)
        d_heard, size = _to_one(d_heard, dtype)
        d_scaled += tl.dot(d_heard, tl.trans(answers), input_precision=PRECISION) * size
    d_scaled *= answer_scale
    cube = heard_rstd * heard_rstd * heard_rstd
    d_half = -cube * tl.sum(d_scaled * weights, axis=1)[:, None]
    d_weights = d_scaled * heard_rstd + tl.dot(spread, tl.trans(factor), input_precision="ieee") * d_half
    d_scores = weights * (d_weights - tl.sum(d_weights * weights, axis=1)[:, None])
    tl.store(d_scores_ptr + at, d_scores, mask=both)
    of_pixels = of_pixels_ptr + sample * 2 * pixels + pixel[:, None]
    tl.store(of_pixels, heard_rstd, mask=present[:, None])
    tl.store(of_pixels + pixels, d_half, mask=present[:, None])


def word_block(words: int) -> int:
    """The words of a tile: 16, the least that a matrix product takes, or 32."""
    return 16 if words <= 16 else MAX_WORDS


def _rounded(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (B, L, C) in ``dtype``, and by what they were divided, (B, L): powers of two, which round nothing."""
    if dtype is torch.float32:
        return rows.contiguous(), torch.ones_like(rows[..., 0])
    largest = rows.abs().amax(2, keepdim=True).clamp_min(1e-30)
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return (rows / scale).to(dtype).contiguous(), scale[..., 0]


def _launch(kernel, table: dict[tuple[str, int], Config], *tensors: Tensor, seen: Tensor, words: int, eps: float):
    batch, pixels, channels = seen.shape
    config = table[device_class(seen.device), seen.dtype.itemsize]
    variant = f"L{word_block(words)}"
    if channels % ALIGNED:
        config, variant = _LEAST if table is GRADIENTS else config, variant + "odd"
    config = choose(kernel, config, seen.device, seen.dtype, batch * pixels, variant)
    launch(
        kernel, (batch * triton.cdiv(pixels, config["BLOCK_N"]),), *tensors, pixels, words, channels,
        EPS=eps, PRECISION=dot_precision(seen.dtype), WORDS=word_block(words), config=config,
    )  # fmt: skip


@torch.library.custom_op("fastris::pixel_word_listen", mutates_args=())
def _listen(
    source: Tensor,
    seen: Tensor,
    rstd: Tensor,
    keys: Tensor,
    offset: Tensor,
    score_bias: Tensor,
    answers: Tensor,
    gram: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    source, seen, rstd, bias = (each.contiguous() for each in (source, seen, rstd, bias))
    (batch, pixels, _), words = seen.shape, keys.shape[1]
    out, raw, factor = torch.empty_like(seen), keys.new_empty(batch, words, pixels), keys.new_empty(gram.shape)
    if not batch:
        return out, raw, factor
    launch(_factor_kernel, (batch,), factor, gram.contiguous(), words, WORDS=word_block(words), config=FACTOR)
    (few, key_scale), (rows, answer_scale) = _rounded(keys, seen.dtype), _rounded(answers, seen.dtype)
    of_words = torch.stack([key_scale, answer_scale, offset, score_bias], 1)
    tensors = out, raw, source, seen, rstd, few, rows, of_words, factor, bias
    _launch(_listen_kernel, LISTEN, *tensors, seen=seen, words=words, eps=eps)
    return out, raw, factor


@_listen.register_fake
def _(source, seen, rstd, keys, offset, score_bias, answers, gram, bias, eps) -> tuple[Tensor, Tensor, Tensor]:
    raw = keys.new_empty(*keys.shape[:2], seen.shape[1])
    return torch.empty_like(seen, memory_format=torch.contiguous_format), raw, keys.new_empty(gram.shape)


@torch.library.custom_op("fastris::pixel_word_gradients", mutates_args=())
def _gradients(
    upstream: Tensor,
    seen: Tensor,
    raw: Tensor,
    rstd: Tensor,
    score_bias: Tensor,
    answers: Tensor,
    factor: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    upstream, seen, rstd, bias = (each.contiguous() for each in (upstream, seen, rstd, bias))
    out, d_seen, d_heard = (torch.empty_like(seen) for _ in range(3))
    weights, d_scores = torch.empty_like(raw), torch.empty_like(raw)
    of_pixels = raw.new_empty(len(raw), 2, raw.shape[2])
    made = out, d_seen, d_heard, weights, d_scores, of_pixels
    if len(seen):
        rows, scale = _rounded(answers, seen.dtype)
        nothing = torch.zeros_like(scale)
        of_words = torch.stack([nothing, scale, nothing, score_bias], 1)
        tensors = upstream, seen, raw, rstd, rows, of_words, factor, bias
        _launch(_gradients_kernel, GRADIENTS, *made, *tensors, seen=seen, words=raw.shape[1], eps=eps)
    return made


@_gradients.register_fake
def _(upstream, seen, raw, rstd, score_bias, answers, factor, bias, eps):
    wide = (torch.empty_like(seen, memory_format=torch.contiguous_format) for _ in range(3))
    return *wide, torch.empty_like(raw), torch.empty_like(raw), raw.new_empty(len(raw), 2, raw.shape[2])


@register_flop_formula(torch.ops.fastris.pixel_word_listen)
def _(source, seen, rstd, keys, *_, out_shape=None, **__) -> int:
    return 4 * seen[0] * seen[1] * seen[2] * keys[1]


@register_flop_formula(torch.ops.fastris.pixel_word_gradients)
def _(upstream, seen, raw, *_, out_shape=None, **__) -> int:
    return 4 * seen[0] * seen[1] * seen[2] * raw[1]


def listen(
    source: Tensor,
    seen: Tensor,
    rstd: Tensor,
    keys: Tensor,
    offset: Tensor,
    score_bias: Tensor,
    answers: Tensor,
    gram: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, N, C) in seen's dtype, S (B, L, N) and R (B, L, L) in float32, as the module has them.

    ``gram`` is in float64; pixels and what is theirs in one dtype, everything else in float32.
    """
    return _listen(source, seen, rstd, keys, offset, score_bias, answers, gram, bias, eps)


def gradients(
    upstream: Tensor,
    seen: Tensor,
    raw: Tensor,
    rstd: Tensor,
    score_bias: Tensor,
    answers: Tensor,
    factor: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, d_y and d_heard (B, N, C) in seen's dtype; a and the gradient of ``r S + b`` (B, L, N).

    Last, (B, 2, N), t and the gradient of half of ``a G a^T``. ``upstream`` is the output's gradient, in any dtype.
    """
    return _gradients(upstream, seen, raw, rstd, score_bias, answers, factor, bias, eps)
