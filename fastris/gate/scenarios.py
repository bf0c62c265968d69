"""What is launched: the model's own parts and the operators, run in recording mode on a CPU.

Nothing is computed by a kernel here, but everything around it runs as it would on a GPU: the operators' algebra, their
registration, autograd, autocast. So the gate's list cannot drift from what is launched. Sizes are CRIS's own for a
picture of 416 x 416 pixels and 17 words, or AlignFormer's for one of 480 x 480, at a batch of one or two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastris import dispatch, reference
from fastris.inference.folding import for_inference
from fastris.kernels.configs import kernel_name, pretended_class, replaced, watched
from fastris.kernels.cross_attention import dropout_masks
from fastris.kernels.launch import Launch, recording
from fastris.models.cris.config import CRISConfig
from fastris.models.cris.decoder import TransformerDecoder
from fastris.models.cris.projector import Projector
from fastris.nn.query_decoder import QueryDecoder
from fastris.ops.bidirectional_attention import bidirectional_attention
from fastris.ops.contrastive import text_to_pixel_contrastive_loss
from fastris.ops.cross_attention import cross_attention
from fastris.ops.few_query_attention import few_query_attention
from fastris.ops.multiscale_deformable_attention import multiscale_deformable_attention
from fastris.ops.pixel_contrast import pixel_contrast
from fastris.ops.region_contrast import region_contrast
from fastris.ops.similarity import text_to_pixel_similarity
from fastris.ops.upsample_conv import upsample2x_conv3x3, upsample2x_conv3x3_stats
from fastris.ops.upsampled_bce import upsampled_bce_with_logits
from fastris.ops.word_attention import word_attention
from fastris.reference import AttentionWeights, BidirectionalAttentionWeights, PixelNorm, SeparateAttentionWeights

from . import magnet_scenarios as magnet
from .stand_ins import CudaAutocast, HollowProducts

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Scenario:
    """One way to use the library: ``run(dtype)`` launches what it launches, for each of ``dtypes``.

    ``classes`` are the shared-memory classes of cards that it concerns; in the dtypes ``tuned`` the alternatives of the
    launch tables are built for it, too. What is ``rare`` is not built for a card whose code is another's: builds.py.
    """

    name: str
    run: Callable[[torch.dtype], None]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    classes: tuple[str, ...] = ("large", "small", "tiny")
    tuned: tuple[torch.dtype, ...] = ()
    rare: bool = False


def launches(scenario: Scenario, shared: str, dtype: torch.dtype) -> list[Launch]:
    """What ``scenario`` launches in ``dtype`` on a card of class ``shared``, in order."""
    torch.manual_seed(0)
    with ExitStack() as stack:
        for context in (pretended_class(shared), dispatch.every_device_has_triton(), dispatch.use_impl("triton")):
            stack.enter_context(context)
        stack.enter_context(CudaAutocast())
        stack.enter_context(HollowProducts())
        found = stack.enter_context(recording())
        scenario.run(dtype)
    return found


@contextmanager
def _tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _head(preset: str, dtype: torch.dtype, train: bool, converted: bool = False, folded: bool = False) -> None:
    """Decoder and projector of a model: one step of training with the loss, or an evaluation.

    Half precision is autocast's, or, ``converted``, that of the weights. ``folded``, as `fastris eval` has it, no norm
    is left in the projector. No kernel is in the feed-forward sub-layer.
    """
    config = CRISConfig.preset(preset)
    side, batch = config.input_size // 16, 2 if train else 1
    decoder = TransformerDecoder(2, config.vis_dim, config.num_head, 64, config.dropout)
    projector = Projector(config.word_dim, config.vis_dim // 2)
    weights = dtype if converted else torch.float32
    for module in (decoder, projector):
        module.train(train).requires_grad_(train).to(weights)
    projector = for_inference(projector) if folded else projector
    # What the neck gives away: a convolution's answer. Words and sentences come from matrix products.
    fused = torch.zeros(batch, config.vis_dim, side, side, dtype=dtype, requires_grad=train)
    words = torch.zeros(batch, config.word_len, config.vis_dim, dtype=dtype, requires_grad=train)
    state = torch.zeros(batch, config.word_dim, dtype=dtype, requires_grad=train)
    padding = torch.arange(config.word_len).expand(batch, -1) > 11
    with torch.autocast("cpu", dtype, enabled=dtype in HALF and not converted), torch.set_grad_enabled(train):
        decoded = decoder(fused, words, padding).reshape(fused.shape)
        if not train:
            projector(decoded, state)
            return
        mask = torch.zeros(batch, 1, config.input_size, config.input_size)
        loss, _ = projector(decoded, state, mask)
    loss.backward()


def _train(preset: str) -> Callable[[torch.dtype], None]:
    return lambda dtype: _head(preset, dtype, train=True)


def _evaluate(preset: str, converted: bool = False, folded: bool = False) -> Callable[[torch.dtype], None]:
    return lambda dtype: _head(preset, dtype, train=False, converted=converted, folded=folded)


def _with_tf32(run: Callable[[torch.dtype], None]) -> Callable[[torch.dtype], None]:
    def run_with_tf32(dtype: torch.dtype) -> None:
        with _tf32():
            run(dtype)

    return run_with_tf32


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _score(
    queries: int, size: int, channels: int, side: tuple[int, int], layout: torch.memory_format = torch.contiguous_format
) -> Callable[[torch.dtype], None]:
    """Similarity and loss of features, without the model: the largest text kernels, several, odd maps."""

    def run(dtype: torch.dtype) -> None:
        features = torch.zeros(2, channels, *side, dtype=dtype).to(memory_format=layout).requires_grad_()
        kernel, bias = _leaf(2, queries, channels, size, size, dtype=dtype), _leaf(2, queries, dtype=dtype)
        text_to_pixel_similarity(features, kernel, bias).sum().backward()
        text_to_pixel_contrastive_loss(features, kernel, torch.zeros(2, queries, *side), bias)[0].backward()

    return run


def _frozen_norm(dtype: torch.dtype) -> None:
    """A head that is trained behind a norm by given statistics, with all gradients, where its map's side is odd."""
    features, kernel = _leaf(2, 256, 13, 15, dtype=dtype), _leaf(2, 1, 256, 3, 3, dtype=dtype)
    mean, var, weight, bias = torch.zeros(256), torch.ones(256), _leaf(256, dtype=dtype), _leaf(256, dtype=dtype)
    features = features.contiguous(memory_format=torch.channels_last)
    norm = PixelNorm(mean, var, weight, bias, 1e-5, of_batch=False)
    text_to_pixel_similarity(features, kernel, norm=norm).sum().backward()


def _sentences(words: int, dim: int) -> Callable[[torch.dtype], None]:
    """Learned positions, and weights, pixels and products of one dtype, with dropout and no padding."""

    def run(dtype: torch.dtype) -> None:
        rows, heads = 13 * 13, 8

        def vector(width: int = dim) -> Tensor:
            return _leaf(width, dtype=dtype)

        projections = _leaf(3 * dim, dim, dtype=dtype), vector(3 * dim), _leaf(dim, dim, dtype=dtype)
        weights = AttentionWeights(vector(), vector(), *projections, vector(), vector(), vector())
        x, text = _leaf(2, rows, dim, dtype=dtype), _leaf(2, words, dim, dtype=dtype)
        tables = _leaf(rows, dim, dtype=dtype), _leaf(words, dim, dtype=dtype)
        answer = cross_attention(
            x, text, *tables, None, weights, heads, dropout=0.1, attention_dropout=0.1, training=True
        )
        answer.sum().backward()

    return run


def _fuse(width: int, text_width: int, side: int, words: int) -> Callable[[torch.dtype], None]:
    """Bidirectional attention of AlignFormer's stages and CRIS's neck, under autocast as in training."""

    def run(dtype: torch.dtype) -> None:
        sizes = [(width, width), (width, text_width), (width, text_width), (width, width), (text_width, width)]
        sizes.append((text_width, text_width))
        own = [each for rows, columns in sizes for each in (_leaf(rows, columns, dtype=F32), _leaf(rows, dtype=F32))]
        pixels = _leaf(1, side * side, width, dtype=dtype if dtype in HALF else F32)
        sources = pixels, _leaf(1, words, text_width, dtype=F32), torch.ones(1, words)
        with torch.autocast("cpu", dtype, enabled=dtype in HALF):
            seen, heard = bidirectional_attention(*sources, BidirectionalAttentionWeights(*own))
        (seen.sum() + heard.sum()).backward()

    return run


def _deformable(points: int, *sides: int, train: bool = True) -> Callable[[torch.dtype], None]:
    """AlignFormer's attention of the maps' pixels, without its projections, with these ``sides``, of one dtype."""

    def run(dtype: torch.dtype) -> None:
        sizes = [(side, side) for side in sides]
        places, levels = reference.pixel_centres(sizes), len(sides)
        value = _leaf(1, len(places), 8, 32, dtype=dtype)
        offsets = _leaf(1, len(places), 8, levels, points, 2, dtype=dtype)
        logits = _leaf(1, len(places), 8, levels * points, dtype=dtype)
        with torch.set_grad_enabled(train):
            answer = multiscale_deformable_attention(value, sizes, places, offsets, logits)
        if train:
            answer.sum().backward()

    return run


def _listen(dim: int, heads: int, words: int, train: bool = True) -> Callable[[torch.dtype], None]:
    """The pixels of AlignFormer's decoder, of a picture of 240 x 240, attend to words; all of one dtype."""

    def run(dtype: torch.dtype) -> None:
        shapes = (dim, dim), (dim, 768), (dim, 768), (3 * dim,), (dim, dim), (dim,)
        weights = SeparateAttentionWeights(*(_leaf(*shape, dtype=dtype) for shape in shapes))
        query, key = _leaf(2, 21 * 15 * 15, dim, dtype=dtype), _leaf(2, words, 768, dtype=dtype)
        padding = torch.arange(words).expand(2, -1) >= 11
        with torch.set_grad_enabled(train):
            answer = word_attention(query, key, key.detach(), weights, heads, padding)
        if train:
            answer.sum().backward()

    return run


def _losses(queries: int, low: tuple[int, int], full: tuple[int, int]) -> Callable[[torch.dtype], None]:
    """AlignFormer's losses and MagNet's of maps of size ``low`` under masks of size ``full``, in both layouts."""

    def run(dtype: torch.dtype) -> None:
        mask = torch.zeros(2, 1, *full)
        upsampled_bce_with_logits(_leaf(2, queries, *low, dtype=dtype), mask).backward()
        centres, weight = torch.zeros(2, 256, dtype=dtype), torch.zeros(256, 256, dtype=dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            features = torch.zeros(2, 256, *low, dtype=dtype).to(memory_format=layout).requires_grad_()
            region_contrast(features, centres, mask, pointwise_weight=weight).backward()
            pixel_contrast(features, centres, mask).backward()

    return run


def _masks(dtype: torch.dtype) -> None:
    """The kernel that tests read dropout masks with."""
    dropout_masks(torch.zeros(2, dtype=torch.int64), (1, 8, 17, 512), 26 * 26, 0.1, 0.1)


def _upsample(channels: int) -> Callable[[torch.dtype], None]:
    """Statistics for the norm behind it, and channels that are no multiple of 16."""

    def run(dtype: torch.dtype) -> None:
        x, weight, bias = (
            _leaf(2, 64, 13, 15, dtype=dtype),
            _leaf(channels, 64, 3, 3, dtype=dtype),
            _leaf(channels, dtype=dtype),
        )
        upsample2x_conv3x3(x, weight, bias).sum().backward()
        upsample2x_conv3x3(x, weight).sum().backward()
        output, mean, var = upsample2x_conv3x3_stats(x, weight, bias)
        (output.sum() + mean.sum() + var.sum()).backward()

    return run


def _centre(train: bool) -> Callable[[torch.dtype], None]:
    """A layer of AlignFormer's centre embedding at each of its maps for pictures of 480 x 480, after a float32 decoder.

    Half precision is autocast's.
    """

    def run(dtype: torch.dtype) -> None:
        decoder = QueryDecoder(768, 256, layers=3, hidden=64).requires_grad_(train)
        maps = [torch.zeros(2, 256, side, side).requires_grad_(train) for side in (15, 30, 60)]
        with torch.autocast("cpu", dtype, enabled=dtype in HALF), torch.set_grad_enabled(train):
            centres = decoder(torch.zeros(2, 1, 768), maps)
        if train:
            centres[-1].sum().backward()

    return run


def _few_queries(width: int, count: int) -> Callable[[torch.dtype], None]:
    """Two queries of learnt positions over frozen pixels that lie channel after channel, of an odd number."""

    def run(dtype: torch.dtype) -> None:
        pixels = torch.zeros(2, width, count, dtype=dtype).mT
        shapes = (width, width), (width, width), (width, width), (3 * width,), (width, width), (width,)
        weights = SeparateAttentionWeights(*(_leaf(*shape, dtype=dtype) for shape in shapes))
        query, place = _leaf(2, 2, width, dtype=dtype), _leaf(2, width, dtype=dtype)
        table = _leaf(count, width, dtype=dtype)
        for each in (pixels, pixels.clone().requires_grad_()):
            level = _leaf(width, dtype=dtype)
            few_query_attention(query, place, each, level, table, weights, 8).sum().backward()

    return run


F32 = torch.float32
FLOAT32, FLOAT16, BFLOAT16 = ((dtype,) for dtype in DTYPES)
TWO = FLOAT32 + BFLOAT16
# What comes first names a build that several of them share. float16 and bfloat16 share their tiles: what is rare is
# built for one of them.
SCENARIOS = (
    Scenario("train", _train("cris_r50"), tuned=BFLOAT16),
    Scenario("train R101", _train("cris_r101")),
    Scenario("train TF32", _with_tf32(_train("cris_r50")), FLOAT32, ("large", "small")),
    Scenario("train AlignFormer", _centre(True)),
    Scenario("eval", _evaluate("cris_r50")),
    Scenario("eval folded", _evaluate("cris_r50", folded=True)),
    Scenario("eval R101", _evaluate("cris_r101")),
    Scenario("eval AlignFormer", _centre(False)),
    Scenario("eval, half weights", _evaluate("cris_r50", converted=True), FLOAT16),
    Scenario("train pixel decoder", _deformable(4, 15, 30, 60), tuned=BFLOAT16),
    Scenario("eval pixel decoder", _deformable(4, 15, 30, 60, train=False)),
    Scenario("train words", _listen(256, 8, 20), tuned=BFLOAT16),
    Scenario("eval words", _listen(256, 8, 20, train=False)),
    Scenario("train words TF32", _with_tf32(_listen(256, 8, 20)), FLOAT32, ("large", "small")),
    Scenario("few words", _listen(256, 8, 9), TWO, rare=True),
    Scenario("few words, narrow", _listen(70, 5, 9), TWO, rare=True),
    Scenario("train loss", _losses(7, (120, 120), (480, 480)), tuned=BFLOAT16),
    Scenario("4 levels", _deformable(4, 8, 15, 30, 60), TWO, rare=True),
    Scenario("demo", _train("tiny"), BFLOAT16, rare=True),
    Scenario("demo eval", _evaluate("tiny"), BFLOAT16, rare=True),
    Scenario("NCHW", _score(1, 3, 256, (104, 104)), TWO, rare=True),
    Scenario("5x5 kernel", _score(1, 5, 256, (104, 104)), TWO, rare=True),
    Scenario("3 kernels", _score(3, 3, 256, (104, 104)), BFLOAT16, rare=True),
    Scenario("centre", _score(7, 3, 256, (104, 104), torch.channels_last), TWO, rare=True),
    Scenario("odd map", _score(1, 3, 70, (13, 15)), FLOAT32, rare=True),
    Scenario("odd map, 5x5 kernel", _score(1, 5, 70, (13, 15)), TWO, rare=True),
    Scenario("frozen norm", _frozen_norm, TWO, ("large", "small"), rare=True),
    Scenario("16 words", _sentences(16, 512), TWO, rare=True),
    Scenario("77 words", _sentences(77, 1024), TWO, rare=True),
    Scenario("statistics", _upsample(64), TWO, rare=True),
    Scenario("odd width", _upsample(70), TWO, rare=True),
    Scenario("few queries", _few_queries(256, 225), TWO, rare=True),
    Scenario("few queries, wide", _few_queries(512, 169), BFLOAT16, rare=True),
    Scenario("few queries, narrow", _few_queries(40, 169), TWO, rare=True),
    Scenario("stage 1", _fuse(128, 768, 120, 20), tuned=BFLOAT16),
    Scenario("stage 4", _fuse(1024, 768, 15, 20)),
    Scenario("neck", _fuse(256, 512, 26, 17), TWO, rare=True),
    Scenario("neck, 16 words", _fuse(512, 512, 13, 16), TWO, rare=True),
    Scenario("MagNet stage 1", magnet.stage(128, 768, 14400, 20), tuned=BFLOAT16),
    Scenario("MagNet stage 4", magnet.stage(1024, 768, 225, 20)),
    Scenario("MagNet stage 1 TF32", _with_tf32(magnet.stage(128, 768, 14400, 20)), FLOAT32, ("large", "small")),
    Scenario("MagNet, 9 words", magnet.stage(70, 40, 50, 9), TWO, rare=True),
    Scenario("large masks", _losses(2, (13, 15), (480, 300)), BFLOAT16, rare=True),
    Scenario("mask alone", _masks, FLOAT32, rare=True),
)


def recorded(shared: str, dtype: torch.dtype) -> Iterator[tuple[Scenario, Launch, str]]:
    """Every launch of every scenario in ``dtype`` on cards of class ``shared``; of alternatives, with their tiles."""
    for scenario in SCENARIOS:
        if shared in scenario.classes and dtype in scenario.dtypes:
            for launch in launches(scenario, shared, dtype):
                yield scenario, launch, ""
            if dtype in scenario.tuned:
                for launch in _alternatives(scenario, shared, dtype):
                    config = launch.config
                    tiles = "x".join(str(size) for _, size in config.blocks)
                    yield scenario, launch, f" [{tiles}, {config.num_warps} warps, stages {config.num_stages}]"


def _alternatives(scenario: Scenario, shared: str, dtype: torch.dtype) -> Iterator[Launch]:
    """What is launched when each alternative of the launch tables replaces what it stands beside."""
    with watched() as seen:
        launches(scenario, shared, dtype)
    for number in range(max(len(config.alternatives) for config in seen.values())):
        others = {
            choice: config.alternatives[number] for choice, config in seen.items() if number < len(config.alternatives)
        }
        with replaced(others):
            for launch in launches(scenario, shared, dtype):
                if any(each.kernel == kernel_name(launch.kernel) for each in others):
                    yield launch
