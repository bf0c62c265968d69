"""The one table of problems that the contract of the operators is checked on: sizes and options, by operator.

A problem holds its inputs by name and a call that runs the operator on them by one path. Whoever adds an operator adds
its problems here, and the whole contract of ``ops/test_contract.py`` holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from cross_attention_cases import Case as CrossCase
from similarity_cases import Case as PixelCase
from torch import Tensor

from fastris import ops, reference
from fastris.reference import (
    AttentionWeights,
    BidirectionalAttentionWeights,
    FeedForwardWeights,
    PixelNorm,
    PixelWordWeights,
    SeparateAttentionWeights,
    WordPixelWeights,
)


@dataclass(frozen=True)
class Problem:
    """One operator at one size.

    Attributes:
        operator: its name in ``fastris.operators``.
        label: sizes and options, for the test's name.
        make: the inputs by name, float32 and the same at each call.
        call: a path's name -> the operator as a function of the named inputs.
        samples: the inputs whose first dimension is the batch.
        data: the inputs that no gradient reaches.
        thorough: goes through the whole contract, and not through values and gradients alone. Small, then.
        kernels: small enough for the Triton path under the interpreter.
        gradcheck: small enough for finite differences of every input.
        coupled: samples are compared with one another, so that a value that is not finite reaches all of them.
        few: so few numbers that the largest of their errors in low precision is luck: held in wider dtypes alone.
        exact: the largest error in float64, as a fraction of the truth's scale.
    """

    operator: str
    label: str
    make: Callable[[], dict[str, Tensor]]
    call: Callable[[str], Callable]
    samples: tuple[str, ...]
    data: tuple[str, ...] = ()
    thorough: bool = False
    kernels: bool = False
    gradcheck: bool = False
    coupled: bool = False
    few: bool = False
    exact: float = 1e-12

    def __str__(self) -> str:
        return f"{self.operator}-{self.label}"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(shapes: dict[str, tuple[int, ...]], scale: float = 1.0) -> dict[str, Tensor]:
    """Random tensors, each of its own numbers."""
    return {name: scale * randn(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


GIVEN, OF_BATCH = "given norm", "norm of the batch"
"""Statistics of a norm before the text kernels: given, or the features' own."""


def with_norm(inputs: dict[str, Tensor], norm: str) -> dict[str, Tensor]:
    """The pixels' inputs with a norm's numbers, and features that lie as the kernels norm them while they read."""
    if not norm:
        return inputs
    channels = inputs["features"].shape[1]
    numbers = {"norm_weight": 1 + 0.3 * randn(channels, seed=5), "norm_bias": 0.5 * randn(channels, seed=6)}
    if norm == GIVEN:
        numbers |= {"norm_mean": 0.5 * randn(channels, seed=7), "norm_var": 0.5 + randn(channels, seed=8).abs()}
    return inputs | numbers | {"features": inputs["features"].contiguous(memory_format=torch.channels_last)}


def normed(operator: Callable, **tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    """``operator`` with the norm that its inputs' names give, or without."""
    numbers = {name: tensors.pop(name) for name in list(tensors) if name.startswith("norm_")}
    if not numbers:
        return operator(**tensors)
    weight, bias = numbers["norm_weight"], numbers["norm_bias"]
    if "norm_mean" in numbers:
        norm = PixelNorm(numbers["norm_mean"], numbers["norm_var"], weight, bias, 1e-5, of_batch=False)
    else:
        norm = PixelNorm.by_statistics_of(tensors["features"], weight, bias)
    return operator(**tensors, norm=norm)


def similarity_problem(case: PixelCase, norm: str = "", **uses: bool) -> Problem:
    def call(impl: str) -> Callable:
        return partial(normed, partial(ops.text_to_pixel_similarity, impl=impl))

    samples, data = ("features", "kernel", "bias"), ("norm_mean", "norm_var")
    label = f"{case}-{norm}" if norm else str(case)
    return Problem(
        "text_to_pixel_similarity",
        label,
        lambda: with_norm(case.inputs(), norm),
        call,
        samples,
        data,
        exact=1e-13,
        **uses,
    )


def contrastive_problem(
    case: PixelCase,
    reduction: str,
    size: tuple[int, int] | None = None,
    weighted: bool = False,
    norm: str = "",
    **uses: bool,
) -> Problem:
    """``size`` of the target, the logits' unless given; ``weighted`` adds pos_weight and ignored pixels."""

    def make() -> dict[str, Tensor]:
        inputs = with_norm(case.inputs(), norm) | {"target": case.target(*(size or ()))}
        if weighted:
            inputs |= {"pos_weight": 0.5 + randn(case.queries, 1, 1).abs(), "ignore_mask": case.ignore_mask()}
        return inputs

    def call(impl: str) -> Callable:
        return partial(normed, partial(ops.text_to_pixel_contrastive_loss, impl=impl, reduction=reduction))

    label = f"{case}-{reduction}" + ("-weighted" if weighted else "") + (f"-{norm}" if norm else "")
    samples = "features", "kernel", "bias", "target", "ignore_mask"
    data = "target", "pos_weight", "ignore_mask", "norm_mean", "norm_var"
    return Problem("text_to_pixel_contrastive_loss", label, make, call, samples, data, **uses)


def cross_attention_problem(case: CrossCase, **uses: bool) -> Problem:
    def make() -> dict[str, Tensor]:
        return case.inputs() | ({} if case.padding_mask is None else {"padding_mask": case.padding_mask})

    def call(impl: str) -> Callable:
        def function(
            x: Tensor,
            text: Tensor,
            positions: Tensor,
            text_positions: Tensor,
            padding_mask: Tensor | None = None,
            **weights: Tensor,
        ) -> Tensor:
            sources = x, text, positions, text_positions, padding_mask
            return ops.cross_attention(*sources, AttentionWeights(**weights), case.heads, impl=impl)

        return function

    samples = "x", "text", "padding_mask"
    return Problem("cross_attention", str(case), make, call, samples, ("padding_mask",), **uses)


def self_attention_problem(
    batch: int, rows: int, dim: int, heads: int, *, learnt: bool = False, **uses: bool
) -> Problem:
    """With the published positions, or ``learnt`` ones, which have a gradient."""

    def make() -> dict[str, Tensor]:
        shapes = {"norm_weight": (dim,), "norm_bias": (dim,), "in_proj_weight": (3 * dim, dim)}
        shapes |= {"in_proj_bias": (3 * dim,), "out_proj_weight": (dim, dim), "out_proj_bias": (dim,)}
        inputs = drawn(shapes | {"post_norm_weight": (dim,), "post_norm_bias": (dim,)}, dim**-0.5)
        inputs["norm_weight"] += 1
        inputs["post_norm_weight"] += 1
        inputs["x"] = randn(batch, rows, dim, seed=8)
        return inputs | ({"positions": randn(rows, dim, seed=9)} if learnt else {})

    def call(impl: str) -> Callable:
        def function(x: Tensor, positions: Tensor | None = None, **weights: Tensor) -> Tensor:
            if positions is None:
                positions = reference.sine_positions_1d(*x.shape[1:]).to(x.dtype)
            return ops.self_attention(x, positions, AttentionWeights(**weights), heads, impl=impl)

        return function

    return Problem("self_attention", f"B{batch}-N{rows}-D{dim}-h{heads}", make, call, ("x",), **uses)


def feed_forward_problem(*leading: int, dim: int = 24, hidden: int = 40, **uses: bool) -> Problem:
    def make() -> dict[str, Tensor]:
        shapes = {"norm_weight": (dim,), "norm_bias": (dim,), "up_weight": (hidden, dim), "up_bias": (hidden,)}
        shapes |= {"inner_norm_weight": (hidden,), "inner_norm_bias": (hidden,), "down_weight": (dim, hidden)}
        inputs = drawn(shapes | {"down_bias": (dim,)}, dim**-0.5)
        inputs["norm_weight"] += 1
        inputs["inner_norm_weight"] += 1
        return inputs | {"x": randn(*leading, dim, seed=9)}

    def call(impl: str) -> Callable:
        return lambda x, **weights: ops.feed_forward(x, FeedForwardWeights(**weights), impl=impl)

    label = f"{'x'.join(map(str, leading))}-D{dim}-hidden{hidden}"
    return Problem("feed_forward", label, make, call, ("x",), **uses)


def upsample_problem(batch: int, channels: int, out: int, height: int, width: int, **uses: bool) -> Problem:
    def make() -> dict[str, Tensor]:
        inputs = drawn({"x": (batch, channels, height, width), "weight": (out, channels, 3, 3), "bias": (out,)})
        return inputs | {"weight": inputs["weight"] / (9 * channels) ** 0.5}

    label = f"B{batch}-C{channels}-C'{out}-{height}x{width}"
    return Problem(
        "upsample2x_conv3x3", label, make, lambda impl: partial(ops.upsample2x_conv3x3, impl=impl), ("x",), **uses
    )


def split_maps(maps: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The maps named full0.. and those named half0.., in their order."""
    full, half = ([value for name, value in maps.items() if name.startswith(kind)] for kind in ("full", "half"))
    return full, half


def pointwise_problem(full: tuple[int, ...], half: tuple[int, ...], *, bias: bool = True, **uses: bool) -> Problem:
    """Of maps of these widths, at full and at half the size."""

    def make() -> dict[str, Tensor]:
        shapes = {f"full{i}": (2, channels, 6, 10) for i, channels in enumerate(full)}
        shapes |= {f"half{i}": (2, channels, 3, 5) for i, channels in enumerate(half)}
        channels = sum(full) + sum(half)
        inputs = drawn(shapes | {"weight": (7, channels, 1, 1)} | ({"bias": (7,)} if bias else {}))
        return inputs | {"weight": inputs["weight"] / channels**0.5}

    def call(impl: str) -> Callable:
        def function(weight: Tensor, bias: Tensor | None = None, **maps: Tensor) -> Tensor:
            return ops.pointwise_conv_cat(*split_maps(maps), weight, bias, impl=impl)

        return function

    widths = "+".join(map(str, full)) + "," + "+".join(map(str, half))
    samples = tuple([f"full{i}" for i in range(len(full))] + [f"half{i}" for i in range(len(half))])
    return Problem("pointwise_conv_cat", widths + ("" if bias else "-no bias"), make, call, samples, **uses)


def coord_problem(
    channels: int, size: int, stride: int = 1, padding: int = 0, *, bias: bool = True, **uses: bool
) -> Problem:
    def make() -> dict[str, Tensor]:
        shapes = {"x": (2, channels, 6, 7), "weight": (4, channels + 2, size, size)} | ({"bias": (4,)} if bias else {})
        inputs = drawn(shapes)
        return inputs | {"weight": inputs["weight"] / ((channels + 2) * size**2) ** 0.5}

    def call(impl: str) -> Callable:
        return partial(ops.coord_conv, stride=stride, padding=padding, impl=impl)

    label = f"C{channels}-k{size}-stride{stride}-padding{padding}" + ("" if bias else "-no bias")
    return Problem("coord_conv", label, make, call, ("x",), **uses)


def bidirectional_problem(
    rows: int, dim: int, text_dim: int, real: tuple[int, ...], *, project: int = 0, eps: float = 1e-5, **uses: bool
) -> Problem:
    """Sentences of ``real`` words. The biases that a norm takes out are fixed: their gradients are rounding noise."""
    words, outs = max(real), {"query": dim, "key": dim, "value": dim, "out": dim}
    ins = {"query": dim, "sym_value": dim, "out": dim}
    silent = {f"{part}_bias": outs.get(part, text_dim) for part in ("query", "value", "out", "sym_value")}

    def make() -> dict[str, Tensor]:
        shapes: dict[str, tuple[int, ...]] = {"key_bias": (dim,), "sym_out_bias": (text_dim,)}
        for part in ("query", "key", "value", "out", "sym_value", "sym_out"):
            shapes[f"{part}_weight"] = outs.get(part, text_dim), ins.get(part, text_dim)
        if project:
            shapes["project_weight"] = project, dim
        inputs = {name: value / shapes[name][-1] ** 0.5 for name, value in drawn(shapes).items()}
        inputs |= {"pixels": randn(len(real), rows, dim, seed=20), "words": randn(len(real), words, text_dim, seed=21)}
        return inputs | {"valid": torch.arange(words) < torch.tensor(real)[:, None]}

    def call(impl: str) -> Callable:
        def function(
            pixels: Tensor, words: Tensor, valid: Tensor, project_weight: Tensor | None = None, **weights: Tensor
        ) -> tuple[Tensor, Tensor]:
            like = weights["key_bias"]
            fixed = {name: torch.linspace(-1, 1, size).to(like) for name, size in silent.items()}
            own = BidirectionalAttentionWeights(**weights, **fixed)
            return ops.bidirectional_attention(
                pixels, words, valid, own, project_weight=project_weight, eps=eps, impl=impl
            )

        return function

    label = f"N{rows}-C{dim}-T{text_dim}-real{'+'.join(map(str, real))}" + (f"-project{project}" if project else "")
    samples, data = ("pixels", "words", "valid"), ("valid",)
    return Problem("bidirectional_attention", label, make, call, samples, data, exact=1e-11, **uses)


def few_query_problem(
    batch: int,
    queries: int,
    count: int,
    dim: int,
    width: int,
    heads: int,
    *,
    fixed: bool = False,
    hides: bool = False,
    **uses: bool,
) -> Problem:
    """With learnt positions, or ``fixed`` ones, which have no gradient; ``hides`` some pixels of each sample."""

    def make() -> dict[str, Tensor]:
        matrices = {"query_weight": (dim, dim), "key_weight": (dim, width), "value_weight": (dim, width)}
        inputs = drawn(matrices | {"out_weight": (dim, dim)}, width**-0.5)
        others = {"in_proj_bias": (3 * dim,), "out_bias": (dim,), "query_positions": (queries, dim), "level": (width,)}
        samples = {"query": (batch, queries, dim), "pixels": (batch, count, width), "positions": (count, width)}
        inputs |= {name: randn(*shape, seed=7 + n) for n, (name, shape) in enumerate((others | samples).items())}
        forbidden = (randn(batch, count, seed=31) > 0.4) & (torch.arange(count) > 0)
        return inputs | ({"forbidden": forbidden} if hides else {})

    def call(impl: str) -> Callable:
        def function(
            query: Tensor,
            query_positions: Tensor,
            pixels: Tensor,
            level: Tensor,
            positions: Tensor,
            forbidden: Tensor | None = None,
            **weights: Tensor,
        ) -> Tensor:
            sources = query, query_positions, pixels, level, positions.detach() if fixed else positions
            own = SeparateAttentionWeights(**weights)
            return ops.few_query_attention(*sources, own, heads, forbidden, impl=impl)

        return function

    label = (
        f"B{batch}-Q{queries}-N{count}-D{dim}-K{width}-h{heads}"
        + ("-fixed" if fixed else "")
        + ("-hides" if hides else "")
    )
    data = ("positions",) * fixed + ("forbidden",) * hides
    samples = ("query", "pixels") + ("forbidden",) * hides
    return Problem("few_query_attention", label, make, call, samples, data, **uses)


def region_contrast_problem(
    batch: int, channels: int, height: int, width: int, pointwise: int = 0, band: int = 0, **uses: bool
) -> Problem:
    """Of masks four times as large, two of the samples about one object, the last without any object.

    ``pointwise`` is the width that a 1x1 convolution before makes; 0 is none.
    """

    def make() -> dict[str, Tensor]:
        shapes: dict[str, tuple[int, ...]] = {"features": (batch, channels, height, width)}
        shapes["centres"] = (batch, pointwise or channels)
        if pointwise:
            shapes |= {"pointwise_weight": (pointwise, channels, 1, 1), "pointwise_bias": (pointwise,)}
        mask = torch.zeros(batch, 1, 4 * height, 4 * width, dtype=torch.bool)
        for row in range(max(1, batch - 1)):
            mask[row, :, : 2 * height + row, row : 3 * width] = True
        ids = torch.arange(batch).clamp_min(1)
        known = torch.ones(batch, 1, 4 * height, 4 * width)
        known[:1, :, -4:] = 0
        return drawn(shapes) | {"mask": mask, "known": known.bool(), "image_ids": ids // 2, "ref_ids": ids}

    def call(impl: str) -> Callable:
        return partial(ops.region_contrast, band=band, temperature=0.5, impl=impl)

    label = f"B{batch}-C{channels}-{height}x{width}" + (f"-1x1.{pointwise}" if pointwise else "")
    label += f"-band{band}" if band else ""
    data = "mask", "known", "image_ids", "ref_ids"
    return Problem("region_contrast", label, make, call, ("features", "centres", *data), data, coupled=True, **uses)


def pixel_contrast_problem(batch: int, channels: int, height: int, width: int, **uses: bool) -> Problem:
    """Of masks four times as large; the second object is too small for a cell, the last sample has none.

    Below the first image is a border.
    """

    def make() -> dict[str, Tensor]:
        mask = torch.zeros(batch, 1, 4 * height, 4 * width, dtype=torch.bool)
        for row in range(max(1, batch - 1)):
            mask[row, :, : 2 * height + row + 1, row : 3 * width] = True
        if batch > 2:
            mask[1] = False
            mask[1, :, :2, 3:6] = True
        known = torch.ones_like(mask)
        known[:1, :, -3:] = False
        shapes = {"features": (batch, channels, height, width), "sentence": (batch, channels)}
        return drawn(shapes) | {"mask": mask, "known": known}

    def call(impl: str) -> Callable:
        return partial(ops.pixel_contrast, pixel_temperature=0.5, text_temperature=0.3, impl=impl)

    label, data = f"B{batch}-D{channels}-{height}x{width}", ("mask", "known")
    return Problem("pixel_contrast", label, make, call, ("features", "sentence", *data), data, **uses)


def upsampled_bce_problem(
    batch: int, queries: int, low: tuple[int, int], full: tuple[int, int], pos_weight: float = 1.1, **uses: bool
) -> Problem:
    """Of logits of size ``low`` and soft masks of size ``full``."""

    def make() -> dict[str, Tensor]:
        target = PixelCase(batch, 1, 1, *full).target()
        return {"logits": 3 * randn(batch, queries, *low), "target": target}

    def call(impl: str) -> Callable:
        return partial(ops.upsampled_bce_with_logits, pos_weight=pos_weight, impl=impl)

    label = f"B{batch}-Q{queries}-{low[0]}x{low[1]}-{full[0]}x{full[1]}"
    return Problem("upsampled_bce_with_logits", label, make, call, ("logits", "target"), ("target",), **uses)


def word_problem(
    batch: int, rows: int, dim: int, heads: int, widths: tuple[int, int], real: tuple[int, ...] = (), **uses: bool
) -> Problem:
    """Pixels over 6 words whose keys and values have these ``widths``; ``real`` ones, if not all."""
    words = 6

    def make() -> dict[str, Tensor]:
        shapes = {"query_weight": (dim, dim), "key_weight": (dim, widths[0]), "value_weight": (dim, widths[1])}
        shapes |= {"in_proj_bias": (3 * dim,), "out_weight": (dim, dim), "out_bias": (dim,)}
        inputs = drawn(shapes, dim**-0.5)
        inputs |= drawn({"query": (batch, rows, dim), "key": (batch, words, widths[0])})
        inputs["value"] = randn(batch, words, widths[1], seed=7)
        return inputs | ({"padding_mask": torch.arange(words) >= torch.tensor(real)[:, None]} if real else {})

    def call(impl: str) -> Callable:
        def function(
            query: Tensor, key: Tensor, value: Tensor, padding_mask: Tensor | None = None, **weights: Tensor
        ) -> Tensor:
            parts = SeparateAttentionWeights(**weights)
            return ops.word_attention(query, key, value, parts, heads, padding_mask, impl=impl)

        return function

    label = f"B{batch}-N{rows}-D{dim}-h{heads}-K{widths[0]}-V{widths[1]}" + (f"-real{real}" if real else "")
    samples = "query", "key", "value", "padding_mask"
    return Problem("word_attention", label, make, call, samples, ("padding_mask",), **uses)


def pixel_word_problem(
    rows: int, dim: int, text_dim: int, real: tuple[int, ...], words: int | None = None, **uses: bool
) -> Problem:
    """Sentences of ``real`` words. The keys' bias, which a softmax takes out, is fixed: its gradient is rounding."""
    words = words or max(real)

    def make() -> dict[str, Tensor]:
        shapes: dict[str, tuple[int, ...]] = {}
        for part in ("project", "query", "key", "value", "out", "mixed"):
            shapes[f"{part}_weight"] = dim, text_dim if part in ("key", "value") else dim
            if part != "key":
                shapes[f"{part}_bias"] = (dim,)
        shapes |= {f"{part}_norm_{kind}": (dim,) for part in ("query", "out") for kind in ("weight", "bias")}
        inputs = {name: value / shapes[name][-1] ** 0.5 for name, value in drawn(shapes).items()}
        inputs |= {name: 1 + inputs[name] for name in ("query_norm_weight", "out_norm_weight")}
        inputs |= {"pixels": randn(len(real), rows, dim, seed=30), "words": randn(len(real), words, text_dim, seed=31)}
        return inputs | {"valid": torch.arange(words) < torch.tensor(real)[:, None]}

    def call(impl: str) -> Callable:
        def function(pixels: Tensor, words: Tensor, valid: Tensor, **weights: Tensor) -> Tensor:
            fixed = torch.linspace(-1, 1, dim).to(weights["query_bias"])
            own = PixelWordWeights(**weights, key_bias=fixed)
            return ops.pixel_word_attention(pixels, words, valid, own, impl=impl)

        return function

    label = f"N{rows}-C{dim}-T{text_dim}-real{'+'.join(map(str, real))}-of{words}"
    return Problem("pixel_word_attention", label, make, call, ("pixels", "words", "valid"), ("valid",), **uses)


def word_pixel_problem(
    rows: int,
    dim: int,
    text_dim: int,
    real: tuple[int, ...],
    rule: str,
    words: int | None = None,
    scale: float = 1.0,
    **uses: bool,
) -> Problem:
    """Sentences of ``real`` words. The biases that a norm takes out are fixed: their gradients are rounding noise.

    A small ``scale`` of what is normed lets the norms' eps count, without which they take scales out, too.
    """
    words, silent = words or max(real), ("key_bias", "value_bias", "out_bias")

    def make() -> dict[str, Tensor]:
        shapes: dict[str, tuple[int, ...]] = {f"{part}_bias": (text_dim,) for part in ("project", "query", "mixed")}
        for part in ("project", "query", "key", "value", "out", "mixed"):
            shapes[f"{part}_weight"] = text_dim, dim if part in ("key", "value") else text_dim
        inputs = {name: value / shapes[name][-1] ** 0.5 for name, value in drawn(shapes).items()}
        inputs |= {f"{part}_weight": scale * inputs[f"{part}_weight"] for part in ("key", "value", "out")}
        inputs |= {"words": randn(len(real), words, text_dim, seed=41), "pixels": randn(len(real), rows, dim, seed=40)}
        return inputs | {"valid": torch.arange(words) < torch.tensor(real)[:, None]}

    def call(impl: str) -> Callable:
        def function(words: Tensor, pixels: Tensor, valid: Tensor, **weights: Tensor) -> Tensor:
            fixed = {name: torch.linspace(-1, 1, text_dim).to(weights["query_bias"]) for name in silent}
            own = WordPixelWeights(**weights, **fixed)
            return ops.word_pixel_attention(words, pixels, valid, own, rule, impl=impl)

        return function

    label = f"N{rows}-C{dim}-T{text_dim}-real{'+'.join(map(str, real))}-of{words}-{rule}"
    return Problem("word_pixel_attention", label, make, call, ("words", "pixels", "valid"), ("valid",), **uses)


def deformable_problem(
    batch: int, queries: int, heads: int, width: int, sizes: tuple[tuple[int, int], ...], points: int, **uses: bool
) -> Problem:
    """Samples in and around maps of these sizes, none so near a line between cells that rounding could move it over."""

    def make() -> dict[str, Tensor]:
        levels, generator = len(sizes), torch.Generator().manual_seed(1)
        shape = batch, queries, heads, levels, points, 2
        scale = torch.tensor([(right, bottom) for bottom, right in sizes], dtype=torch.float32)
        centres = torch.randint(1, 64, (queries, 2), generator=generator) / 64  # the same in all dtypes
        cells = (torch.rand(shape, generator=generator) * (scale[:, None] + 5) - 3).floor()
        places = cells + 0.25 + 0.5 * torch.rand(shape, generator=generator)
        places[:, 0, :, :, 0] = 0.25  # somebody reads every map's first pixel
        offsets = places + 0.5 - (centres[:, None] * scale)[:, None, :, None]
        pixels = sum(height * width for height, width in sizes)
        inputs = drawn({"value": (batch, pixels, heads, width), "logits": (batch, queries, heads, levels * points)})
        return inputs | {"reference_points": centres, "offsets": offsets}

    def call(impl: str) -> Callable:
        return partial(ops.multiscale_deformable_attention, sizes=sizes, impl=impl)

    maps = "+".join(f"{height}x{width}" for height, width in sizes)
    label = f"B{batch}-Q{queries}-h{heads}x{width}-{maps}-P{points}"
    samples = "value", "offsets", "logits"
    return Problem("multiscale_deformable_attention", label, make, call, samples, **uses)


def every_problem() -> Iterator[Problem]:
    small, whole = {"gradcheck": True, "few": True}, {"thorough": True, "kernels": True}
    # single pixels, lines, odd and prime sizes, every kernel's size, one and many queries, CRIS's shapes when small
    yield similarity_problem(PixelCase(2, 2, 4, 5, 4, pointwise=3), **whole)
    yield similarity_problem(PixelCase(2, 1, 3, 3, 4, pointwise=2), **small)
    yield similarity_problem(PixelCase(1, 2, 2, 2, 3, size=5), **small)
    yield similarity_problem(PixelCase(1, 1, 1, 1, 1), kernels=True, few=True)
    yield similarity_problem(PixelCase(2, 1, 5, 7, 5), kernels=True)
    yield similarity_problem(PixelCase(1, 4, 3, 5, 6), kernels=True)
    yield similarity_problem(PixelCase(1, 1, 70, 9, 15, pointwise=3), kernels=True)  # two tiles of channels, of pixels
    yield similarity_problem(PixelCase(1, 1, 260, 9, 5, pointwise=3), kernels=True)  # and of wide tiles
    yield similarity_problem(PixelCase(2, 1, 3, 17, 16, size=5, pointwise=2), kernels=True)  # two partial sums
    yield similarity_problem(PixelCase(2, 2, 3, 1, 2, size=5, pointwise=3), kernels=True)
    yield similarity_problem(PixelCase(1, 2, 5, 2, 1, size=1, pointwise=2), kernels=True)
    yield similarity_problem(PixelCase(2, 25, 12, 8, 8))
    yield similarity_problem(PixelCase(3, 2, 31, 13, 9, size=5, pointwise=24))
    yield similarity_problem(PixelCase(1, 5, 20, 11, 17, size=1))
    yield similarity_problem(PixelCase(1, 1, 256, 13, 13, pointwise=256))

    # behind a norm: kernels apply it to multiples of 16 channels, one text kernel each; two tiles, two partial sums
    yield similarity_problem(PixelCase(2, 1, 16, 3, 4, pointwise=3), GIVEN, **whole)
    yield similarity_problem(PixelCase(2, 1, 3, 3, 4, pointwise=2), GIVEN, **small)
    yield similarity_problem(PixelCase(2, 1, 3, 3, 4, pointwise=2), OF_BATCH, **small)
    yield similarity_problem(PixelCase(2, 1, 80, 17, 16), OF_BATCH, kernels=True)
    yield similarity_problem(PixelCase(2, 2, 16, 3, 4), OF_BATCH, kernels=True)  # two text kernels: applied first

    case = PixelCase(2, 2, 4, 5, 4, pointwise=3)
    yield contrastive_problem(case, "mean", (9, 8), **whole)
    yield contrastive_problem(case, "none", weighted=True, **whole)
    yield contrastive_problem(case, "sum", (10, 8), weighted=True, kernels=True)
    yield contrastive_problem(PixelCase(2, 1, 3, 3, 4, pointwise=2), "none", weighted=True, **small)
    yield contrastive_problem(PixelCase(2, 1, 3, 3, 4, pointwise=2), "mean", (5, 7), **small)
    yield contrastive_problem(PixelCase(2, 1, 16, 5, 4), "none", weighted=True, norm=OF_BATCH, kernels=True)
    yield contrastive_problem(PixelCase(3, 1, 32, 4, 5, pointwise=3), "mean", (9, 8), norm=GIVEN, kernels=True)
    yield contrastive_problem(PixelCase(1, 2, 3, 19, 14, size=5, pointwise=2), "mean", (9, 8), kernels=True)
    yield contrastive_problem(PixelCase(1, 2, 5, 6, 4, size=1), "none", (9, 8), kernels=True)
    for reduction in ("mean", "sum", "none"):
        yield contrastive_problem(PixelCase(3, 2, 31, 13, 9, size=5, pointwise=24), reduction)
    yield contrastive_problem(PixelCase(2, 1, 16, 26, 26, pointwise=16), "mean", (416, 416))

    yield cross_attention_problem(CrossCase(2, 3, 4, 32, 2, real=(4, 2)), **whole)
    yield cross_attention_problem(CrossCase(2, 13, 9, 64, 8, real=(9, 3)), thorough=True)  # projected, not absorbed
    yield cross_attention_problem(CrossCase(2, 3, 3, 8, 2, real=(3, 2)), **small)
    for sizes, real in (
        ((1, 1, 1, 32, 1), ()),
        ((2, 33, 5, 32, 1), (5, 1)),
        ((2, 5, 9, 96, 3), ()),
        ((1, 7, 17, 288, 9), (13,)),
        ((1, 3, 77, 192, 2), (50,)),
    ):
        yield cross_attention_problem(CrossCase(*sizes, real=real), kernels=True)
    yield cross_attention_problem(CrossCase(3, 36, 9, 128, 4, real=(9, 4, 7)))
    yield cross_attention_problem(CrossCase(2, 11, 3, 320, 5))

    yield self_attention_problem(2, 5, 32, 4, learnt=True, thorough=True)
    yield self_attention_problem(2, 3, 4, 2, learnt=True, **small)
    yield self_attention_problem(1, 1, 32, 4)
    yield self_attention_problem(3, 36, 32, 4)

    yield feed_forward_problem(7, 3, thorough=True)
    yield feed_forward_problem(3, 2, dim=6, hidden=10, **small)
    yield feed_forward_problem(5)
    yield feed_forward_problem(1, 1)

    yield upsample_problem(2, 9, 5, 3, 2, **whole)
    yield upsample_problem(2, 2, 2, 3, 2, **small)
    for sizes in ((1, 8, 8, 1, 1), (2, 5, 3, 1, 4), (1, 3, 7, 5, 1), (1, 8, 16, 4, 3), (1, 4, 48, 5, 4)):
        yield upsample_problem(*sizes, kernels=True)
    yield upsample_problem(3, 7, 5, 5, 2)
    yield upsample_problem(2, 16, 11, 13, 7)
    yield upsample_problem(1, 24, 16, 26, 26)

    yield pointwise_problem((4, 4), (4,), thorough=True)
    yield pointwise_problem((2, 3), (3, 2), **small)
    for widths in (((32,), (32,)), ((5, 4), ()), ((), (3, 5)), ((1, 2, 3), (4, 5))):  # the neck's uses, then others
        yield pointwise_problem(*widths)
    yield pointwise_problem((4,), (6,), bias=False)

    yield coord_problem(5, 3, padding=1, thorough=True)
    yield coord_problem(2, 3, padding=1, **small)
    for size, stride, padding in ((1, 1, 0), (2, 3, 1), (3, 2, 0), (5, 2, 3)):
        yield coord_problem(5, size, stride, padding)
    yield coord_problem(32, 3, padding=1, bias=False)

    yield bidirectional_problem(96, 16, 24, (5, 3), project=6, **whole)  # through the covariance
    yield bidirectional_problem(7, 16, 24, (3, 4), project=8, **whole)  # through the projected maps
    yield bidirectional_problem(7, 2, 3, (3, 2), project=2, eps=0.1, **small)
    yield bidirectional_problem(3, 4, 3, (2, 3), eps=0.1, **small)
    yield bidirectional_problem(169, 32, 24, (4, 9, 7))
    yield bidirectional_problem(13, 40, 12, (20,))
    yield few_query_problem(2, 2, 9, 16, 6, 4, **whole)
    yield few_query_problem(2, 2, 3, 6, 3, 2, **small)
    yield few_query_problem(2, 1, 20, 24, 24, 4, hides=True, thorough=True)
    for sizes in ((1, 1, 1, 8, 4, 2), (2, 1, 37, 24, 16, 8), (1, 8, 140, 24, 40, 2)):
        yield few_query_problem(*sizes, kernels=True)
    yield few_query_problem(3, 8, 50, 64, 20, 4)  # more rows than a kernel's tile has
    yield few_query_problem(2, 4, 11, 16, 6, 4)  # so many queries that nothing is absorbed
    yield few_query_problem(2, 1, 225, 96, 32, 8, fixed=True, kernels=True)

    yield region_contrast_problem(4, 5, 6, 7, pointwise=6, **whole)
    yield region_contrast_problem(3, 3, 4, 4, pointwise=2, **small)
    yield region_contrast_problem(3, 8, 9, 11, band=1, kernels=True)
    yield region_contrast_problem(1, 4, 5, 3)
    yield region_contrast_problem(2, 37, 33, 17, kernels=True)  # two tiles of channels, two chunks of pixels
    yield region_contrast_problem(2, 3, 1, 1)
    yield region_contrast_problem(5, 20, 13, 12, pointwise=16)

    yield pixel_contrast_problem(4, 5, 6, 7, **whole)
    yield pixel_contrast_problem(3, 3, 4, 4, **small)
    yield pixel_contrast_problem(1, 4, 5, 3)
    yield pixel_contrast_problem(5, 20, 13, 12)

    yield upsampled_bce_problem(3, 2, (3, 5), (12, 20), thorough=True)
    yield upsampled_bce_problem(2, 1, (2, 3), (8, 11), **whole)
    yield upsampled_bce_problem(2, 1, (2, 3), (5, 4), **small)
    yield upsampled_bce_problem(1, 1, (1, 1), (1, 1), pos_weight=1.0, kernels=True)
    yield upsampled_bce_problem(2, 3, (1, 4), (7, 9), kernels=True)
    yield upsampled_bce_problem(1, 7, (13, 11), (37, 29))
    yield upsampled_bce_problem(1, 1, (13, 11), (37, 29), kernels=True)
    yield upsampled_bce_problem(2, 2, (9, 14), (4, 14), kernels=True)  # down, and as it is
    yield upsampled_bce_problem(1, 1, (2, 1), (3, 40), kernels=True)  # in several steps
    yield upsampled_bce_problem(1, 7, (30, 60), (120, 240))  # several tiles
    yield word_problem(2, 5, 32, 4, (12, 7), real=(6, 2), **whole)
    yield word_problem(2, 5, 16, 4, (12, 7), real=(5, 2), thorough=True)  # projected, not absorbed
    yield word_problem(2, 3, 8, 1, (3, 4), real=(3, 2), **small)
    yield word_problem(1, 1, 64, 2, (8, 5), kernels=True)
    yield word_problem(2, 67, 40, 5, (9, 7), real=(6, 0), kernels=True)  # tiles of pixels, and a sample without words
    yield word_problem(3, 17, 64, 8, (9, 96), real=(6, 1, 4))

    yield pixel_word_problem(40, 16, 12, (5, 3), **whole)  # the query's norm through its weights
    yield pixel_word_problem(7, 16, 12, (2, 3), 4, thorough=True)  # and through the queries
    yield pixel_word_problem(7, 4, 3, (3, 2), **small)
    yield pixel_word_problem(3, 5, 3, (3, 2), **small)
    yield pixel_word_problem(70, 24, 40, (20, 1, 0, 9), kernels=True)
    yield pixel_word_problem(1, 32, 8, (3, 1), few=True)

    yield word_pixel_problem(60, 12, 16, (5, 3), "masked", **whole)  # through the covariance
    yield word_pixel_problem(11, 24, 16, (5, 8), "intended", 9, thorough=True)  # through the projected maps
    yield word_pixel_problem(9, 2, 3, (3, 4), "intended", 4, **small)
    yield word_pixel_problem(3, 4, 3, (3, 4), "masked", **small)
    yield word_pixel_problem(130, 24, 40, (20, 2, 9), "intended", kernels=True)
    yield word_pixel_problem(33, 40, 24, (2, 17), "masked")

    yield deformable_problem(2, 5, 2, 4, ((2, 4), (1, 3)), 2, **whole)
    yield deformable_problem(2, 2, 2, 2, ((2, 3), (1, 2)), 2, **small)
    yield deformable_problem(1, 1, 1, 1, ((1, 1),), 1, kernels=True, few=True)
    yield deformable_problem(1, 3, 2, 5, ((1, 7),), 8, kernels=True)
    yield deformable_problem(1, 17, 1, 3, ((2, 2), (1, 3), (3, 2), (4, 1)), 2, kernels=True)  # two tiles of queries
    yield deformable_problem(2, 5, 4, 8, ((2, 2), (3, 4), (7, 5)), 4)
    yield deformable_problem(3, 13, 2, 16, ((2, 3), (4, 5), (6, 7), (8, 9)), 4)
    yield bidirectional_problem(169, 24, 24, (4, 9, 7))
    yield bidirectional_problem(140, 20, 24, (20, 17), kernels=True)
    yield bidirectional_problem(65, 66, 70, (4,), kernels=True)


PROBLEMS = tuple(every_problem())
"""Every problem of every operator."""

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else reversed_in_memory(x)
    ),
    "dimensions reversed": lambda x: reversed_in_memory(x),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second of a wider tensor": lambda x: every_second(x),
    "slice of the channels": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}
"""Name -> the same numbers in another memory layout."""


def reversed_in_memory(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def every_second(x: Tensor) -> Tensor:
    wide = x.new_zeros([2 * size for size in x.shape])
    view = wide[(slice(None, None, 2),) * x.ndim]
    return view.copy_(x)


def poison(monkeypatch) -> None:
    """Every fresh tensor starts as NaN, so that an element that nothing writes is seen."""

    def filling(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args, **kwargs) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return filled

    monkeypatch.setattr(torch, "empty", filling(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filling(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filling(torch.Tensor.new_empty))
