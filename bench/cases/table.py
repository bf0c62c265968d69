"""What is measured: one table, whose rows say how to build a case, at which sizes, and how fast it has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from fastris import CLIPConfig, CRISConfig

from . import alignformer, builders, magnet
from .case import Case
from .problem import Problem

__all__ = ["CASES", "MEMORY", "REAL_LENGTHS", "SMALL_CRIS", "Case", "choose_cases"]

# Tokens per sentence, start and end included, as RefCOCO's: 3.6 words on average.
REAL_LENGTHS = (4, 5, 6, 8)

SMALL_CRIS = CRISConfig(
    CLIPConfig(
        embed_dim=96,
        vision_layers=(1, 1, 1, 1),
        image_resolution=64,
        vision_width=8,
        vocab_size=256,
        transformer_width=128,
        transformer_heads=2,
        transformer_layers=2,
    ),
    word_dim=96,
    vis_dim=128,
    fpn_in=(64, 128, 96),
    fpn_out=(64, 128, 96),
    num_layers=2,
    num_head=4,
    dim_ffn=160,
    input_size=96,
)
"""The published proportions at a quarter of the width or less, for float64."""

_PIXELS = {"batch": 4, "height": 26, "width": 26, "dim": 512, "heads": 8, "words": 17}
_FEW_PIXELS = {"batch": 2, "height": 5, "width": 7, "dim": 64, "heads": 4, "words": 11}
_CRIS_R50 = {"preset": "cris_r50", "side": 416, "words": 17, "lengths": REAL_LENGTHS}
_TITLES = {"alignformer": "AlignFormer", "magnet": "MagNet"}
_WHOLE = "480x480, 20 words"
_SMALL_MODEL = {"preset": SMALL_CRIS, "side": 96, "batch": 6}


def _bidirectional(name: str, where: str, batch: int, side: int, width: int, text: int, goal: float) -> Case:
    return Case(
        name=f"bidirectional_attention_{name}",
        op="bidirectional_attention",
        title=f"bidirectional attention + projection: {where}, {width} channels, {side}x{side}, 20 words, B={batch}",
        build=builders.bidirectional_attention,
        composed=True,
        sizes={"batch": batch, "side": side, "width": width, "text_width": text, "words": 20},
        small={"batch": 2, "side": 1 + 8 // (width // 128), "width": 16, "text_width": 12, "words": 5},
        goals={"cpu/float32": goal},
        compiles_long=True,
    )


def _magnet(op: str, what: str, stage: int, goal: float) -> Case:
    """One of MagNet's attentions of a stage's map and a sentence, at 480x480."""
    width, side = 128 << stage, 120 >> stage
    return Case(
        name=f"{op}_stage{stage + 1}",
        op=op,
        title=f"{what}: MagNet, {width} channels, {side}x{side}, 20 words of width 768, B=1",
        build=getattr(builders, op),
        composed=True,
        sizes={"batch": 1, "side": side, "width": width, "text_width": 768, "words": 20},
        small={"batch": 2, "side": 8 - stage, "width": 16, "text_width": 12, "words": 5},
        goals={"cpu/float32": goal},
        compiles_long=True,
    )


def _of_model(
    op: str, name: str, title: str, build: Callable[..., Problem], side: int, goal: float = 0.0, **sizes: Any
) -> Case:
    """Of AlignFormer or MagNet on Swin-B; checked on the tiny one, most of whose maps are larger than a window."""
    return Case(
        name=f"{op}_{name}",
        op=op,
        title=f"{_TITLES[op]}, Swin-B: {title}, B=1 (checked smaller)",
        build=build,
        composed=True,
        sizes={"preset": f"{op}_swin_b", "side": side, "batch": 1, **sizes},
        small={"preset": f"{op}_tiny", "side": 8 if "number" in sizes else 96, "batch": 2}
        | ({"words": 6} if "words" in sizes else {}),
        check_small=True,
        goals={"cpu/float32": goal} if goal else {},
        compiles_long=True,
    )


def _stages(op: str, build: Callable[..., Problem]) -> tuple[Case, ...]:
    """The four stages of Swin at 480x480, each with what its pixels and 20 words learn from each other."""
    return tuple(
        _of_model(
            op, f"stage{n}", f"stage {n} with its words, {side}x{side}, 20 words", build, side, number=n, words=20
        )
        for n, side in enumerate((120, 60, 30, 15))
    )


CASES: tuple[Case, ...] = (
    Case(
        name="similarity_loss",
        op="similarity",
        title="1x1 + text kernel + loss: 256 channels, 104x104, B=4",
        build=builders.similarity_loss,
        sizes={"batch": 4, "channels": 256, "side": 104},
        small={"batch": 3, "channels": 24, "side": 13},
        goals={"cpu/float32": 25.0},
        targets={"repaired": 12.0, "max_autotune": 6.0, "share": 0.8},
    ),
    Case(
        name="upsample_conv_26",
        op="upsample_conv",
        title="up2 + 3x3: 512->512 from 26x26, B=4",
        build=builders.upsample_conv,
        sizes={"batch": 4, "channels": 512, "outputs": 512, "side": 26},
        small={"batch": 2, "channels": 24, "outputs": 24, "side": 7},
        goals={"cpu/float32": 2.3},
        targets={"repaired": 2.5, "max_autotune": 2.0, "share": 0.7},
    ),
    Case(
        name="upsample_conv_52",
        op="upsample_conv",
        title="up2 + 3x3: 512->256 from 52x52, B=4",
        build=builders.upsample_conv,
        sizes={"batch": 4, "channels": 512, "outputs": 256, "side": 52},
        small={"batch": 2, "channels": 24, "outputs": 16, "side": 13},
        goals={"cpu/float32": 1.9},
        targets={"repaired": 2.5, "max_autotune": 2.0, "share": 0.7},
        compiles_long=True,
    ),
    Case(
        name="cross_attention",
        op="cross_attention",
        title="cross-attention block: 676 pixels, 17 words, none of them padding, B=4, dropout 0",
        build=builders.cross_attention,
        sizes=_PIXELS,
        small=_FEW_PIXELS,
        goals={"cpu/float32": 1.8},
        targets={"repaired": 4.0, "max_autotune": 2.0, "share": 0.6},
    ),
    Case(
        name="cross_attention_padded",
        op="cross_attention",
        title="cross-attention block: 676 pixels, 17 words, of which 4 to 8 real, B=4, dropout 0",
        build=builders.cross_attention,
        sizes={**_PIXELS, "lengths": REAL_LENGTHS},
        small=_FEW_PIXELS,
        goals={"cpu/float32": 1.8},
        targets={"repaired": 4.0, "max_autotune": 2.0, "share": 0.6},
        compiles_long=True,
    ),
    Case(
        name="projector_loss",
        op="projector",
        title="projector + loss: 512 channels from 26x26, B=4",
        build=partial(builders.projector, with_loss=True),
        composed=True,
        sizes={"batch": 4, "side": 26, "word_dim": 1024, "in_dim": 256},
        small={"batch": 3, "side": 7, "word_dim": 24, "in_dim": 16},
        goals={"cpu/float32": 2.5},
        targets={"repaired": 3.0, "max_autotune": 2.2, "share": 0.65},
        compiles_long=True,
    ),
    Case(
        name="decoder",
        op="decoder",
        title="decoder: 3 layers, 676 pixels, 17 words, of which 4 to 8 real, B=4, dropout 0",
        build=builders.decoder,
        composed=True,
        sizes={**_PIXELS, "layers": 3, "dim_ffn": 2048, "dropout": 0.0, "lengths": REAL_LENGTHS},
        small={**_FEW_PIXELS, "layers": 2, "dim_ffn": 96},
        goals={"cpu/float32": 1.3},
        targets={"repaired": 2.0, "max_autotune": 1.3},
        compiles_long=True,
    ),
    Case(
        name="decoder_dropout",
        op="decoder",
        title="decoder: the same with dropout 0.1 (checked at 0)",
        build=builders.decoder,
        composed=True,
        sizes={**_PIXELS, "layers": 3, "dim_ffn": 2048, "dropout": 0.1, "lengths": REAL_LENGTHS},
        small={**_FEW_PIXELS, "layers": 2, "dim_ffn": 96},
        check={"dropout": 0.0},
        compiles_long=True,
    ),
    Case(
        name="image_encoder",
        op="encoders",
        title="image encoder: CLIP RN50, 416x416, B=2 (checked smaller)",
        build=builders.image_encoder,
        composed=True,
        sizes={"preset": "cris_r50", "side": 416, "batch": 2},
        small={"preset": SMALL_CRIS, "side": 96, "batch": 6},
        check_small=True,
        compiles_long=True,
    ),
    Case(
        name="text_encoder",
        op="encoders",
        title="text encoder: 12 layers, 17 words, B=4 (checked smaller)",
        build=builders.text_encoder,
        composed=True,
        sizes={"preset": "cris_r50", "words": 17, "lengths": REAL_LENGTHS, "batch": 4},
        small={"preset": SMALL_CRIS, "batch": 3},
        check_small=True,
        compiles_long=True,
    ),
    Case(
        name="neck",
        op="neck",
        title="neck: 52x52, 26x26, 13x13, B=4 (checked smaller)",
        build=builders.neck,
        composed=True,
        sizes={"preset": "cris_r50", "side": 416, "batch": 4},
        small={"preset": SMALL_CRIS, "side": 96, "batch": 6},
        check_small=True,
        compiles_long=True,
        least_batch=2,
    ),
    Case(
        name="self_attention",
        op="self_attention",
        title="self-attention block: 676 pixels, 8 heads, B=4, dropout 0",
        build=builders.self_attention,
        sizes={"batch": 4, "height": 26, "width": 26, "dim": 512, "heads": 8},
        small={"batch": 2, "height": 5, "width": 7, "dim": 64, "heads": 4},
    ),
    _bidirectional("stage0", "AlignFormer", 1, 120, 128, 768, 3.0),
    _bidirectional("stage1", "AlignFormer", 1, 60, 256, 768, 2.0),
    _bidirectional("stage2", "AlignFormer", 1, 30, 512, 768, 1.0),
    _bidirectional("stage3", "AlignFormer", 1, 15, 1024, 768, 1.0),
    _bidirectional("f3", "CRIS's neck", 4, 26, 256, 512, 1.0),
    _bidirectional("f4", "CRIS's neck", 4, 26, 512, 512, 1.0),
    _bidirectional("f5", "CRIS's neck", 4, 13, 1024, 512, 1.0),
    Case(
        name="word_attention",
        op="word_attention",
        title="attention of 4725 pixels to 20 words of width 768, all real: 8 heads of 32, B=2",
        build=builders.word_attention,
        sizes={"batch": 2, "pixels": 4725, "dim": 256, "heads": 8, "words": 20, "word_dim": 768},
        small={"pixels": 35, "dim": 64, "heads": 4, "words": 11, "word_dim": 24},
        goals={"cpu/float32": 1.4},
    ),
    *(_magnet("pixel_word_attention", "pixels read words", *each) for each in enumerate((1.4, 1.4, 1.0, 1.0))),
    *(_magnet("word_pixel_attention", "words read pixels", *each) for each in enumerate((10.0, 3.5, 1.3, 1.0))),
    Case(
        name="deformable_attention",
        op="deformable_attention",
        title="deformable attention: 15x15 + 30x30 + 60x60 pixels, 8 heads of 32, 4 points, B=2 (checked smaller)",
        build=builders.deformable_attention,
        sizes={"batch": 2, "maps": ((15, 15), (30, 30), (60, 60)), "heads": 8, "width": 32, "points": 4},
        small={"maps": ((2, 3), (4, 5)), "heads": 2, "width": 8},
        check_small=True,  # between cells the gradient of a place jumps: at full size rounding moves a few across
        goals={"cpu/float32": 1.0},
    ),
    Case(
        name="feed_forward",
        op="feed_forward",
        title="FFN block: 676 pixels, 512->2048->512, B=4, dropout 0",
        build=builders.feed_forward,
        composed=True,
        sizes={"batch": 4, "height": 26, "width": 26, "dim": 512, "dim_ffn": 2048},
        small={"batch": 2, "height": 5, "width": 7, "dim": 64, "dim_ffn": 96},
    ),
    Case(
        name="few_query_attention",
        op="few_query_attention",
        title="AlignFormer, one query over 15x15, 30x30 and 60x60 pixels: 768 from 256 channels, B=2 (checked smaller)",
        build=builders.few_query_attention,
        sizes={"batch": 2, "dim": 768, "width": 256, "heads": 8, "sides": (15, 30, 60)},
        small={"dim": 64, "width": 24, "heads": 4, "sides": (3, 5, 7)},
        check_small=True,
        goals={"cpu/float32": 10.0},
    ),
    Case(
        name="region_contrast",
        op="region_contrast",
        title="1x1 + instance contrast: 256 channels, 120x120, masks 480x480, B=2 (checked smaller)",
        build=builders.region_contrast,
        sizes={"batch": 2, "channels": 256, "side": 120, "mask_side": 480},
        small={"channels": 16, "side": 12, "mask_side": 48},
        check_small=True,
    ),
    Case(
        name="pixel_contrast",
        op="pixel_contrast",
        title="alignment loss: 256 channels, 120x120, masks 480x480, B=2 (checked smaller)",
        build=builders.pixel_contrast,
        sizes={"batch": 2, "channels": 256, "side": 120, "mask_side": 480},
        small={"channels": 16, "side": 12, "mask_side": 48},
        check_small=True,
    ),
    Case(
        name="upsampled_bce",
        op="upsampled_bce",
        title="up4 + loss: 7 maps of 120x120, masks 480x480, B=2",
        build=builders.upsampled_bce,
        sizes={"batch": 2, "queries": 7, "side": 120, "mask_side": 480},
        small={"queries": 3, "side": 9, "mask_side": 36},
    ),
    Case(
        name="projector",
        op="projector",
        title="projector: 512 channels from 26x26, B=4",
        build=builders.projector,
        composed=True,
        sizes={"batch": 4, "side": 26, "word_dim": 1024, "in_dim": 256},
        small={"batch": 3, "side": 7, "word_dim": 24, "in_dim": 16},
        compiles_long=True,
    ),
    Case(
        name="loss",
        op="loss",
        title="loss alone: logits 104x104, mask 416x416, B=4",
        build=builders.loss,
        sizes={"batch": 4, "side": 104, "mask_side": 416},
        small={"batch": 2, "side": 13, "mask_side": 52},
    ),
    Case(
        name="train_step",
        op="model",
        title="CRIS-RN50, training step: 416x416, B=2, dropout 0.1 (checked at 0, smaller)",
        build=builders.training_step,
        composed=True,
        sizes={**_CRIS_R50, "batch": 2, "dropout": 0.1},
        small=_SMALL_MODEL,
        check={"dropout": 0.0},
        check_small=True,
        passes="forward + backward + Adam",
        goals={"cpu/float32": 1.3},
        targets={"reference": 3.0, "repaired": 1.5, "max_autotune": 1.25},
        compiles_long=True,
        least_batch=2,
    ),
    Case(
        name="inference",
        op="model",
        title="CRIS-RN50, inference: 416x416, B=1 (ours: for_inference; checked smaller)",
        build=builders.inference,
        composed=True,
        sizes={**_CRIS_R50, "batch": 1},
        small=_SMALL_MODEL,
        check_small=True,
        passes="forward",
        goals={"cpu/float32": 1.4},
        compiles_long=True,
    ),
    *_stages("alignformer", alignformer.stage),
    _of_model("alignformer", "pixel_decoder", f"pixel decoder, {_WHOLE}", alignformer.pixel_decoder, 480, words=20),
    _of_model(
        "alignformer",
        "centre",
        f"centre embedding, scores and loss, {_WHOLE}",
        alignformer.centre_and_loss,
        480,
        words=20,
    ),
    _of_model(
        "alignformer", "step", f"training step without the optimizer, {_WHOLE}", alignformer.step, 480, 1.3, words=20
    ),
    *_stages("magnet", magnet.stage),
    _of_model("magnet", "pixel_decoder", "pixel decoder, 480x480", magnet.pixel_decoder, 480),
    _of_model("magnet", "mask_decoder", "mask decoder and loss, 480x480", magnet.mask_decoder, 480),
    _of_model("magnet", "step", f"training step without the optimizer, {_WHOLE}", magnet.step, 480, 1.4, words=20),
    replace(
        _of_model("magnet", "inference", f"inference, {_WHOLE}", magnet.answer, 480, 1.5, words=20), passes="forward"
    ),
)

MEMORY = "memory"
"""The name under which the bytes kept for backward are asked for; they are counted, not timed: see bench/memory.py."""


def choose_cases(names: tuple[str, ...]) -> tuple[list[Case], bool]:
    """The cases that ``names`` mean, each a case or an operator, and whether memory is among them; all for no names.

    Raises ValueError for an unknown name, with the ones that exist.
    """
    known = list(dict.fromkeys(name for case in CASES for name in (case.op, case.name)))
    for name in names:
        if name not in (*known, MEMORY):
            raise ValueError(f"there is no operator or case {name!r}; choose from {', '.join([*known, MEMORY])}")
    chosen = [case for case in CASES if not names or case.name in names or case.op in names]
    return chosen, not names or MEMORY in names
