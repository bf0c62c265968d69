"""`fastris train --find-batch`: the largest micro-batch that this GPU can train on, found by trying."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fastris.data.tokens import find_tokenizer
from fastris.models.inputs import inputs_of
from fastris.runtime.device import Precision, choose_device, layout_for
from fastris.training.gpu_settings import fused_on, parts_for, set_recompute
from fastris.training.optim import build_optimizer

if TYPE_CHECKING:
    from fastris.training.recipe import TrainConfig

LEAST = 2
"""References in the smallest micro-batch: BatchNorm over sentences needs two."""

HEADROOM = 0.05
"""Share of the GPU's memory that is left free, because a long run's memory is more fragmented than a trial's."""


def largest_that_fits(fits: Callable[[int], bool], most: int, step: int = 1) -> int | None:
    """The largest n up to `most` for which `fits(n)`, by doubling, then bisection; None if not even the first fits.

    n goes over the multiples of `step` from :data:`LEAST` on. `fits` must be monotone: what fits, fits smaller too.
    """
    first = -(-LEAST // step) * step
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


class StepProbe:
    """Trial steps of the run that `config` describes, with noise for images: what counts is how much they allocate.

    A step is forward, backward and the optimizer's update, done twice, because the optimizer's state only exists after
    the first.
    """

    def __init__(self, config: TrainConfig):
        from fastris.training.loop import build_model

        self.config = config
        self.device = choose_device(config.device)
        self.precision = Precision.choose(config.amp, self.device)
        self.layout = layout_for(self.device)
        self.model = build_model(config, with_weights=False).to(self.device).to(memory_format=self.layout).train()
        set_recompute(self.model, config.recompute)
        self.optimizer = build_optimizer(
            self.model, config.base_lr, config.lr_multi, fused=fused_on(config, self.device)
        )

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
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def step(self, micro_batch: int) -> None:
        """One training step on `micro_batch` references, each with a sentence of full length."""
        several, side = self.config.expressions_per_image, self.model.config.input_size
        images = micro_batch // several
        tokenize, words = find_tokenizer(inputs_of(self.model.config).tokenizer), self.model.config.word_len
        tokens = tokenize("a " * words, words).tokens.to(self.device)
        shape = (images, several) if several > 1 else (images,)
        pixels = torch.randn(images, 3, side, side, device=self.device)
        pixels = pixels.contiguous(memory_format=self.layout)
        mask = (torch.rand(*shape, 1, side, side, device=self.device) > 0.5).float()
        with self.precision.autocast():
            loss = self.model(pixels, tokens.expand(*shape, -1), mask)[2]
        loss.backward()
        self.optimizer.step()


def run(config: TrainConfig) -> int:
    """Search, and print the option that the result asks for.

    Raises:
        ValueError: the device is no GPU, where there is no limit to find.
        RuntimeError: not even the smallest micro-batch fits.
    """
    device = choose_device(config.device)
    if device.type != "cuda":
        raise ValueError(
            f"find_batch searches for the limit of a GPU's memory, but device is {device}; run it where the GPU is"
        )
    torch.cuda.set_per_process_memory_fraction(1 - HEADROOM, device)
    probe = StepProbe(config)
    print(f"searching on {torch.cuda.get_device_name(device)}, {100 * HEADROOM:.0f} % of its memory kept free")
    print(report(config, search(config, probe.fits)))
    return 0


def search(config: TrainConfig, fits: Callable[[int], bool]) -> int:
    """The largest micro-batch, up to the batch itself, that `fits`; prints each trial.

    Raises:
        RuntimeError: none does.
    """

    def tried(micro_batch: int) -> bool:
        good = fits(micro_batch)
        print(f"  {micro_batch:>4} references {'fit' if good else 'do not fit'}", flush=True)
        return good

    most = largest_that_fits(tried, config.batch_size, config.expressions_per_image)
    if most is None:
        raise RuntimeError(
            f"not even the smallest micro-batch fits this GPU with recompute={config.recompute} and "
            "this input_size; try recompute=stages, a smaller input_size or another GPU"
        )
    return most


def report(config: TrainConfig, most: int) -> str:
    """What the search found, and the option to use."""
    parts = parts_for(config.batch_size, most, multiple_of=config.expressions_per_image)
    size = config.batch_size // parts
    whole = "the whole batch at once" if parts == 1 else f"{parts} parts of {size}"
    return (
        f"the largest micro-batch that fits is {most} references (recompute={config.recompute}); batch_size="
        f"{config.batch_size} in equal parts: {whole}\nuse:  accumulate={parts}\n"
        f"BatchNorm's statistics follow the micro-batch: they are over {size} references"
    )
