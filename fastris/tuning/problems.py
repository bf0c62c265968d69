"""What is timed of each operator: the forward and backward pass that a step of training makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastris import reference
from fastris.ops import (
    bidirectional_attention,
    cross_attention,
    few_query_attention,
    multiscale_deformable_attention,
    pixel_contrast,
    pixel_word_attention,
    region_contrast,
    text_to_pixel_contrastive_loss,
    text_to_pixel_similarity,
    upsample2x_conv3x3,
    upsampled_bce_with_logits,
    word_attention,
    word_pixel_attention,
)
from fastris.reference import (
    AttentionWeights,
    BidirectionalAttentionWeights,
    PixelNorm,
    PixelWordWeights,
    SeparateAttentionWeights,
    WordPixelWeights,
)

DROPOUT = 0.1


@dataclass(frozen=True)
class Sizes:
    """``side`` of the decoder's map, ``channels`` of the projector (the decoder has twice as many), heads and words."""

    side: int = 26
    channels: int = 256
    heads: int = 8
    words: int = 17


CRIS = Sizes()
"""For pictures of 416 x 416 pixels."""


@dataclass
class Problem:
    """One set of buffers and what runs on them.

    Attributes:
        tensors: inputs and parameters by name; every gradient of a floating-point one is computed.
        data: inputs that no gradient reaches.
        forward: a path's name and both, by name -> the operator's answer.
    """

    tensors: dict[str, Tensor]
    data: dict[str, Tensor]
    forward: Callable[..., Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tensors | self.data).values())

    def step(self, path: str, autocast: torch.dtype | None) -> None:
        """One forward and one backward pass; products in ``autocast`` where that is given."""
        leaves = list(self.tensors.values())
        device = leaves[0].device.type
        with torch.autocast(device, autocast, enabled=autocast is not None, cache_enabled=False):
            answer = self.forward(path, **self.tensors, **self.data)
        torch.autograd.grad(answer, leaves, torch.ones_like(answer))


def problem(operator: str, batch: int, device: torch.device, sizes: Sizes = CRIS) -> Problem:
    """Buffers for ``operator`` at a batch, with random numbers in float32: what is rounded is rounded by autocast."""
    make = {
        "text_to_pixel_similarity": _similarity,
        "text_to_pixel_contrastive_loss": _contrastive,
        "cross_attention": _cross_attention,
        "upsample2x_conv3x3": _upsample,
        "few_query_attention": _few_query,
        "bidirectional_attention": _bidirectional,
        "multiscale_deformable_attention": _deformable,
        "word_attention": _word_attention,
        "region_contrast": _region_contrast,
        "upsampled_bce_with_logits": _upsampled_bce,
        "pixel_contrast": _pixel_contrast,
        "pixel_word_attention": _pixel_word,
        "word_pixel_attention": _word_pixel,
    }[operator]
    made = make(batch, sizes)
    made.tensors = {name: _placed(tensor, device).requires_grad_() for name, tensor in made.tensors.items()}
    made.data = {name: tensor.to(device) for name, tensor in made.data.items()}
    return made


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """Images lie on a GPU as training lays them."""
    return tensor.to(device, memory_format=torch.channels_last) if tensor.ndim == 4 else tensor.to(device)


Shapes = dict[str, tuple[int, ...]]


def _drawn(shapes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _pixels(batch: int, sizes: Sizes) -> dict[str, Tensor]:
    channels, side = sizes.channels, 4 * sizes.side
    shapes: Shapes = {
        "features": (batch, channels, side, side),
        "kernel": (batch, 1, channels, 3, 3),
        "bias": (batch, 1),
    }
    shapes |= {"pointwise_weight": (channels, channels, 1, 1), "pointwise_bias": (channels,)}
    return _drawn(shapes)


def _similarity(batch: int, sizes: Sizes) -> Problem:
    def forward(path: str, features: Tensor, kernel: Tensor, bias: Tensor, **folded: Tensor) -> Tensor:
        weight, constants = folded["pointwise_weight"], folded["pointwise_bias"]
        return text_to_pixel_similarity(
            features, kernel, bias, pointwise_weight=weight, pointwise_bias=constants, impl=path
        )

    return Problem(_pixels(batch, sizes), {}, forward)


def _contrastive(batch: int, sizes: Sizes) -> Problem:
    """Behind the projector's last norm, whose statistics another operator gives."""

    def forward(path: str, features: Tensor, kernel: Tensor, target: Tensor, bias: Tensor, **others: Tensor) -> Tensor:
        weight, constants = others["pointwise_weight"], others["pointwise_bias"]
        mean, var = others["norm_mean"], others["norm_var"]
        norm = PixelNorm(mean, var, others["norm_weight"], others["norm_bias"], eps=1e-5, of_batch=False)
        loss, _ = text_to_pixel_contrastive_loss(
            features, kernel, target, bias, pointwise_weight=weight, pointwise_bias=constants, norm=norm, impl=path
        )
        return loss

    channels = sizes.channels
    tensors = _pixels(batch, sizes) | _drawn({"norm_weight": (channels,), "norm_bias": (channels,)})
    data = {"target": torch.ones(batch, 1, 16 * sizes.side, 16 * sizes.side)}
    data |= {"norm_mean": torch.zeros(channels), "norm_var": torch.ones(channels)}
    return Problem(tensors, data, forward)


def _upsample(batch: int, sizes: Sizes) -> Problem:
    """Both of the projector's, one after the other."""
    wide, side = 2 * sizes.channels, sizes.side
    shapes: Shapes = {
        "x": (batch, wide, side, side),
        "first": (wide, wide, 3, 3),
        "second": (sizes.channels, wide, 3, 3),
    }

    def forward(path: str, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        up = partial(upsample2x_conv3x3, impl=path)
        return up(up(x, first), second)

    return Problem(_drawn(shapes), {}, forward)


def _cross_attention(batch: int, sizes: Sizes) -> Problem:
    dim, rows, words = 2 * sizes.channels, sizes.side**2, sizes.words
    shapes: Shapes = {"x": (batch, rows, dim), "text": (batch, words, dim)}
    shapes |= {"norm_weight": (dim,), "norm_bias": (dim,), "in_proj_weight": (3 * dim, dim), "in_proj_bias": (3 * dim,)}
    shapes |= {"out_proj_weight": (dim, dim), "out_proj_bias": (dim,)}
    shapes |= {"post_norm_weight": (dim,), "post_norm_bias": (dim,)}
    tables = _drawn({"positions": (rows, dim), "text_positions": (words, dim)})
    padding = {"padding_mask": torch.arange(words).expand(batch, -1) > 2 * words // 3}

    def forward(
        path: str,
        x: Tensor,
        text: Tensor,
        positions: Tensor,
        text_positions: Tensor,
        padding_mask: Tensor,
        **weights: Tensor,
    ) -> Tensor:
        return cross_attention(
            x,
            text,
            positions,
            text_positions,
            padding_mask,
            AttentionWeights(**weights),
            sizes.heads,
            dropout=DROPOUT,
            attention_dropout=DROPOUT,
            training=True,
            impl=path,
        )

    return Problem(_drawn(shapes), tables | padding, forward)


def _few_query(batch: int, sizes: Sizes) -> Problem:
    """AlignFormer's largest map, 60x60 where the side is CRIS's; text is three times as wide as pixels."""
    width, dim, count = sizes.channels, 3 * sizes.channels, (2 * sizes.side + 8) ** 2
    shapes: Shapes = {"query": (batch, 1, dim), "query_positions": (1, dim), "pixels": (batch, count, width)}
    shapes |= {"level": (width,), "query_weight": (dim, dim), "key_weight": (dim, width), "value_weight": (dim, width)}
    shapes |= {"in_proj_bias": (3 * dim,), "out_weight": (dim, dim), "out_bias": (dim,)}

    def forward(
        path: str,
        query: Tensor,
        query_positions: Tensor,
        pixels: Tensor,
        level: Tensor,
        positions: Tensor,
        **weights: Tensor,
    ) -> Tensor:
        sources = query, query_positions, pixels, level, positions
        return few_query_attention(*sources, SeparateAttentionWeights(**weights), sizes.heads, impl=path)

    return Problem(_drawn(shapes), _drawn({"positions": (count, width)}), forward)


def _bidirectional(batch: int, sizes: Sizes) -> Problem:
    """Of the first map that CRIS's neck reads; both answers in one tensor."""
    width, text, rows = sizes.channels, 2 * sizes.channels, sizes.side**2
    matrices = {"query": (width, width), "key": (width, text), "value": (width, text), "out": (width, width)}
    matrices |= {"sym_value": (text, width), "sym_out": (text, text)}
    shapes: Shapes = {"pixels": (batch, rows, width), "words": (batch, sizes.words, text)}
    shapes |= {f"{name}_weight": size for name, size in matrices.items()}
    shapes |= {f"{name}_bias": size[:1] for name, size in matrices.items()}

    def forward(path: str, pixels: Tensor, words: Tensor, valid: Tensor, **weights: Tensor) -> Tensor:
        own = BidirectionalAttentionWeights(**weights)
        seen, heard = bidirectional_attention(pixels, words, valid, own, impl=path)
        return torch.cat([seen.flatten(1), heard.flatten(1).to(seen.dtype)], 1)

    valid = torch.arange(sizes.words).expand(batch, -1) <= 2 * sizes.words // 3
    return Problem(_drawn(shapes), {"valid": valid}, forward)


def _deformable(batch: int, sizes: Sizes) -> Problem:
    """Maps an eighth to a half as fine as the projector's, each pixel of them a query; AlignFormer's points."""
    maps = [(max(1, sizes.side * part // 2),) * 2 for part in (1, 2, 4)]
    width, points = sizes.channels // sizes.heads, 4
    places = reference.pixel_centres(maps)
    shapes: Shapes = {"value": (batch, len(places), sizes.heads, width)}
    shapes |= {"offsets": (batch, len(places), sizes.heads, len(maps), points, 2)}
    shapes |= {"logits": (batch, len(places), sizes.heads, len(maps) * points)}
    tensors = _drawn(shapes)
    tensors["offsets"] *= 40  # in pixels

    def forward(path: str, value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor) -> Tensor:
        return multiscale_deformable_attention(value, maps, reference_points, offsets, logits, impl=path)

    return Problem(tensors, {"reference_points": places}, forward)


def _word_attention(batch: int, sizes: Sizes) -> Problem:
    """Pixels of maps an eighth to a half as fine as the projector's, and words three times as wide."""
    dim, wide, rows = sizes.channels, 3 * sizes.channels, 21 * max(1, sizes.side // 2) ** 2
    words = (batch, sizes.words, wide)
    shapes: Shapes = {"query": (batch, rows, dim), "key": words, "value": words, "query_weight": (dim, dim)}
    shapes |= {"key_weight": (dim, wide), "value_weight": (dim, wide)}
    shapes |= {"in_proj_bias": (3 * dim,), "out_weight": (dim, dim), "out_bias": (dim,)}

    def forward(path: str, query: Tensor, key: Tensor, value: Tensor, **others: Tensor) -> Tensor:
        padding = others.pop("padding_mask")
        own = SeparateAttentionWeights(**others)
        return word_attention(query, key, value, own, sizes.heads, padding, impl=path)

    padding = {"padding_mask": torch.arange(sizes.words).expand(batch, -1) > 2 * sizes.words // 3}
    return Problem(_drawn(shapes), padding, forward)


def _region_contrast(batch: int, sizes: Sizes) -> Problem:
    """Of the map that the projector's last convolution reads, under masks four times as large."""
    channels, side = sizes.channels, 4 * sizes.side
    shapes: Shapes = {"features": (batch, channels, side, side), "centres": (batch, channels)}
    shapes |= {"pointwise_weight": (channels, channels, 1, 1), "pointwise_bias": (channels,)}

    def forward(path: str, features: Tensor, centres: Tensor, mask: Tensor, **convolution: Tensor) -> Tensor:
        weight, bias = convolution["pointwise_weight"], convolution["pointwise_bias"]
        return region_contrast(features, centres, mask, pointwise_weight=weight, pointwise_bias=bias, impl=path)

    mask = torch.zeros(batch, 1, 4 * side, 4 * side)
    mask[..., : 2 * side] = 1
    return Problem(_drawn(shapes), {"mask": mask}, forward)


def _upsampled_bce(batch: int, sizes: Sizes) -> Problem:
    """Of as many maps as AlignFormer has where there are eight heads, under masks four times as large."""
    side, maps = 4 * sizes.side, max(1, sizes.heads - 1)

    def forward(path: str, logits: Tensor, target: Tensor) -> Tensor:
        return upsampled_bce_with_logits(logits, target, pos_weight=1.1, impl=path)

    data = {"target": torch.ones(batch, 1, 4 * side, 4 * side)}
    return Problem(_drawn({"logits": (batch, maps, side, side)}), data, forward)


def _pixel_contrast(batch: int, sizes: Sizes) -> Problem:
    """Of a map as large as the projector's last, under masks four times as large."""
    channels, side = sizes.channels, 4 * sizes.side

    def forward(path: str, features: Tensor, sentence: Tensor, mask: Tensor) -> Tensor:
        return pixel_contrast(features, sentence, mask, impl=path)

    mask = torch.zeros(batch, 1, 4 * side, 4 * side)
    mask[..., : 2 * side] = 1
    return Problem(
        _drawn({"features": (batch, channels, side, side), "sentence": (batch, channels)}), {"mask": mask}, forward
    )


def _pixel_word(batch: int, sizes: Sizes) -> Problem:
    """Of a map twice as fine as the decoder's and half as wide, and words of the same width."""
    dim, rows = sizes.channels, (2 * sizes.side) ** 2
    shapes: Shapes = {"pixels": (batch, rows, dim), "words": (batch, sizes.words, dim)}
    fields = PixelWordWeights._fields
    shapes |= {name: (dim, dim) if name.endswith("weight") and "norm" not in name else (dim,) for name in fields}

    def forward(path: str, pixels: Tensor, words: Tensor, valid: Tensor, **weights: Tensor) -> Tensor:
        return pixel_word_attention(pixels, words, valid, PixelWordWeights(**weights), impl=path)

    valid = torch.arange(sizes.words).expand(batch, -1) <= 2 * sizes.words // 3
    return Problem(_drawn(shapes), {"valid": valid}, forward)


def _word_pixel(batch: int, sizes: Sizes) -> Problem:
    """Of a map twice as fine as the decoder's and half as wide, and words twice as wide."""
    dim, text, rows = sizes.channels, 2 * sizes.channels, (2 * sizes.side) ** 2
    shapes: Shapes = {"words": (batch, sizes.words, text), "pixels": (batch, rows, dim)}
    for name in WordPixelWeights._fields:
        columns = dim if name in ("key_weight", "value_weight") else text
        shapes[name] = (text, columns) if name.endswith("weight") else (text,)

    def forward(path: str, words: Tensor, pixels: Tensor, valid: Tensor, **weights: Tensor) -> Tensor:
        return word_pixel_attention(words, pixels, valid, WordPixelWeights(**weights), "masked", impl=path)

    valid = torch.arange(sizes.words).expand(batch, -1) <= 2 * sizes.words // 3
    return Problem(_drawn(shapes), {"valid": valid}, forward)


@contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Let float32 products on CUDA be what ``precision`` names, if it is one of float32's."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if precision.startswith("float32"):
        matmul.fp32_precision = "tf32" if precision == "float32 by TF32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
