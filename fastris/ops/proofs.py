"""A proof of each operator's kernels: the tiles and options of a real training step, on few pixels, against float64.

:mod:`fastris.preflight` runs them. Widths, words and heads are CRIS's, since tiles are chosen by them; pixels are few,
and their number divides by no tile. Each proof runs forward and backward on its device in a dtype, and raises what is
wrong: the compiler's or the GPU's error, or :class:`fastris.testing.WrongNumber`, by the bounds of all tests. Float32
kernels are held to what PyTorch's own switch allows at that moment, IEEE or TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris.ops.bidirectional_attention import bidirectional_attention
from fastris.ops.contrastive import text_to_pixel_contrastive_loss
from fastris.ops.cross_attention import cross_attention
from fastris.ops.few_query_attention import few_query_attention
from fastris.ops.magnet_proofs import MAGNET
from fastris.ops.multiscale_deformable_attention import multiscale_deformable_attention
from fastris.ops.proving import ON_A_GPU, REAL_WORDS, SEED, Inputs, drawn, hold, sizes_on
from fastris.ops.region_contrast import region_contrast
from fastris.ops.similarity import text_to_pixel_similarity
from fastris.ops.upsample_conv import upsample2x_conv3x3, upsample2x_conv3x3_stats
from fastris.ops.upsampled_bce import upsampled_bce_with_logits
from fastris.ops.word_attention import word_attention
from fastris.reference import AttentionWeights, BidirectionalAttentionWeights, PixelNorm, SeparateAttentionWeights

DROPOUT = 0.1


def prove_similarity(device: torch.device, dtype: torch.dtype) -> None:
    """The text-to-pixel similarity, its 1x1 convolution folded in; alone, and behind a norm as in evaluation."""
    fast, published = (partial(text_to_pixel_similarity, impl=i) for i in ("triton", "reference"))
    inputs, norm = _pixels(device), _norm(device)
    given = norm.pop("mean"), norm.pop("var")

    def normed(path: Callable, norm_weight: Tensor, norm_bias: Tensor, **sources: Tensor) -> Tensor:
        return path(**sources, norm=PixelNorm(*given, norm_weight, norm_bias, 1e-5, False))

    hold(fast, published, inputs, dtype)
    hold(partial(normed, fast), partial(normed, published), inputs | norm, dtype)


def prove_contrastive(device: torch.device, dtype: torch.dtype) -> None:
    """The same with its loss; alone, and behind a norm as in training."""
    inputs, norm = _pixels(device), _norm(device)
    del norm["mean"], norm["var"]
    target = (drawn({"target": (2, 1, sizes_on(device).height, 11)}, device, 1.0)["target"] > 0).float()
    fast, published = (partial(text_to_pixel_contrastive_loss, target=target, impl=i) for i in ("triton", "reference"))

    def normed(path: Callable, norm_weight: Tensor, norm_bias: Tensor, **sources: Tensor) -> tuple[Tensor, ...]:
        by_batch = PixelNorm.by_statistics_of(sources["features"], norm_weight, norm_bias)
        return path(**sources, norm=by_batch)

    hold(fast, published, inputs, dtype)
    hold(partial(normed, fast), partial(normed, published), inputs | norm, dtype)


def prove_upsample_conv(device: torch.device, dtype: torch.dtype) -> None:
    """The up-convolution: alone, with the statistics of its output as in training, and with these and a bias."""
    channels, height = sizes_on(device)[:2]
    inputs = _channels_last(drawn({"x": (2, channels, height, 3)}, device, 1.0))
    inputs |= drawn({"weight": (channels, channels, 3, 3), "bias": (channels,)}, device, (9 * channels) ** -0.5)

    def both(impl: str, sources: Inputs) -> tuple[Tensor, ...]:
        x, weight = sources["x"], sources["weight"]
        alone = upsample2x_conv3x3(x, weight, impl=impl)
        with_statistics = upsample2x_conv3x3_stats(x, weight, impl=impl)
        return alone, *with_statistics, *upsample2x_conv3x3_stats(**sources, impl=impl)

    hold(lambda **x: both("triton", x), lambda **x: both("reference", x), inputs, dtype)


def prove_cross_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Without dropout, with a gradient of the positions; and as in training: with dropout, and with none of them.

    In low precision training means autocast, with a float32 residual; evaluation under it is proved too.
    """
    inputs, heads = _attention_inputs(device), sizes_on(device).heads
    words = max(REAL_WORDS)
    padding = torch.arange(words, device=device)[None] >= torch.tensor(REAL_WORDS, device=device)[:, None]
    tables = {name: inputs.pop(name) for name in ("positions", "text_positions")}

    def attend(impl: str, dropout: float, sources: Inputs) -> Tensor:
        weights = AttentionWeights(*(sources[name] for name in AttentionWeights._fields))
        positions, text_positions = ((tables | sources)[name] for name in tables)
        return cross_attention(
            sources["x"],
            sources["text"],
            positions.to(sources["x"].dtype),
            text_positions.to(sources["x"].dtype),
            padding,
            weights,
            heads,
            dropout=dropout,
            attention_dropout=dropout,
            training=True,
            impl=impl,
        )

    def by(impl: str) -> Callable[..., Tensor]:
        return lambda **sources: attend(impl, 0.0, sources)

    hold(by("triton"), by("reference"), inputs | tables, dtype)
    if dtype is not torch.float32:
        hold(by("triton"), by("reference"), inputs, torch.float32, autocast=dtype)

    from fastris.kernels.cross_attention import dropout_masks

    _seed(device)
    seeds = torch.randint(2**62, (2,), dtype=torch.int64, device=device)  # as the operator draws them
    batch, rows, dim = inputs["x"].shape
    masks = dropout_masks(seeds, (batch, heads, words, dim), rows, DROPOUT, DROPOUT)

    def dropping(**sources: Tensor) -> Tensor:
        _seed(device)
        return attend("triton", DROPOUT, sources)

    def published(**sources: Tensor) -> Tensor:
        wide = {name: table.to(sources["x"].dtype) for name, table in tables.items()}
        return masked_cross_attention(wide | sources, padding, heads, *masks, DROPOUT, DROPOUT)

    hold(dropping, published, inputs, torch.float32, autocast=None if dtype is torch.float32 else dtype)


def prove_few_query_attention(device: torch.device, dtype: torch.dtype) -> None:
    """With a gradient of everything; and as in training: of fixed positions, under autocast in low precision."""
    channels, height = sizes_on(device)[:2]
    dim, count, heads = 3 * channels, 21 * height, sizes_on(device).heads
    weights: dict[str, tuple[int, ...]] = {
        "query_weight": (dim, dim),
        "key_weight": (dim, channels),
        "value_weight": (dim, channels),
    }
    inputs = drawn(weights | {"out_weight": (dim, dim)}, device, dim**-0.5)
    inputs |= drawn({"in_proj_bias": (3 * dim,), "out_bias": (dim,), "query_positions": (1, dim)}, device, 1.0)
    inputs |= drawn({"level": (channels,), "query": (2, 1, dim), "pixels": (2, count, channels)}, device, 1.0)
    table = drawn({"positions": (count, channels)}, device, 1.0)

    def by(impl: str) -> Callable[..., Tensor]:
        def attend(**sources: Tensor) -> Tensor:
            fields = SeparateAttentionWeights(*(sources.pop(name) for name in SeparateAttentionWeights._fields))
            return few_query_attention(**(table | sources), weights=fields, num_heads=heads, impl=impl)  # type: ignore[arg-type]

        return attend

    hold(by("triton"), by("reference"), inputs | table, dtype)
    if dtype is not torch.float32:
        hold(by("triton"), by("reference"), inputs, torch.float32, autocast=dtype)


def prove_bidirectional_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Through projected maps, and through the pixels' covariance, with a projection behind the pixels' answer.

    The biases that a norm takes out are zeros: their gradients are nothing but rounding.
    """
    channels, height = sizes_on(device)[:2]
    valid = torch.arange(max(REAL_WORDS), device=device)[None] < torch.tensor(REAL_WORDS, device=device)[:, None]
    for width, text_width in ((channels, 2 * channels), (channels // 8, channels // 8)):
        matrices = {"query": (width, width), "key": (width, text_width), "value": (width, text_width)}
        matrices |= {"out": (width, width), "sym_value": (text_width, width), "sym_out": (text_width, text_width)}
        shapes: dict[str, tuple[int, ...]] = {f"{name}_weight": size for name, size in matrices.items()}
        inputs = {name: value / shapes[name][1] ** 0.5 for name, value in drawn(shapes, device, 1.0).items()}
        biases = {"key_bias": (width,), "sym_out_bias": (text_width,), "project_weight": (width, width)}
        inputs |= drawn(biases, device, width**-0.5)
        inputs |= drawn({"pixels": (2, 11 * height, width)}, device, 1.0)
        inputs |= drawn({"words": (2, max(REAL_WORDS), text_width)}, device, 1.0)

        def by(impl: str, silent: Sequence[tuple[str, int]]) -> Callable[..., tuple[Tensor, Tensor]]:
            def attend(pixels: Tensor, words: Tensor, project_weight: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
                zeros = {name: words.new_zeros(size) for name, size in silent}
                weights = BidirectionalAttentionWeights(**given, **zeros)
                return bidirectional_attention(pixels, words, valid, weights, project_weight=project_weight, impl=impl)

            return attend

        silent = [(f"{name}_bias", matrices[name][0]) for name in ("query", "value", "out", "sym_value")]
        hold(by("triton", silent), by("reference", silent), inputs, dtype)
        if dtype is not torch.float32:
            hold(by("triton", silent), by("reference", silent), inputs, torch.float32, autocast=dtype)


def prove_deformable_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Deformable attention of AlignFormer's heads and points over three small maps, samples outside them included.

    No place is so near a line between cells that rounding could move it across, where its gradient jumps.
    """
    sizes, heads, points = ((3, 5), (4, 2), (6, 7)), sizes_on(device).heads, 4
    queries, width = sizes_on(device).rows, sizes_on(device).channels // heads
    generator = torch.Generator().manual_seed(SEED)
    scale = torch.tensor([(columns, rows) for rows, columns in sizes], dtype=torch.float32)
    centres = torch.randint(1, 64, (queries, 2), generator=generator) / 64  # the same in every dtype
    shape = 2, queries, heads, len(sizes), points, 2
    cells = (torch.rand(shape, generator=generator) * (scale[:, None] + 5) - 3).floor()
    places = cells + 0.25 + 0.5 * torch.rand(shape, generator=generator)
    offsets = places + 0.5 - (centres[:, None] * scale)[:, None, :, None]
    pixels = sum(rows * columns for rows, columns in sizes)
    logits = (2, queries, heads, len(sizes) * points)
    inputs = drawn({"value": (2, pixels, heads, width), "logits": logits}, device, 1.0)
    inputs |= {"reference_points": centres.to(device), "offsets": offsets.to(device)}
    fast, published = (partial(multiscale_deformable_attention, sizes=sizes, impl=i) for i in ("triton", "reference"))
    hold(fast, published, inputs, dtype)


def prove_word_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Of AlignFormer's pixels and words of their own width, one sentence shorter; and of words for the smaller tile."""
    dim, rows, heads = sizes_on(device).channels, 3 * sizes_on(device).rows, sizes_on(device).heads
    for words in (17, 9) if sizes_on(device) is ON_A_GPU else (11,):
        width, padding = dim + 8, torch.arange(words, device=device) >= torch.tensor([[words], [5]], device=device)
        shapes: dict[str, tuple[int, ...]] = {"query_weight": (dim, dim), "key_weight": (dim, width)}
        shapes |= {"value_weight": (dim, width), "out_weight": (dim, dim)}
        inputs = drawn(shapes, device, dim**-0.5)
        inputs |= drawn({"in_proj_bias": (3 * dim,), "out_bias": (dim,), "query": (2, rows, dim)}, device, 1.0)
        inputs |= drawn({"key": (2, words, width), "value": (2, words, width)}, device, 1.0)

        def by(impl: str, padding: Tensor = padding) -> Callable[..., Tensor]:
            def attend(query: Tensor, key: Tensor, value: Tensor, **weights: Tensor) -> Tensor:
                own = SeparateAttentionWeights(**weights)
                return word_attention(query, key, value, own, heads, padding, impl=impl)

            return attend

        hold(by("triton"), by("reference"), inputs, dtype)


def prove_region_contrast(device: torch.device, dtype: torch.dtype) -> None:
    """Of the head's map, in both memory layouts, through a 1x1 convolution and its bias."""
    channels, height = sizes_on(device)[:2]
    mask = torch.zeros(3, 1, 4 * height, 44, device=device)
    for row in range(3):
        mask[row, :, : 2 * height, row : 30 + row] = 1
    inputs = drawn({"pointwise_weight": (channels, channels)}, device, channels**-0.5)
    inputs |= drawn({"pointwise_bias": (channels,), "centres": (3, channels)}, device, 1.0)  # the means' length counts
    inputs |= drawn({"features": (3, channels, height, 11)}, device, 1.0)
    fast, published = (partial(region_contrast, mask=mask, temperature=0.5, impl=i) for i in ("triton", "reference"))
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs["features"] = inputs["features"].contiguous(memory_format=layout)
        hold(fast, published, inputs, dtype)


def prove_upsampled_bce(device: torch.device, dtype: torch.dtype) -> None:
    """AlignFormer's maps under masks four times as large, and of a size that is no multiple of theirs."""
    maps, height = 7 if sizes_on(device) is ON_A_GPU else 1, sizes_on(device).height
    logits = drawn({"logits": (2, maps, height, 11)}, device, 3.0)
    for size in ((4 * height, 44), (3 * height + 1, 35)):
        target = drawn({"target": (2, 1, *size)}, device, 1.0)["target"].clamp(0, 1)

        def by(impl: str, target: Tensor = target) -> Callable[..., Tensor]:
            return partial(upsampled_bce_with_logits, target=target, pos_weight=1.1, impl=impl)

        hold(by("triton"), by("reference"), logits, dtype)


def masked_cross_attention(
    sources: Inputs,
    padding_mask: Tensor | None,
    heads: int,
    weights_kept: Tensor,
    branch_kept: Tensor,
    attention_dropout: float,
    dropout: float,
) -> Tensor:
    """The published sub-layer with given dropout masks, True where kept.

    ``sources``: x, text, positions and text_positions as :func:`.cross_attention.cross_attention` has them, and the
    fields of AttentionWeights, by name. ``weights_kept`` (B, N, heads, L) and ``branch_kept`` (B, N, D).
    """
    x, text, positions, text_positions = (sources[name] for name in ("x", "text", "positions", "text_positions"))
    weights = AttentionWeights(*(sources[name] for name in AttentionWeights._fields))
    norm = F.layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias)
    query, key, value = (
        F.linear(source, matrix, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
        for source, matrix, bias in zip(
            (norm + positions, text + text_positions, text),
            weights.in_proj_weight.chunk(3),
            weights.in_proj_bias.chunk(3),
            strict=True,
        )
    )
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if padding_mask is not None:
        scores = scores.masked_fill(padding_mask[:, None, None].to(x.device), float("-inf"))
    attention = scores.softmax(-1) * weights_kept.transpose(1, 2) / (1 - attention_dropout)
    branch = F.linear((attention @ value).transpose(1, 2).flatten(2), weights.out_proj_weight, weights.out_proj_bias)
    branch = F.layer_norm(branch, x.shape[-1:], weights.post_norm_weight, weights.post_norm_bias)
    return x + branch * branch_kept / (1 - dropout)


def _seed(device: torch.device) -> None:
    """Of this device's generator alone: torch.manual_seed would seed the other GPUs too."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(SEED)
    else:
        torch.default_generator.manual_seed(SEED)


def _channels_last(images: Inputs) -> Inputs:
    """As training on a GPU lays them out."""
    return {name: image.contiguous(memory_format=torch.channels_last) for name, image in images.items()}


def _pixels(device: torch.device) -> Inputs:
    """Of the head that scores pixels against a text kernel."""
    channels, height = sizes_on(device)[:2]
    parameters = {"kernel": (2, 1, channels, 3, 3), "bias": (2, 1)}
    parameters |= {"pointwise_weight": (channels, channels, 1, 1), "pointwise_bias": (channels,)}
    features = _channels_last(drawn({"features": (2, channels, height, 11)}, device, 1.0))
    return features | drawn(parameters, device, channels**-0.5)


def _norm(device: torch.device) -> Inputs:
    """Of the pixels' norm: the statistics that evaluation is given, and what it has learnt."""
    channels = (sizes_on(device).channels,)
    found = drawn(dict.fromkeys(("mean", "var", "norm_weight", "norm_bias"), channels), device, 0.2)
    found["var"] = 1 + found["var"].abs()
    found["norm_weight"] += 1
    return found


def _attention_inputs(device: torch.device) -> Inputs:
    dim, rows, words = 2 * sizes_on(device).channels, sizes_on(device).rows, max(REAL_WORDS)
    sources = {"x": (2, rows, dim), "text": (2, words, dim), "positions": (rows, dim), "text_positions": (words, dim)}
    shapes = {"norm_weight": (dim,), "norm_bias": (dim,), "in_proj_weight": (3 * dim, dim), "in_proj_bias": (3 * dim,)}
    shapes |= {"out_proj_weight": (dim, dim), "out_proj_bias": (dim,)}
    shapes |= {"post_norm_weight": (dim,), "post_norm_bias": (dim,)}
    weights = drawn(shapes, device, dim**-0.5)
    weights["norm_weight"] += 1
    weights["post_norm_weight"] += 1
    return drawn(sources, device, 1.0) | weights


PROOFS: dict[str, Callable[[torch.device, torch.dtype], None]] = {
    "text_to_pixel_similarity": prove_similarity,
    "text_to_pixel_contrastive_loss": prove_contrastive,
    "cross_attention": prove_cross_attention,
    "upsample2x_conv3x3": prove_upsample_conv,
    "few_query_attention": prove_few_query_attention,
    "bidirectional_attention": prove_bidirectional_attention,
    "multiscale_deformable_attention": prove_deformable_attention,
    "word_attention": prove_word_attention,
    "region_contrast": prove_region_contrast,
    "upsampled_bce_with_logits": prove_upsampled_bce,
    **MAGNET,
}
"""The proof of every operator that has kernels, by the operator's name."""
