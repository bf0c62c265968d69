"""`fastris train --find-batch`: search for the largest micro-batch that this GPU can train on, and print the option."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fastris.commands.assemble import choose_precision, make_optimizer, place_model
from fastris.runtime.device import choose_device, layout_for
from fastris.training.find_batch import HEADROOM, StepProbe, largest_that_fits
from fastris.training.gpu_settings import memory_of

if TYPE_CHECKING:
    from fastris.commands.train_options import TrainConfig


def run(options: TrainConfig) -> int:
    """Search, and print the option that the result asks for.

    Raises:
        ValueError: the device is no GPU, where there is no limit to find.
        RuntimeError: not even the smallest micro-batch fits.
    """
    device = choose_device(options.device)
    if device.type != "cuda":
        raise ValueError(
            f"find_batch searches for the limit of a GPU's memory, but device is {device}; run it where the GPU is"
        )
    torch.cuda.set_per_process_memory_fraction(1 - HEADROOM, device)
    probe = probe_of(options)
    print(f"searching on {torch.cuda.get_device_name(device)}, {100 * HEADROOM:.0f} % of its memory kept free")
    print(report(options, search(options, probe.fits)))
    return 0


def probe_of(options: TrainConfig) -> StepProbe:
    """Trial steps of the run that the options describe, from random weights."""
    precision = choose_precision(options)
    model = place_model(options, precision.device, with_weights=False).train()
    optimizer = make_optimizer(options, model, precision.device)
    return StepProbe(model, optimizer, precision, layout_for(precision.device), options.expressions_per_image)


def search(options: TrainConfig, fits: Callable[[int], bool]) -> int:
    """The largest micro-batch, up to the batch itself, that `fits`; prints each trial.

    Raises:
        RuntimeError: none does.
    """

    def tried(micro_batch: int) -> bool:
        good = fits(micro_batch)
        print(f"  {micro_batch:>4} references {'fit' if good else 'do not fit'}", flush=True)
        return good

    least = memory_of(options.system).smallest_part
    most = largest_that_fits(tried, options.batch_size, options.expressions_per_image, least)
    if most is None:
        raise RuntimeError(
            f"not even the smallest micro-batch fits this GPU with recompute={options.recompute} and "
            "this input_size; try recompute=stages, a smaller input_size or another GPU"
        )
    return most


def report(options: TrainConfig, most: int) -> str:
    """What the search found, and the option to use."""
    parts = options.parts_of(most)
    size = options.batch_size // parts
    whole = "the whole batch at once" if parts == 1 else f"{parts} parts of {size}"
    found = (
        f"the largest micro-batch that fits is {most} references (recompute={options.recompute}); batch_size="
        f"{options.batch_size} in equal parts: {whole}\nuse:  accumulate={parts}"
    )
    if not memory_of(options.system).statistics:
        return found
    return f"{found}\nBatchNorm's statistics follow the micro-batch: they are over {size} references"
