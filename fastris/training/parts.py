"""The parts that a training run is put together from; :func:`.loop.train` and all that it calls know nothing else.

`fastris.commands.assemble` makes them from a command's options, in one place; a program of your own may make them from
anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastris.data.samples import EpochSampler, TrainSamples
from fastris.runtime.interrupt import StopSignal
from fastris.training.gpu_settings import MemoryUse
from fastris.training.log import LogSettings
from fastris.training.run import Run
from fastris.training.validation import Validation


@dataclass(frozen=True)
class Plan:
    """How long a run trains, and how a step is made.

    Attributes:
        epochs: passes over the training data; max_steps: end after so many optimizer steps, 0 for no such end.
        batch_size: references in a step, over all processes.
        accumulate: parts that each process's share of a batch is split into.
        max_norm: gradients are clipped to this norm; 0 for no clipping.
        max_skipped: batches in a row that may be left out, because they are not finite, before the run ends.
        patience: validations without a better score after which the run ends; 0 for no such end.
        save_every_steps: steps between writings of `last.pth` within an epoch; 0 for none.
    """

    epochs: int
    batch_size: int
    accumulate: int = 1
    max_norm: float = 0.0
    max_skipped: int = 10
    max_steps: int = 0
    patience: int = 0
    save_every_steps: int = 0

    def out_of_steps(self, step: int) -> bool:
        """Whether no step is left after `step` of them."""
        return bool(self.max_steps) and step >= self.max_steps

    def out_of_patience(self, stale: int) -> bool:
        """Whether the last `stale` validations are as many as the run bears without a better score."""
        return bool(self.patience) and stale >= self.patience

    def saves_after(self, step: int) -> bool:
        """Whether `last.pth` is written after this step, in the middle of an epoch."""
        return bool(self.save_every_steps) and step % self.save_every_steps == 0


@dataclass(frozen=True)
class Batches:
    """What a run trains on: the samples, which of them make a batch, and the number of processes that read them."""

    samples: TrainSamples
    sampler: EpochSampler
    workers: int = 0


@dataclass(frozen=True)
class Parts:
    """Everything that :func:`.loop.train` needs.

    Attributes:
        run: model, optimizer, precision and all else that is saved, as a new run or a checkpoint has it.
        is_new: whether the run has no checkpoint yet.
        validation: None to train without one.
        memory: what the error says that tells of a batch that does not fit.
        stop: asks the loop to stop after a step; see :func:`.notices.stop_signal`.
        ignored: keys of an options file that mean nothing here, to be told.
        notices: what was made to fit the data, to be told.
    """

    plan: Plan
    run: Run
    batches: Batches
    validation: Validation | None
    log: LogSettings
    memory: MemoryUse
    stop: StopSignal
    is_new: bool = True
    ignored: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
