"""Four reductions of a pixel map for the alignment loss: the map is read as it is, twice in each pass.

Shapes: features x (B, C, P) with any strides and of any dtype; norms n (B, 1, P), weights of the cells (B, R, P) and
vectors (B, R, C) of the samples, all float32. See :mod:`fastris.ops.pixel_contrast` for what they are of:

* norms: n, and the sums over the pixels of two rows of weights times x / n. A program takes a tile of pixels through
  all channels twice, the second time out of the cache, and leaves partial sums.
* cosines: three vectors times x / n.
* sums: three rows of weights times x, a chunk of pixels and some channels a program, partial sums again.
* gradient: five rows of weights times five vectors, less x times a number that two of them have with x. Written in x's
  dtype and layout; the channels again go by twice.

Partial sums are added up by one torch.sum, so every run gives the same bits. In half precision no float32 copy of the
map is made, of it or of its gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, choose
from .launch import launch

SIZES = ("batch", "channels", "pixels")
_WIDE = Config((("BLOCK_C", 64), ("BLOCK_P", 32)), 4, 1)
TILE = Config((("BLOCK_C", 32), ("BLOCK_P", 64)), 4, 1, (_WIDE,))
"""Of all kernels but the sums."""
_WIDE_SUMS = Config((("BLOCK_C", 64), ("BLOCK_P", 32), ("TILES", 16)), 4, 1)
SUMS_TILE = Config((("BLOCK_C", 32), ("BLOCK_P", 64), ("TILES", 8)), 4, 1, (_WIDE_SUMS,))
LEAST_NORM = tl.constexpr(1e-6)


@triton.jit
def _block(batch, pixels, BLOCK_P: tl.constexpr):
    """This program's sample and its pixels (int64), and which of them exist."""
    sample = (tl.program_id(0) % batch).to(tl.int64)
    pixel = (tl.program_id(0) // batch).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    return sample, pixel, pixel < pixels


@triton.jit
def _tile(x_ptr, channel, channels, pixel, present, stride_xc, stride_xp):
    """Pointers to [channels, pixels] of a sample, and which of these exist."""
    pointers = x_ptr + channel[:, None].to(tl.int64) * stride_xc + pixel[None, :] * stride_xp
    return pointers, (channel < channels)[:, None] & present[None, :]


@triton.jit
def _pixel_row(rows_ptr, row, pixel, present, pixels):
    """[1, pixels] of a sample's rows; 0 outside."""
    return tl.load(rows_ptr + row * pixels + pixel, mask=present, other=0.0)[None, :]


@triton.jit
def _vector(vectors_ptr, row, channel, channels):
    """[channels, 1] of a sample's vectors; 0 outside."""
    return tl.load(vectors_ptr + row * channels + channel, mask=channel < channels, other=0.0)[:, None]


@triton.jit(do_not_specialize=SIZES)
def _norms_kernel(
    sums_ptr,  # [chunks, B, 2, C] float32
    norms_ptr,  # [B, P] float32
    x_ptr,
    weights_ptr,  # [B, 2, P] float32
    stride_xb,
    stride_xc,
    stride_xp,
    batch,
    channels,
    pixels,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sample, pixel, present = _block(batch, pixels, BLOCK_P)
    x_ptr += sample * stride_xb
    weights_ptr += sample * 2 * pixels
    squares = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        pointers, inside = _tile(x_ptr, channel, channels, pixel, present, stride_xc, stride_xp)
        x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        squares += x * x
    norms = tl.maximum(tl.sqrt(tl.sum(squares, axis=0)), LEAST_NORM)
    tl.store(norms_ptr + sample * pixels + pixel, norms, mask=present)
    first = _pixel_row(weights_ptr, 0, pixel, present, pixels) / norms[None, :]
    second = _pixel_row(weights_ptr, 1, pixel, present, pixels) / norms[None, :]
    sums_ptr += tl.program_id(0).to(tl.int64) * 2 * channels
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        pointers, inside = _tile(x_ptr, channel, channels, pixel, present, stride_xc, stride_xp)
        x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums_ptr + channel, tl.sum(x * first, axis=1), mask=channel < channels)
        tl.store(sums_ptr + channels + channel, tl.sum(x * second, axis=1), mask=channel < channels)


@triton.jit(do_not_specialize=SIZES)
def _cosines_kernel(
    cosines_ptr,  # [B, 3, P] float32
    x_ptr,
    norms_ptr,  # [B, P] float32
    vectors_ptr,  # [B, 3, C] float32
    stride_xb,
    stride_xc,
    stride_xp,
    batch,
    channels,
    pixels,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sample, pixel, present = _block(batch, pixels, BLOCK_P)
    x_ptr += sample * stride_xb
    vectors_ptr += sample * 3 * channels
    first = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    second = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    third = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        pointers, inside = _tile(x_ptr, channel, channels, pixel, present, stride_xc, stride_xp)
        x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        first += x * _vector(vectors_ptr, 0, channel, channels)
        second += x * _vector(vectors_ptr, 1, channel, channels)
        third += x * _vector(vectors_ptr, 2, channel, channels)
    norms = tl.load(norms_ptr + sample * pixels + pixel, mask=present, other=1.0)
    cosines_ptr += sample * 3 * pixels + pixel
    tl.store(cosines_ptr, tl.sum(first, axis=0) / norms, mask=present)
    tl.store(cosines_ptr + pixels, tl.sum(second, axis=0) / norms, mask=present)
    tl.store(cosines_ptr + 2 * pixels, tl.sum(third, axis=0) / norms, mask=present)


@triton.jit(do_not_specialize=SIZES)
def _sums_kernel(
    sums_ptr,  # [chunks, B, 3, C] float32
    x_ptr,
    weights_ptr,  # [B, 3, P] float32
    stride_xb,
    stride_xc,
    stride_xp,
    batch,
    channels,
    pixels,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
):
    sample = (tl.program_id(0) % batch).to(tl.int64)
    chunk = (tl.program_id(0) // batch).to(tl.int64)
    x_ptr += sample * stride_xb
    weights_ptr += sample * 3 * pixels
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    second = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    third = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for tile in range(TILES):
        pixel = (chunk * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        present = pixel < pixels
        pointers, inside = _tile(x_ptr, channel, channels, pixel, present, stride_xc, stride_xp)
        x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        first += x * _pixel_row(weights_ptr, 0, pixel, present, pixels)
        second += x * _pixel_row(weights_ptr, 1, pixel, present, pixels)
        third += x * _pixel_row(weights_ptr, 2, pixel, present, pixels)
    sums_ptr += tl.program_id(0).to(tl.int64) * 3 * channels + channel
    tl.store(sums_ptr, tl.sum(first, axis=1), mask=channel < channels)
    tl.store(sums_ptr + channels, tl.sum(second, axis=1), mask=channel < channels)
    tl.store(sums_ptr + 2 * channels, tl.sum(third, axis=1), mask=channel < channels)


@triton.jit(do_not_specialize=SIZES)
def _gradient_kernel(
    d_x_ptr,
    x_ptr,
    vectors_ptr,  # [B, 5, C] float32
    weights_ptr,  # [B, 5, P] float32
    along_ptr,  # [B, P] float32
    inverse_ptr,  # [B, P] float32
    stride_db,
    stride_dc,
    stride_dp,
    stride_xb,
    stride_xc,
    stride_xp,
    batch,
    channels,
    pixels,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What the last two vectors have with x, each pixel by its weights, is added to ``along`` on the way."""
    sample, pixel, present = _block(batch, pixels, BLOCK_P)
    x_ptr += sample * stride_xb
    d_x_ptr += sample * stride_db
    vectors_ptr += sample * 5 * channels
    weights_ptr += sample * 5 * pixels
    fourth = _pixel_row(weights_ptr, 3, pixel, present, pixels)
    fifth = _pixel_row(weights_ptr, 4, pixel, present, pixels)
    products = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        pointers, inside = _tile(x_ptr, channel, channels, pixel, present, stride_xc, stride_xp)
        x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        vector = _vector(vectors_ptr, 3, channel, channels) * fourth
        products += x * (vector + _vector(vectors_ptr, 4, channel, channels) * fifth)
    along = tl.sum(products, axis=0) + tl.load(along_ptr + sample * pixels + pixel, mask=present, other=0.0)
    along = (along * tl.load(inverse_ptr + sample * pixels + pixel, mask=present, other=0.0))[None, :]
    first = _pixel_row(weights_ptr, 0, pixel, present, pixels)
    second = _pixel_row(weights_ptr, 1, pixel, present, pixels)
    third = _pixel_row(weights_ptr, 2, pixel, present, pixels)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        pointers, inside = _tile(x_ptr, channel, channels, pixel, present, stride_xc, stride_xp)
        d_x = -along * tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        d_x += _vector(vectors_ptr, 0, channel, channels) * first
        d_x += _vector(vectors_ptr, 1, channel, channels) * second
        d_x += _vector(vectors_ptr, 2, channel, channels) * third
        d_x += _vector(vectors_ptr, 3, channel, channels) * fourth
        d_x += _vector(vectors_ptr, 4, channel, channels) * fifth
        pointers, inside = _tile(d_x_ptr, channel, channels, pixel, present, stride_dc, stride_dp)
        tl.store(pointers, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)


def _config(kernel, table: Config, x: Tensor) -> Config:
    return choose(kernel, table, x.device, x.dtype, x.shape[0] * x.shape[2])


@torch.library.custom_op("fastris::pixel_contrast_norms", mutates_args=())
def norms(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The norms (B, 1, P) of x, at least 1e-6, and ``sum_p w x / n`` (B, 2, C) of the weights (B, 2, P)."""
    batch, channels, pixels = x.shape
    config = _config(_norms_kernel, TILE, x)
    chunks = triton.cdiv(pixels, config["BLOCK_P"])
    found = weights.new_empty(batch, 1, pixels)
    sums = weights.new_empty(chunks, batch, 2, channels)
    if batch:
        tensors = sums, found, x, weights.contiguous()
        launch(_norms_kernel, (chunks * batch,), *tensors, *x.stride(), *x.shape, config=config)
    return found, sums.sum(0)


@norms.register_fake
def _(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, pixels = x.shape
    return weights.new_empty(batch, 1, pixels), weights.new_empty(batch, 2, channels)


@torch.library.custom_op("fastris::pixel_contrast_cosines", mutates_args=())
def cosines(x: Tensor, norm: Tensor, vectors: Tensor) -> Tensor:
    """``vectors x / n``: (B, 3, P) of vectors (B, 3, C) and norms (B, 1, P)."""
    batch, _, pixels = x.shape
    config = _config(_cosines_kernel, TILE, x)
    found = vectors.new_empty(batch, 3, pixels)
    if batch:
        grid = (batch * triton.cdiv(pixels, config["BLOCK_P"]),)
        tensors = found, x, norm.contiguous(), vectors.contiguous()
        launch(_cosines_kernel, grid, *tensors, *x.stride(), *x.shape, config=config)
    return found


@cosines.register_fake
def _(x: Tensor, norm: Tensor, vectors: Tensor) -> Tensor:
    return vectors.new_empty(x.shape[0], 3, x.shape[2])


@torch.library.custom_op("fastris::pixel_contrast_sums", mutates_args=())
def sums(x: Tensor, weights: Tensor) -> Tensor:
    """``sum_p w x``: (B, 3, C) of the weights (B, 3, P)."""
    batch, channels, pixels = x.shape
    config = _config(_sums_kernel, SUMS_TILE, x)
    chunks = triton.cdiv(pixels, config["BLOCK_P"] * config["TILES"])
    found = weights.new_empty(chunks, batch, 3, channels)
    if batch:
        grid = (chunks * batch, triton.cdiv(channels, config["BLOCK_C"]))
        launch(_sums_kernel, grid, found, x, weights.contiguous(), *x.stride(), *x.shape, config=config)
    return found.sum(0)


@sums.register_fake
def _(x: Tensor, weights: Tensor) -> Tensor:
    return weights.new_empty(x.shape[0], 3, x.shape[1])


@torch.library.custom_op("fastris::pixel_contrast_gradient", mutates_args=())
def gradient(x: Tensor, vectors: Tensor, weights: Tensor, along: Tensor, inverse: Tensor) -> Tensor:
    """``sum_r w_r v_r - x (along + sum of the last two w_r v_r x) inverse``, in dtype and layout of x (B, C, P).

    ``vectors`` (B, 5, C), ``weights`` (B, 5, P), ``along`` and ``inverse`` (B, 1, P).
    """
    d_x = _empty_gradient(x, vectors, weights, along, inverse)
    batch, _, pixels = x.shape
    config = _config(_gradient_kernel, TILE, x)
    if batch:
        grid = (batch * triton.cdiv(pixels, config["BLOCK_P"]),)
        tensors = d_x, x, *(each.contiguous() for each in (vectors, weights, along, inverse))
        launch(_gradient_kernel, grid, *tensors, *d_x.stride(), *x.stride(), *x.shape, config=config)
    return d_x


@gradient.register_fake
def _empty_gradient(x: Tensor, vectors: Tensor, weights: Tensor, along: Tensor, inverse: Tensor) -> Tensor:
    batch, channels, pixels = x.shape
    if x.stride(1) == 1:
        return x.new_empty(batch, pixels, channels).mT
    return x.new_empty(batch, channels, pixels)
