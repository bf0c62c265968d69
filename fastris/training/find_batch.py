"""The largest micro-batch that a GPU can train on, found by trying."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from fastris.data.tokens import find_tokenizer
from fastris.models.inputs import inputs_of
from fastris.runtime.device import Precision

if TYPE_CHECKING:
    from fastris.models.base import ReferringModel

LEAST = 2
"""References in CRIS's smallest micro-batch: BatchNorm over sentences needs two."""

HEADROOM = 0.05
"""Share of the GPU's memory that is left free, because a long run's memory is more fragmented than a trial's."""


def largest_that_fits(fits: Callable[[int], bool], most: int, step: int = 1, least: int = LEAST) -> int | None:
    """The largest n up to `most` for which `fits(n)`, by doubling, then bisection; None if not even the first fits.

    n goes over the multiples of `step` from `least` on. `fits` must be monotone: what fits, fits smaller too.
    """
    first = -(-least // step) * step
    good, bad = 0, most // step * step + step
    trial = first
    while trial < bad:
        if fits(trial):
            good, trial = trial, min(2 * trial, max(trial + step, bad - step))
        else:
            bad = trial
    while bad - good > step and good:
        trial = (good + bad) // 2 // step * step
        if fits(trial):
            good = trial
        else:
            bad = trial
    return good or None


@dataclass(frozen=True)
class StepProbe:
    """Trial steps of a run, with noise for images: what counts is how much they allocate.

    A step is forward, backward and the optimizer's update, done twice, because the optimizer's state only exists after
    the first.

    Attributes:
        model: in training mode, where `precision` says that it runs.
        layout: of images in memory.
        expressions: about each image.
    """

    model: ReferringModel
    optimizer: Optimizer
    precision: Precision
    layout: torch.memory_format
    expressions: int = 1

    def fits(self, micro_batch: int) -> bool:
        """Whether a step on so many references runs through without running out of memory."""
        try:
            for _ in range(2):
                self.step(micro_batch)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            if self.precision.device.type == "cuda":
                torch.cuda.empty_cache()

    def step(self, micro_batch: int) -> None:
        """One training step on `micro_batch` references, each with a sentence of full length."""
        several, side, device = self.expressions, self.model.config.input_size, self.precision.device
        images = micro_batch // several
        tokenize, words = find_tokenizer(inputs_of(self.model.config).tokenizer), self.model.config.word_len
        tokens = tokenize("a " * words, words).tokens.to(device)
        shape = (images, several) if several > 1 else (images,)
        pixels = torch.randn(images, 3, side, side, device=device)
        pixels = pixels.contiguous(memory_format=self.layout)
        mask = (torch.rand(*shape, 1, side, side, device=device) > 0.5).float()
        with self.precision.autocast():
            loss = self.model(pixels, tokens.expand(*shape, -1), mask)[2]
        loss.backward()
        self.optimizer.step()
