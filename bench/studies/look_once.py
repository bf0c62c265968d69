"""``python -m bench.studies.look_once``: several expressions about one image, against asking one by one as published.

The published code encodes the image again for every expression. Here it is encoded once: everything up to the neck's
projections does not depend on the text. Every arm is checked against float64 before it is timed, on a small copy of the
model, and arms take turns, as everywhere in bench/.

Training asks about one image as the published recipe does: a batch of pairs, in which the image is repeated. Loss,
predictions and gradients are the same. The image encoder's BatchNorms see each image once instead of once per
expression: the same mean and variance, but PyTorch's unbiased running variance is corrected for fewer samples, so
running statistics are left out of the check. One expression alone cannot be trained on: the neck normalises over the
sentences of the batch.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastris.models import registry
from fastris.models.base import ReferringModel
from fastris.options.declare import option
from fastris.runtime.device import choose_device

from ..cases.arms import Arm
from ..cases.builders import Preset, config_of, model_and_data
from ..cases.problem import Problem
from ..cases.table import REAL_LENGTHS, SMALL_CRIS, Case
from ..options import Effort, with_options
from ..report import results
from ..report.pages import look_once_page
from ..timing.harness import Cell, Setting, case_entry, measure_case

RESULT = Path(__file__).resolve().parents[1] / "results" / "look_once.json"
CHECKED_EXPRESSIONS = 6
NOTE = (
    "Logits, and in training loss and gradients, of every arm were held against float64 on a small copy before it was "
    "timed; arms took turns."
)


@dataclass
class LookOnceConfig:
    """Measures expressions per second over the number of expressions per image: one by one, and looking once."""

    expressions: tuple[int, ...] = option((1, 2, 4, 8), "expressions per image in inference, e.g. --expressions 1,8")
    training: tuple[int, ...] = option((2, 4), "expressions per image in training, at least 2; 8 takes 3 minutes more")
    model: str = option("cris_r50", ", ".join(registry.presets()))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int | None = option(None, "CPU threads; PyTorch's choice if none")
    rounds: int = option(5, "rounds per case at most")
    seconds: float = option(12.0, "no new round after this, but at least 2", "s per case")
    json: Path = option(RESULT, "file for every single timing")


class Asking(nn.Module):
    """A model that is asked about one image: one by one, or looking once within :meth:`Way.active`.

    One by one is the published way: the image is encoded for every expression; in training, as a batch of pairs.
    """

    looks_once = False

    def __init__(self, model: ReferringModel):
        super().__init__()
        self.model = model

    def forward(self, img: Tensor, word: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if Asking.looks_once:
            return self._look_once(img, word, mask)
        if mask is None:
            return torch.cat([self.model(img, tokens) for tokens in word.split(1)])
        prediction, _, loss = self.model(img.expand(len(word), -1, -1, -1), word, mask)
        return loss, prediction

    def _look_once(self, img: Tensor, word: Tensor, mask: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        features = self.model.encode_image(img)
        index = torch.zeros(len(word), dtype=torch.int64, device=word.device)
        if mask is None:
            return self.model.segment(features, word, index)
        loss, logits = self.model.loss(features, word, mask, index)
        return loss, logits.detach()


@dataclass(frozen=True)
class Way(Arm):
    """One way to ask: an arm that looks once or not."""

    once: bool = False

    @contextmanager
    def active(self, new_step: bool = True) -> Iterator[None]:
        before = Asking.looks_once
        with super().active(new_step):
            Asking.looks_once = self.once
            try:
                yield
            finally:
                Asking.looks_once = before


PUBLISHED = Way("published", "reference", tuned=False)
WAYS = {
    "inference": [PUBLISHED, Way("one by one", "auto"), Way("look once", "auto", once=True)],
    "training": [PUBLISHED, Way("look once", "auto", once=True)],
}


def asking(preset: Preset, expressions: int, dropout: float, momentum: float | None, training: bool) -> Problem:
    """One image and ``expressions`` sentences about it; ``momentum`` is BatchNorm's where it is not the usual one."""
    config = dataclasses.replace(config_of(preset), dropout=dropout)
    side = config.input_size
    model, data = model_and_data(config, side, expressions, config.word_len, REAL_LENGTHS)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) and momentum is not None:
            part.momentum = momentum
    data["img"] = data["img"][:1]
    if training:
        data["mask"] = torch.rand(expressions, 1, side, side)
    return Problem(Asking(model), {}, data, training=training)


def make_case(kind: str, expressions: int, preset: str) -> Case:
    """Inference or training with so many expressions about one image."""
    training = kind == "training"
    size = registry.preset(preset).input_size
    return Case(
        name=f"look_once_{kind}_{expressions}",
        op="look_once",
        title=f"{kind.capitalize()}: {expressions} expressions per image, one image of {size}x{size}, {preset}",
        build=asking,
        sizes={
            "preset": preset,
            "expressions": expressions,
            "dropout": 0.1 if training else 0.0,
            "momentum": None,
            "training": training,
        },
        small={"preset": SMALL_CRIS},
        check={"expressions": CHECKED_EXPRESSIONS, "dropout": 0.0, "momentum": 0.0},
        composed=True,
        check_small=True,
        passes="forward + backward" if training else "forward",
    )


def run(config: LookOnceConfig, arguments: list[str]) -> int:
    """Measure, write the file after each case, and print the table. Ctrl-C keeps what was measured."""
    for name, counts, least in (("expressions", config.expressions, 1), ("training", config.training, 2)):
        if any(count < least for count in counts):
            raise ValueError(f"{name} must be at least {least} each, got {', '.join(map(str, counts))}")
    device = choose_device(config.device)
    wanted = [("inference", count) for count in config.expressions] + [("training", n) for n in config.training]
    cases = [(make_case(kind, count, config.model), WAYS[kind]) for kind, count in wanted]
    settings = {"dtype": "float32", "quick": False, "rounds": config.rounds, "seconds": config.seconds}
    command = ["python", "-m", "bench.studies.look_once", *arguments]
    result = results.ResultFile(config.json, command, device, config.threads, settings, note=NOTE)
    effort = Effort(config.rounds, min(config.rounds, 2), config.seconds)
    setting = Setting(device, torch.float32, effort, progress=lambda text: print(text, file=sys.stderr))
    with result.growing():
        for case, ways in cases:
            setting.progress(case.name)
            cells: dict[str, Cell] = {}
            try:
                measure_case(case, ways, setting, cells)
            finally:
                result.content["cases"].append(case_entry(case, PUBLISHED.name, cells))
            result.save()
    print(look_once_page(result.content, os.path.relpath(config.json)))
    return int(result.troubles()) if result.content["complete"] else 130


def main(arguments: list[str]) -> int:
    return with_options("bench.studies.look_once", LookOnceConfig, lambda config: run(config, arguments), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
