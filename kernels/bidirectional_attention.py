"""Scores of pixels and words in one pass over the pixels: both softmaxes, and what each side needs of them.

Shapes: source x (B, N, D) and value v (B, N, V) of the pixels, contiguous, of one dtype, often the same tensor; the
words' side ``few`` (B, L, D) and ``bias`` (B, L) in float32, L <= 32:

    S = few x^T + bias                                              (B, L, N)
    R = softmax of S over the words,   Rc = R less its mean over the pixels,   spread = Rc Rc^T / N
    P = softmax of S over the pixels,  heard = P v                  (B, L, V)

* scores: a tile of pixels at a time, S and, while the tile is in the cache, what it adds to all sums: per word the
  largest score and the sum of exponentials (as in split-K attention), R's mean and squares about that mean, and the
  exponentials times v. The tiles' numbers are combined after by a few sums: no atomics, the same bits every run.
* rows: Rc, once the mean is known.
* backward: the gradient of S from S, that of R and that of P, which is made from v on the way; and P.

Where words read and pixels do not (:mod:`fastris.ops.word_pixel_attention`), there is no R and no ``bias``: the same
kernels, without BOTH, leave out what it needs.

The pixels are read once, N x D numbers; written are S and Rc, N x L, and L x V numbers for each tile. Products of few
rows are cheap: in low precision the words' side is split in two numbers that add up to it, so that only what the pixels
are rounded to is lost. Kept for backward: S and three numbers per word.
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
Table = dict[tuple[str, int], Config]
# (shared-memory class, bytes per element of the pixels' dtype) -> launch. A small tile has few pixels to share what it
# writes of sums among; float32 products are IEEE, outside the tensor cores, and spill in fewer warps.
_FEW = Config((("BLOCK_N", 64), ("BLOCK_D", 64)), num_warps=4, num_stages=2)
_HALF = Config((("BLOCK_N", 128), ("BLOCK_D", 64)), num_warps=8, num_stages=2, alternatives=(_FEW,))
_FLOAT = Config((("BLOCK_N", 64), ("BLOCK_D", 32)), num_warps=8, num_stages=2)
_MANY_FLOAT = Config((("BLOCK_N", 128), ("BLOCK_D", 32)), num_warps=8, num_stages=2)
_FEW_FLOAT = Config((("BLOCK_N", 32), ("BLOCK_D", 32)), num_warps=8, num_stages=2)
SCORES = {
    ("large", 2): _HALF,
    ("small", 2): _HALF,
    ("tiny", 2): _FLOAT,
    ("large", 4): _FLOAT,
    ("small", 4): _MANY_FLOAT,
    ("tiny", 4): _FEW_FLOAT,
}
BACKWARD = {**SCORES, **{(shared, 4): _FEW_FLOAT for shared in ("large", "small", "tiny")}}
ROWS = Config((("BLOCK_N", 128),), num_warps=4, num_stages=1)
ALIGNED = 16
"""Of other numbers of channels, each has an address of its own, for which wide tiles spill."""
NOTHING = tl.constexpr(-1e30)  # the score of a word that does not exist
# Rows of the (B, 3, L) float32 sums: the mean of R, and largest score and sum of exponentials over the pixels.
MEAN, LARGEST, TOTAL = (tl.constexpr(i) for i in range(3))
SIZES = ("words",)


@triton.jit
def _tile(pixels, BLOCK_N: tl.constexpr):
    """This program's sample (int64), its pixels, and which of them exist; programs of a sample follow each other."""
    tiles = tl.cdiv(pixels, BLOCK_N)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    return sample, pixel, pixel < pixels


@triton.jit
def _plane(pointer, sample, word, words, pixel, pixels):
    """Pointers to a tile [words, pixels] of a (B, L, N) tensor; one sample's offsets fit 32 bits, to save registers."""
    return pointer + sample * words * pixels + (word[:, None] * pixels + pixel[None, :])


@triton.jit
def _split_dot(few, right, total, PRECISION: tl.constexpr):
    """``total + few @ right``, of which only ``right`` is rounded: ``few``, in float32, is split in two numbers."""
    rounded = few.to(right.dtype)
    total = tl.dot(rounded, right, total, input_precision=PRECISION)
    if right.dtype != tl.float32:
        total = tl.dot((few - rounded.to(tl.float32)).to(right.dtype), right, total, input_precision=PRECISION)
    return total


@triton.jit
def _of_words(few_ptr, x_ptr, first_word, word, words, row, present, width, PRECISION: tl.constexpr,
              BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """few x^T of this tile, [words, pixels]; ``row`` is the pixels' place in x, ``first_word`` that of word 0."""
    total = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        inside = channel < width
        few_mask = (word < words)[:, None] & inside[None, :]
        few = tl.load(few_ptr + (first_word + word)[:, None] * width + channel[None, :], mask=few_mask, other=0.0)
        x_mask = present[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * width + channel[None, :], mask=x_mask, other=0.0)
        total = _split_dot(few, tl.trans(x), total, PRECISION)
    return total


@triton.jit
def _softmax_of_words(scores):
    """Softmax of [words, pixels] over the words."""
    weights = tl.exp(scores - tl.max(scores, axis=0)[None, :])
    return weights / tl.sum(weights, axis=0)[None, :]


@triton.jit(do_not_specialize=SIZES)
def _scores_kernel(
    scores_ptr, sums_ptr, squares_ptr, heard_ptr, few_ptr, bias_ptr, source_ptr, value_ptr, pixels, words,
    width, value_width, PRECISION: tl.constexpr, BOTH: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """S of BLOCK_N pixels, and what they add to sums [B, tiles, 3, L], squares [.., L, L] and heard [.., L, V]."""
    sample, pixel, present = _tile(pixels, BLOCK_N)
    word = tl.arange(0, BLOCK_L)
    real = word < words
    row, first_word = sample * pixels + pixel, sample * words
    scores = _of_words(few_ptr, source_ptr, first_word, word, words, row, present, width, PRECISION,
                       BLOCK_L, BLOCK_N, BLOCK_D)  # fmt: skip
    if BOTH:
        scores += tl.load(bias_ptr + first_word + word, mask=real, other=0.0)[:, None]
    scores = tl.where(real[:, None], scores, NOTHING)
    inside = real[:, None] & present[None, :]
    tl.store(_plane(scores_ptr, sample, word, words, pixel, pixels), scores, mask=inside)

    tile = tl.program_id(0).to(tl.int64)
    largest = tl.max(tl.where(present[None, :], scores, NOTHING), axis=1)
    weights = tl.where(present[None, :], tl.exp(scores - largest[:, None]), 0.0)
    sums = sums_ptr + tile * 3 * words + word
    tl.store(sums + LARGEST * words, largest, mask=real)
    tl.store(sums + TOTAL * words, tl.sum(weights, axis=1), mask=real)
    if BOTH:
        rows = tl.where(present[None, :], _softmax_of_words(scores), 0.0)
        mean = tl.sum(rows, axis=1) / tl.sum(tl.where(present, 1.0, 0.0))
        tl.store(sums + MEAN * words, mean, mask=real)
        centred = tl.where(present[None, :], rows - mean[:, None], 0.0)
        squares = tl.dot(centred, tl.trans(centred), input_precision="ieee")
        at = (tile * words + word)[:, None] * words + word[None, :]
        tl.store(squares_ptr + at, squares, mask=real[:, None] & real[None, :])

    for start in range(0, value_width, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        wide = channel < value_width
        v_mask = present[:, None] & wide[None, :]
        v = tl.load(value_ptr + row[:, None] * value_width + channel[None, :], mask=v_mask, other=0.0)
        heard = _split_dot(weights, v, tl.zeros((BLOCK_L, BLOCK_D), tl.float32), PRECISION)
        place = (tile * words + word)[:, None] * value_width + channel[None, :]
        tl.store(heard_ptr + place, heard, mask=real[:, None] & wide[None, :])


@triton.jit(do_not_specialize=SIZES)
def _rows_kernel(
    rows_ptr, scores_ptr, sums_ptr, pixels, words, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Rc of BLOCK_N pixels, from S and the mean in sums [B, 3, L]."""
    sample, pixel, present = _tile(pixels, BLOCK_N)
    word = tl.arange(0, BLOCK_L)
    real = word < words
    inside = real[:, None] & present[None, :]
    scores = tl.load(_plane(scores_ptr, sample, word, words, pixel, pixels), mask=inside, other=NOTHING)
    mean = tl.load(sums_ptr + (sample * 3 + MEAN) * words + word, mask=real, other=0.0)
    rows = _softmax_of_words(scores) - mean[:, None]
    tl.store(_plane(rows_ptr, sample, word, words, pixel, pixels), rows.to(rows_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    d_scores_ptr, columns_ptr, scores_ptr, sums_ptr, d_rows_ptr, d_mean_ptr, d_spread_ptr, d_heard_ptr, scale_ptr,
    inner_ptr, value_ptr, pixels, words,
    value_width, PRECISION: tl.constexpr, BOTH: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of S, and P, of BLOCK_N pixels.

    Of the words: the mean of d_rows over the pixels, d_spread [B, L, L] as it multiplies Rc, d_heard [B, L, V] over
    its scale, and inner, the sum over the pixels of P and its gradient.
    """
    sample, pixel, present = _tile(pixels, BLOCK_N)
    word = tl.arange(0, BLOCK_L)
    real = word < words
    row, first_word = sample * pixels + pixel, sample * words
    d_columns = _of_words(d_heard_ptr, value_ptr, first_word, word, words, row, present, value_width, PRECISION,
                          BLOCK_L, BLOCK_N, BLOCK_D)  # fmt: skip
    d_columns *= tl.load(scale_ptr + first_word + word, mask=real, other=0.0)[:, None]
    d_columns -= tl.load(inner_ptr + first_word + word, mask=real, other=0.0)[:, None]

    inside = real[:, None] & present[None, :]
    scores = tl.load(_plane(scores_ptr, sample, word, words, pixel, pixels), mask=inside, other=NOTHING)
    sums = sums_ptr + sample * 3 * words + word
    largest = tl.load(sums + LARGEST * words, mask=real, other=0.0)
    total = tl.load(sums + TOTAL * words, mask=real, other=1.0)
    columns = tl.exp(scores - largest[:, None]) / total[:, None]
    tl.store(_plane(columns_ptr, sample, word, words, pixel, pixels), columns, mask=inside)

    d_scores = columns * d_columns
    if BOTH:
        rows = _softmax_of_words(scores)
        centred = rows - tl.load(sums + MEAN * words, mask=real, other=0.0)[:, None]
        both = real[:, None] & real[None, :]
        d_spread = tl.load(d_spread_ptr + (first_word + word)[:, None] * words + word[None, :], mask=both, other=0.0)
        d_rows = tl.dot(d_spread, centred, input_precision="ieee")
        d_rows += tl.load(_plane(d_rows_ptr, sample, word, words, pixel, pixels), mask=inside, other=0.0).to(tl.float32)
        d_rows -= tl.load(d_mean_ptr + first_word + word, mask=real, other=0.0)[:, None]
        d_rows *= rows
        d_scores += d_rows - rows * tl.sum(d_rows, axis=0)[None, :]
    tl.store(_plane(d_scores_ptr, sample, word, words, pixel, pixels), d_scores, mask=inside)


def word_block(words: int) -> int:
    """The words of a tile: 16, the least that a matrix product takes, or 32."""
    return 16 if words <= 16 else MAX_WORDS


def _launched(
    kernel, table: Table, source: Tensor, words: int, what: str = ""
) -> tuple[Config, tuple[int, ...], dict[str, int]]:
    """Tiles for the pixels ``source`` (B, N, D), the grid, and the words of a tile."""
    batch, pixels, width = source.shape
    config = table[device_class(source.device), source.dtype.itemsize]
    if width % ALIGNED:
        config, what = _FEW_FLOAT, what + "odd"
    config = choose(kernel, config, source.device, source.dtype, batch * pixels, f"L{word_block(words)}{what}")
    return config, (batch * triton.cdiv(pixels, config["BLOCK_N"]),), {"BLOCK_L": word_block(words)}


@torch.library.custom_op("fastris::bidirectional_read", mutates_args=())
def _read(few: Tensor, bias: Tensor, source: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, pixels, width), words, value_width = source.shape, few.shape[1], value.shape[2]
    few, bias, source, value = (each.contiguous() for each in (few, bias, source, value))
    scores, rows = few.new_empty(batch, words, pixels), source.new_empty(batch, words, pixels)
    if not batch:
        nothing = few.new_zeros(0, words, words), few.new_zeros(0, words, value_width), few.new_zeros(0, 3, words)
        return scores, rows, *nothing
    config, grid, block = _launched(_scores_kernel, SCORES, source, words)
    tiles = grid[0] // batch
    sums, squares = few.new_empty(batch, tiles, 3, words), few.new_empty(batch, tiles, words, words)
    parts = few.new_empty(batch, tiles, words, value_width)
    launch(
        _scores_kernel, grid, scores, sums, squares, parts, few, bias, source, value, pixels, words,
        width, value_width, PRECISION=dot_precision(source.dtype), BOTH=True, **block, config=config,
    )  # fmt: skip
    spread, heard, sums = _combined(sums, squares, parts, pixels, config["BLOCK_N"])
    grid = (batch * triton.cdiv(pixels, ROWS["BLOCK_N"]),)
    launch(_rows_kernel, grid, rows, scores, sums, pixels, words, **block, config=ROWS)
    return scores, rows, spread, heard, sums


def _combined(sums: Tensor, squares: Tensor, parts: Tensor, pixels: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of all tiles: spread (B, L, L), heard (B, L, V) and sums (B, 3, L)."""
    counts = (pixels - torch.arange(0, pixels, tile, device=sums.device)).clamp(max=tile)[:, None]
    means, largest, totals = sums.unbind(2)  # [B, tiles, L]
    mean = (means * counts).sum(1) / pixels
    apart = means - mean[:, None]
    spread = (squares.sum(1) + torch.einsum("btl,btk->blk", apart * counts, apart)) / pixels
    top = largest.amax(1)
    factors = torch.exp(largest - top[:, None])
    total = (totals * factors).sum(1)
    heard = (parts * factors[..., None]).sum(1) / total[..., None]
    return spread, heard, torch.stack([mean, top, total], 1)


@_read.register_fake
def _(few, bias, source, value):
    (batch, words, _), pixels = few.shape, source.shape[1]
    sized = (batch, words, words), (batch, words, value.shape[2]), (batch, 3, words)
    scores = few.new_empty(batch, words, pixels)
    return scores, source.new_empty(batch, words, pixels), *(few.new_empty(each) for each in sized)


@torch.library.custom_op("fastris::bidirectional_read_backward", mutates_args=())
def _read_backward(
    scores: Tensor, sums: Tensor, heard: Tensor, d_rows: Tensor, d_spread: Tensor, d_heard: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    batch, words, pixels = scores.shape
    d_scores, columns = torch.empty_like(scores), torch.empty_like(scores)
    if not batch:
        return d_scores, columns
    value, d_rows = value.contiguous(), d_rows.contiguous()
    d_mean = d_rows.mean(2, dtype=torch.float32)
    inner = (d_heard * heard).sum(2)
    scale = _scale(d_heard)
    config, grid, block = _launched(_backward_kernel, BACKWARD, value, words)
    launch(
        _backward_kernel, grid, d_scores, columns, scores, sums, d_rows, d_mean,
        (d_spread + d_spread.mT) / pixels, (d_heard / scale).contiguous(), scale, inner, value, pixels, words,
        value.shape[2], PRECISION=dot_precision(value.dtype), BOTH=True, **block, config=config,
    )  # fmt: skip
    return d_scores, columns


def _scale(rows: Tensor) -> Tensor:
    """The power of two above each row's largest number, (B, L, 1): dividing by it rounds nothing."""
    largest = rows.abs().amax(2, keepdim=True).clamp_min(1e-30)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)


@_read_backward.register_fake
def _(scores, sums, heard, d_rows, d_spread, d_heard, value):
    return torch.empty_like(scores), torch.empty_like(scores)


@torch.library.custom_op("fastris::read_columns", mutates_args=())
def _read_columns(few: Tensor, source: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (batch, pixels, width), words, value_width = source.shape, few.shape[1], value.shape[2]
    few, source, value = (each.contiguous() for each in (few, source, value))
    scores = few.new_empty(batch, words, pixels)
    if not batch:
        return scores, few.new_zeros(0, words, value_width), few.new_zeros(0, 3, words)
    config, grid, block = _launched(_scores_kernel, SCORES, source, words, "columns")
    tiles = grid[0] // batch
    sums, parts = few.new_zeros(batch, tiles, 3, words), few.new_empty(batch, tiles, words, value_width)
    launch(
        _scores_kernel, grid, scores, sums, None, parts, few, None, source, value, pixels, words,
        width, value_width, PRECISION=dot_precision(source.dtype), BOTH=False, **block, config=config,
    )  # fmt: skip
    _, largest, totals = sums.unbind(2)  # [B, tiles, L]
    top = largest.amax(1)
    factors = torch.exp(largest - top[:, None])
    total = (totals * factors).sum(1)
    heard = (parts * factors[..., None]).sum(1) / total[..., None]
    return scores, heard, torch.stack([torch.zeros_like(top), top, total], 1)


@_read_columns.register_fake
def _(few, source, value):
    (batch, words, _), pixels = few.shape, source.shape[1]
    sized = (batch, words, pixels), (batch, words, value.shape[2]), (batch, 3, words)
    return tuple(few.new_empty(each) for each in sized)


@torch.library.custom_op("fastris::read_columns_backward", mutates_args=())
def _read_columns_backward(
    scores: Tensor, sums: Tensor, heard: Tensor, d_heard: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    batch, words, pixels = scores.shape
    d_scores, columns = torch.empty_like(scores), torch.empty_like(scores)
    if batch:
        value, scale = value.contiguous(), _scale(d_heard)
        config, grid, block = _launched(_backward_kernel, BACKWARD, value, words, "columns")
        launch(
            _backward_kernel, grid, d_scores, columns, scores, sums, None, None, None,
            (d_heard / scale).contiguous(), scale, (d_heard * heard).sum(2), value, pixels, words,
            value.shape[2], PRECISION=dot_precision(value.dtype), BOTH=False, **block, config=config,
        )  # fmt: skip
    return d_scores, columns


@_read_columns_backward.register_fake
def _(scores, sums, heard, d_heard, value):
    return torch.empty_like(scores), torch.empty_like(scores)


@register_flop_formula(torch.ops.fastris.read_columns)
def _(few, source, value, *_, out_shape=None, **__) -> int:
    return 2 * few[0] * few[1] * source[1] * (source[2] + value[2])


@register_flop_formula(torch.ops.fastris.read_columns_backward)
def _(scores, sums, heard, d_heard, value, *_, out_shape=None, **__) -> int:
    return 2 * scores[0] * scores[1] * value[1] * value[2]


@register_flop_formula(torch.ops.fastris.bidirectional_read)
def _(few, bias, source, value, *_, out_shape=None, **__) -> int:
    return 2 * few[0] * few[1] * source[1] * (source[2] + value[2])


@register_flop_formula(torch.ops.fastris.bidirectional_read_backward)
def _(scores, sums, heard, d_rows, d_spread, d_heard, value, *_, out_shape=None, **__) -> int:
    return 2 * scores[0] * scores[1] * value[1] * value[2]


def read(few: Tensor, bias: Tensor, source: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """S (B, L, N), Rc (B, L, N) in the pixels' dtype, spread (B, L, L), heard (B, L, V) and sums (B, 3, L)."""
    return _read(few, bias, source, value)


def read_backward(
    scores: Tensor, sums: Tensor, heard: Tensor, d_rows: Tensor, d_spread: Tensor, d_heard: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of S, and P, both (B, L, N), from what :func:`read` gave and the gradients of that."""
    return _read_backward(scores, sums, heard, d_rows, d_spread, d_heard, value)


def read_columns(few: Tensor, source: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S without a bias (B, L, N), heard (B, L, V) and sums (B, 3, L), whose first row is 0."""
    return _read_columns(few, source, value)


def read_columns_backward(
    scores: Tensor, sums: Tensor, heard: Tensor, d_heard: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of S, and P, both (B, L, N), from what :func:`read_columns` gave and the gradient of heard."""
    return _read_columns_backward(scores, sums, heard, d_heard, value)
