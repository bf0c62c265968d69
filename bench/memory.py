"""``python -m bench.memory``: what a training step keeps and needs, what batch fits on a card, what it costs.

Kept is what stays allocated between forward and backward. What a card needs beside that is counted, too: weights,
gradients and Adam's state in float32, the batch, and the largest number of bytes alive in any part of forward and
backward. Each part's bytes are a line through two counted batches, and the step's are the largest line. Counted on a
CPU, it is a forecast for a GPU; ``tests/models/test_recompute.py`` tries its largest claim on one.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastris.models import registry
from fastris.models.config import ModelConfig
from fastris.nn.recompute import RECOMPUTE_SETTINGS
from fastris.options.declare import option
from fastris.runtime.device import choose_device

from .cases.arms import Arm, choose_arms
from .cases.builders import model_and_data
from .cases.table import REAL_LENGTHS
from .counter import Kept, LiveStorages
from .options import BASELINE, with_options
from .report.pages import BATCH, CRIS_R50, DTYPE, WholeCell, fits_table, kept_table, time_table
from .report.results import save
from .timing import machine
from .timing.harness import Progress, failures_into, order_of_round, release, synchronize, timed

STAGES = {
    "image encoder": ("backbone.encode_image",),
    "text encoder": ("backbone.encode_text",),
    "neck": ("neck.project", "neck.fuse"),
    "decoder": ("decoder.forward",),
    "projector + loss": ("proj.forward",),
}
"""Stage -> the methods of :class:`fastris.CRIS` that run in it."""

PARTS = STAGES | {
    "stem": ("backbone.visual.stem",),
    **{f"layer{number}": (f"backbone.visual.layer{number}.forward",) for number in range(1, 5)},
}
"""The stages and what they are made of, for the peaks."""

ALIGNFORMER = {
    "text encoder": ("text_encoder.forward",),
    "image encoder": ("backbone.forward",),
    "pixel decoder": ("classifier.pix_dec.forward",),
    "centre embedding + loss": ("classifier.forward",),
}
"""Part -> the methods of :class:`fastris.AlignFormer` that run in it; what is in no other part belongs to the last."""


MAGNET = {
    "encoders": (
        "image_model.patch_embed.forward",
        "image_model.layers.*.blocks.*.forward",
        "language_model.embed",
        "language_model.part",
    ),
    "exchanges": ("image_model.layers.*.see", "image_model.layers.*.pass_on", "language_model.listen"),
    "pixel decoder": ("classifier.pixel_decoder.forward",),
    "mask decoder": ("classifier.predictor.forward",),
    "masks + loss": ("classifier.forward",),
}
"""The same of :class:`fastris.MagNet`; ``*`` stands for every number in its place."""

Parts: TypeAlias = Mapping[str, tuple[str, ...]]
SYSTEMS: dict[str, tuple[Parts, Parts]] = {
    "cris": (STAGES, PARTS),
    "alignformer": (ALIGNFORMER, ALIGNFORMER),
    "magnet": (MAGNET, MAGNET),
}
"""By system: its stages and its parts; the last stage gets what is in none."""


def parts_of(config: ModelConfig) -> tuple[Parts, Parts]:
    """A system's stages and its parts. Raises ValueError for a system without a row in :data:`SYSTEMS`."""
    if config.system not in SYSTEMS:
        raise ValueError(f"bench.memory knows the parts of {', '.join(SYSTEMS)} alone; add {config.system} to SYSTEMS")
    return SYSTEMS[config.system]


OWN_STAGES = ("neck", "decoder", "projector + loss")
GOAL = 0.5
"""Bytes kept in CRIS's own stages, or in the whole of another system, at most this fraction of the baseline's."""
PART_GOALS = {"magnet": {"pixel decoder": 0.15}}
"""System -> part -> the same of that part alone."""

TITLE = (
    f"kept for backward per image: neck + decoder + projector + loss of CRIS-RN50 at 416x416, B={BATCH}, dropout 0.1, "
    f"{str(DTYPE).removeprefix('torch.')} autocast, 17 words, of which 4 and 5 real"
)


@dataclass
class WholeConfig:
    """Counts what a training step of a model at its own size keeps and needs, for every recompute setting."""

    model: str = option("cris_r50", "preset whose step is counted, e.g. alignformer_swin_b")
    arms: tuple[str, ...] = option((), f"arms to count beside {BASELINE}; all eager paths that run here if empty")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    rounds: int = option(0, "steps to time per setting, in turns; 0 counts only")
    batch: int = option(BATCH, "images per timed step; at least 2")
    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = option(("bfloat16",), "precisions of timed steps")
    counted: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "precision of counted steps")
    json: Path | None = option(None, "file for all counts and timings")


def run(config: WholeConfig) -> int:
    device = choose_device(config.device)
    if config.rounds < 0 or config.batch < 2:
        raise ValueError(f"rounds must be at least 0 and batch at least 2, got {config.rounds} and {config.batch}")
    cells: list[WholeCell] = []
    model = registry.preset(config.model)
    if model.system != "cris":
        model = _countable(model)
    dtype, of = getattr(torch, config.counted), _about(config, model)
    count_whole(choose_arms(config.arms, device, dtype), device, _say, cells, model, dtype=dtype)
    print(kept_table(cells, of), fits_table(cells, of), sep="\n\n")
    content: dict[str, Any] = {
        "machine": machine.prepare(device),
        "batch": BATCH,
        "goals": of["goals"],
        "of": of,
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    if config.rounds:
        content |= {"seconds": {}, "timed_batch": config.batch}
        for name in config.dtype:
            seconds = time_settings(model, device, getattr(torch, name), config.batch, config.rounds)
            print("", time_table(seconds, config.batch, name), sep="\n")
            content["seconds"][name] = seconds
    if config.json is not None:
        save(config.json, content)
    return int(any(cell.message for cell in cells))


def _countable(config: Any) -> Any:
    """The model as its cases are: nothing is left out at random, and sentences need no vocabulary from elsewhere."""
    return dataclasses.replace(config, drop_path=0.0, vocabulary="built-in")


def _about(options: WholeConfig, config: ModelConfig) -> dict[str, Any]:
    """What is counted; see :data:`bench.report.pages.CRIS_R50`."""
    if config.system == "cris":
        return {**CRIS_R50, "dtype": options.counted}
    side = config.input_size
    return {
        "model": f"{config.in_words()} at {side}x{side}",
        "dtype": options.counted,
        "words": config.word_len,
        "goals": {},
        "share": GOAL,
        "parts": PART_GOALS.get(config.system, {}),
        "published_batch": config.recipe.batch_size,
    }


def time_settings(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, batch: int, rounds: int
) -> dict[str, list[float]]:
    """Setting -> seconds of forward and backward in every round, on one model; settings take turns, after a warm-up.

    In channels_last, as training on a GPU: see :func:`fastris.runtime.device.layout_for`.
    """
    model, data = model_and_batch(config, "none", device, batch)
    model.to(memory_format=torch.channels_last)
    data = (data[0].contiguous(memory_format=torch.channels_last), *data[1:])

    def step() -> None:
        model.zero_grad()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = model(*data)[2]
        loss.backward()

    seconds: dict[str, list[float]] = {setting: [] for setting in RECOMPUTE_SETTINGS}
    for number in range(rounds + 1):
        for setting in order_of_round(list(RECOMPUTE_SETTINGS), number):
            _say(f"timing {setting}, round {number} of {rounds}")
            model.set_recompute(setting)
            taken = timed(step, 1, lambda: synchronize(device))
            if number:
                seconds[setting].append(taken)
    return seconds


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def count_own(arms: Sequence[Arm], device: torch.device, progress: Progress) -> Iterator[dict[str, Any]]:
    """What a result file holds of memory: bytes kept in CRIS's own stages. Yields it once more after each arm."""
    found: dict[str, Any] = {"title": TITLE, "batch": BATCH, "baseline": BASELINE, "goal": GOAL, "arms": {}}
    for arm in arms:
        cells: list[WholeCell] = []
        count_whole([arm], device, progress, cells, registry.preset("cris_r50"), RECOMPUTE_SETTINGS[:1])
        for cell in cells:
            kept = {name: cell.stages[name] for name in OWN_STAGES if name in cell.stages}
            found["arms"][cell.arm] = {"arm": cell.arm, "status": cell.status, "message": cell.message, "stages": kept}
        yield found


def count_whole(
    arms: Sequence[Arm],
    device: torch.device,
    progress: Progress,
    cells: list[WholeCell],
    config: ModelConfig,
    settings: Sequence[str] = RECOMPUTE_SETTINGS,
    dtype: torch.dtype = DTYPE,
) -> None:
    """Count every eager arm but the repaired one with every setting, the baseline as published, into ``cells``."""
    for arm in arms:
        if arm.compile is not None or arm.repaired:
            continue
        for setting in settings if arm.name != BASELINE else settings[:1]:
            progress(f"counting {arm.name}, recompute {setting}")
            cells.append(cell := WholeCell(arm.name, recompute=setting))
            with failures_into(cell), arm.active():
                small, large = (count_step(config, setting, device, batch, dtype) for batch in (BATCH, 2 * BATCH))
                cell.stages = {name: vars(stage) for name, stage in small.kept.items()}
                cell.fixed, cell.lines = small.fixed, lines_through(small, large)
                cell.status = "measured"
            release(device)


@dataclass(frozen=True)
class StepCount:
    """One training step's bytes: ``kept`` per stage; ``fixed`` for weights, buffers and Adam's state; ``peaks``, the
    most alive beside those in each part: one of :data:`PARTS`, or "backward of" one, from its output's gradient on."""

    batch: int
    fixed: int
    kept: dict[str, Kept]
    peaks: dict[str, int]


def count_step(
    config: ModelConfig, recompute: str, device: torch.device, batch: int = BATCH, dtype: torch.dtype = DTYPE
) -> StepCount:
    """Count a training step, under autocast unless in float32, by the path in use. Outputs do not count as kept."""
    model, data = model_and_batch(config, recompute, device, batch)
    counter = LiveStorages([*model.parameters(), *model.buffers()], data)
    own_stages, parts = parts_of(config)
    with counter, told_of_parts(model, counter, parts):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = model(*data)[2]
        kept = counter.kept()
        loss.backward()
    trained, given = sum(p.nbytes for p in model.parameters()), sum(tensor.nbytes for tensor in data)
    peaks = {part: peak + given for part, peak in counter.peaks.items()}
    peaks["optimizer"] = 3 * trained  # the gradients, and two intermediate results of their size
    stages = {name: Kept() for name in own_stages}
    for part, bytes_ in kept.items():
        stage = stages[part if part in stages else "image encoder" if part in parts else list(stages)[-1]]
        stage.activations += bytes_.activations
        stage.weight_copies += bytes_.weight_copies
    return StepCount(batch, 3 * trained + sum(buffer.nbytes for buffer in model.buffers()), stages, peaks)


def lines_through(small: StepCount, large: StepCount) -> dict[str, tuple[float, float]]:
    """Part -> (bytes, bytes per image)."""
    lines = {}
    for part in small.peaks.keys() & large.peaks.keys():
        slope = max(0.0, (large.peaks[part] - small.peaks[part]) / (large.batch - small.batch))
        lines[part] = (small.peaks[part] - small.batch * slope, slope)
    return lines


def model_and_batch(
    config: ModelConfig, recompute: str, device: torch.device, batch: int
) -> tuple[Any, tuple[Tensor, ...]]:
    """The model in training mode and (images, tokens, masks)."""
    side = config.input_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any
        lengths = REAL_LENGTHS if config.system == "cris" else (config.word_len,)
        model, data = model_and_data(config, side, batch, config.word_len, lengths)
        mask = torch.rand(batch, 1, side, side)
    model.train().set_recompute(recompute).to(device)
    return model, tuple(tensor.to(device) for tensor in (*data.values(), mask))


@contextmanager
def told_of_parts(model: nn.Module, counter: LiveStorages, parts: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Tell ``counter`` which of the ``parts`` runs, in the forward and in the backward pass."""
    with ExitStack() as undo:
        for part, methods in parts.items():
            for path in methods:
                owner, _, method = path.rpartition(".")
                for module in submodules(model, owner):
                    told = _within(getattr(module, method), counter, part)
                    undo.enter_context(mock.patch.object(module, method, told))
        yield


def submodules(model: nn.Module, path: str) -> list[nn.Module]:
    """The submodules that ``path`` names, in which ``*`` stands for every name in its place."""
    if "*" not in path:
        return [model.get_submodule(path)]
    parent, _, rest = path.partition(".*")
    children = model.get_submodule(parent).children()
    return [found for child in children for found in (submodules(child, rest[1:]) if rest else [child])]


def _within(method: Any, counter: LiveStorages, part: str) -> Any:
    def enter_backward(gradient: Tensor) -> None:
        counter.enter(f"backward of {part}")

    def run(*args: Any, **kwargs: Any) -> Any:
        with counter.stage(part):
            output = method(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(enter_backward)
        return output

    return run


def main(arguments: list[str]) -> int:
    return with_options("bench.memory", WholeConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
