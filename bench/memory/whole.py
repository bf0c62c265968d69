"""What a training step of CRIS keeps and needs: its own parts alone, and the whole by path and recompute setting.

Kept is what stays allocated between forward and backward. What a card needs beside that is counted, too: weights,
gradients and Adam's state in float32, the batch, and the largest number of bytes alive in any part of forward and
backward. Each part's bytes are a line through two counted batches, and the step's are the largest line. Counted on a
CPU, it is a forecast for a GPU; ``tests/models/test_recompute.py`` tries its largest claim on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastris import CRIS, CRISConfig
from fastris.nn.recompute import RECOMPUTE_SETTINGS

from ..cases.arms import Arm
from ..cases.builders import enliven, make_tokens
from ..cases.table import REAL_LENGTHS
from ..counter import Kept, LiveStorages, SavedStorages
from ..options import BASELINE
from ..report.memory import BATCH, DTYPE, MemoryCell, WholeCell
from ..timing.harness import Progress, failures_into, release

GOAL = 0.5
"""Bytes kept by an arm, at most this fraction of the baseline's."""

TITLE = (
    f"kept for backward per image: neck + decoder + projector + loss of CRIS-RN50 at 416x416, B={BATCH}, dropout 0.1, "
    f"{str(DTYPE).removeprefix('torch.')} autocast, 17 words, of which 4 and 5 real"
)

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


def count_memory(
    arms: list[Arm], device: torch.device, progress: Progress, cells: dict[str, MemoryCell], config: CRISConfig
) -> None:
    """Count for every arm what CRIS's own parts keep at the sizes of ``config``. Fills ``cells``."""
    cells.update({arm.name: MemoryCell(arm.name) for arm in arms})
    for arm in arms:
        progress(f"counting {arm.name}")
        with failures_into(cells[arm.name]), arm.active():
            stages = kept_by_own_parts(config, device)
            cells[arm.name].stages = {name: asdict(kept) for name, kept in stages.items()}
            cells[arm.name].status = "measured"
        release(device)


def kept_by_own_parts(config: CRISConfig, device: torch.device) -> dict[str, Kept]:
    """What neck, decoder and projector with the loss keep for a batch of :data:`BATCH` in a training step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = enliven(CRIS(config)).train()
        parts = torch.nn.ModuleDict({"neck": model.neck, "decoder": model.decoder, "proj": model.proj}).to(device)
        side = config.input_size // 32
        maps = [
            torch.randn(BATCH, channels, scale * side, scale * side).to(device, DTYPE).requires_grad_()
            for channels, scale in zip(config.fpn_in, (4, 2, 1), strict=True)
        ]
        words = torch.randn(BATCH, config.word_len, config.vis_dim).to(device).requires_grad_()
        state = torch.randn(BATCH, config.word_dim).to(device, DTYPE).requires_grad_()
        padding = (make_tokens(BATCH, config.word_len, REAL_LENGTHS) == 0).to(device)
        mask = torch.rand(BATCH, 1, config.input_size, config.input_size).to(device)
    counter = SavedStorages([*parts.parameters(), *parts.buffers()])
    with torch.autocast(device.type, dtype=DTYPE):
        with counter.saved("neck"):
            fused = parts["neck"](maps, state)
        with counter.saved("decoder"):
            decoded = parts["decoder"](fused, words, padding)
            decoded = (decoded[-1] if isinstance(decoded, list) else decoded).reshape(fused.shape)
        with counter.saved("projector + loss"):
            parts["proj"](decoded, state, mask)
    return counter.kept()


def count_whole(
    arms: Sequence[Arm], device: torch.device, progress: Progress, cells: list[WholeCell], config: CRISConfig
) -> None:
    """Count every arm with every recompute setting, the baseline as published. Fills ``cells``."""
    for arm in arms:
        for setting in RECOMPUTE_SETTINGS if arm.name != BASELINE else RECOMPUTE_SETTINGS[:1]:
            progress(f"counting {arm.name}, recompute {setting}")
            cells.append(cell := WholeCell(arm.name, recompute=setting))
            with failures_into(cell), arm.active():
                small, large = (count_step(config, setting, device, batch) for batch in (BATCH, 2 * BATCH))
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


def count_step(config: CRISConfig, recompute: str, device: torch.device, batch: int = BATCH) -> StepCount:
    """Count a training step under autocast by the path that is in use. The outputs do not count as kept."""
    model, data = model_and_batch(config, recompute, device, batch)
    counter = LiveStorages([*model.parameters(), *model.buffers()], data)
    with counter, told_of_parts(model, counter):
        with torch.autocast(device.type, dtype=DTYPE):
            loss = model(*data)[2]
        kept = counter.kept()
        loss.backward()
    trained, given = sum(p.nbytes for p in model.parameters()), sum(tensor.nbytes for tensor in data)
    peaks = {part: peak + given for part, peak in counter.peaks.items()}
    peaks["optimizer"] = 3 * trained  # the gradients, and two intermediate results of their size
    stages = {name: Kept() for name in STAGES}
    for part, bytes_ in kept.items():
        stage = stages[_stage_of(part)]
        stage.activations += bytes_.activations
        stage.weight_copies += bytes_.weight_copies
    return StepCount(batch, 3 * trained + sum(buffer.nbytes for buffer in model.buffers()), stages, peaks)


def _stage_of(part: str) -> str:
    return part if part in STAGES else "image encoder" if part in PARTS else "projector + loss"


def lines_through(small: StepCount, large: StepCount) -> dict[str, tuple[float, float]]:
    """Part -> (bytes, bytes per image)."""
    lines = {}
    for part in small.peaks.keys() & large.peaks.keys():
        slope = max(0.0, (large.peaks[part] - small.peaks[part]) / (large.batch - small.batch))
        lines[part] = (small.peaks[part] - small.batch * slope, slope)
    return lines


def model_and_batch(
    config: CRISConfig, recompute: str, device: torch.device, batch: int
) -> tuple[CRIS, tuple[Tensor, Tensor, Tensor]]:
    """The model in training mode and (images, tokens, masks)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = enliven(CRIS(config)).train().set_recompute(recompute).to(device)
        images = torch.randn(batch, 3, config.input_size, config.input_size)
        tokens = make_tokens(batch, config.word_len, REAL_LENGTHS, config.clip.vocab_size)
        mask = torch.rand(batch, 1, config.input_size, config.input_size)
    return model, (images.to(device), tokens.to(device), mask.to(device))


@contextmanager
def told_of_parts(model: CRIS, counter: LiveStorages) -> Iterator[None]:
    """Tell ``counter`` which part runs, in the forward and in the backward pass."""
    with ExitStack() as undo:
        for part, methods in PARTS.items():
            for path in methods:
                owner, _, method = path.rpartition(".")
                module = model.get_submodule(owner)
                setattr(module, method, _within(getattr(module, method), counter, part))
                undo.callback(delattr, module, method)
        yield


def _within(method: Any, counter: LiveStorages, part: str) -> Any:
    def enter_backward(gradient: Tensor) -> None:
        counter.enter(f"backward of {part}")

    def run(*args: Any, **kwargs: Any) -> Any:
        with counter.stage(part):
            output = method(*args, **kwargs)
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if tensor.requires_grad:
                tensor.register_hook(enter_backward)
        return output

    return run
