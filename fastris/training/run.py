"""The state of a training run: what changes as it goes, and how that is saved and restored exactly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastris.data.samples import digest
from fastris.models import ancestry
from fastris.runtime import distributed
from fastris.runtime.device import Precision
from fastris.runtime.randomness import restore_rng, rng_state, seed_everything
from fastris.training.averaging import AveragedWeights
from fastris.training.checkpoints import BEST, LAST, PREVIOUS, SavedState, check_same_recipe
from fastris.training.freezing import set_training
from fastris.training.optim import Schedule

if TYPE_CHECKING:
    from fastris.models.base import ReferringModel

MEND_NOT_FINITE = "Start a new run from it (weight=...) with a lower base_lr, max_norm=1 or amp=off"


class Statistics:
    """A copy of a model's buffers, so that a batch that is left out leaves no trace in BatchNorm's running statistics.

    One NaN there would stay for good: the model would train on and never evaluate to anything.
    """

    def __init__(self, model: nn.Module):
        self.buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.kept: Tensor | None = None

    def keep(self) -> None:
        """Copy the buffers as they are now."""
        if self.buffers:
            self.kept = torch.cat([buffer.flatten() for buffer in self.buffers])

    @torch.no_grad()
    def restore(self) -> None:
        """Set the buffers to what they were at the last :meth:`keep`."""
        if self.kept is not None:
            for buffer, kept in zip(self.buffers, self.kept.split([b.numel() for b in self.buffers]), strict=True):
                buffer.copy_(kept.view_as(buffer))


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        epoch: epochs finished; batch: batches of the next one that are finished.
        step: optimizer steps so far, over all epochs.
        best_iou: best validation mIoU so far, a fraction of 1; stale: validations since it was found.
        loss_sum, iou_sum: sums over the finished batches of the epoch; truncated: expressions cut in them.
        skipped: batches among them that were left out because their loss or gradient was not finite.
        skipped_in_a_row: how many of the latest batches were, across epochs.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_iou: float = 0.0
    stale: int = 0
    loss_sum: float = 0.0
    iou_sum: float = 0.0
    truncated: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def advance(self, loss: float, iou: float, truncated: int = 0) -> None:
        """One more batch, one more step."""
        self.skipped_in_a_row = 0
        self.batch += 1
        self.step += 1
        self.loss_sum += loss
        self.iou_sum += iou
        self.truncated += truncated

    def skip(self) -> None:
        """One more batch, but no step."""
        self.batch += 1
        self.skipped += 1
        self.skipped_in_a_row += 1

    def finish_epoch(self) -> None:
        """On to the first batch of the next epoch."""
        self.epoch += 1
        self.batch, self.loss_sum, self.iou_sum, self.truncated, self.skipped = 0, 0.0, 0.0, 0, 0

    @property
    def mean_loss(self) -> float:
        """Mean loss of the epoch so far, over the batches that made a step; NaN where none did."""
        return self.loss_sum / steps if (steps := self.batch - self.skipped) else math.nan

    @property
    def mean_iou(self) -> float:
        """Mean training IoU of the epoch so far, over the same batches as :attr:`mean_loss`."""
        return self.iou_sum / steps if (steps := self.batch - self.skipped) else math.nan


@dataclass
class Run:
    """Everything that a training run changes as it goes, with what identifies it.

    Attributes:
        model: the model itself; replica: what a training step calls, which in several processes is DDP around it.
        statistics: a copy of the model's buffers, for steps that are taken back.
        layout: of images and weights in memory.
        recipe: the settings that a resumed run must share, or it would be another run (:func:`check_same_recipe`).
        average: of the weights, which is then validated and kept as the best; None: the weights themselves are.
        frozen: the stages that are not trained; see :func:`.freezing.freeze`.
        data_id: of the training data on the Hugging Face hub, for the model card; empty for other data.
        rates_by_step: whether the learning rates change after every step, or else after every epoch.
        saved_step: the step that `last.pth` in `folder` is from.
        last_is_good: whether that file may become `previous.pth`; not if it was found damaged.
    """

    folder: Path
    model: ReferringModel
    optimizer: Optimizer
    scheduler: Schedule
    scaler: torch.amp.GradScaler
    precision: Precision
    layout: torch.memory_format
    recipe: dict[str, Any]
    rates_by_step: bool = False
    average: AveragedWeights | None = None
    frozen: tuple[str, ...] = ()
    data_id: str = ""
    position: Position = field(default_factory=Position)
    saved_step: int = 0
    last_is_good: bool = True
    replica: nn.Module = field(init=False)
    statistics: Statistics = field(init=False)

    def __post_init__(self) -> None:
        self.replica, self.statistics = self.model, Statistics(self.model)

    @property
    def last(self) -> Path:
        """Where `last.pth` is."""
        return self.folder / LAST

    @property
    def shown(self) -> ReferringModel:
        """The model that is validated, drawn and kept as the best: the averaged one where there is an average."""
        return self.model if self.average is None else self.average.model

    def train(self) -> None:
        """Put the model into training mode, as far as it is trained."""
        set_training(self.model, self.frozen)

    def replicate(self) -> None:
        """Make steps train on all processes' batches together, from the main process's weights."""
        self.replica = distributed.replicate(self.model, self.precision.device)
        self.statistics = Statistics(self.model)

    def keeping_gradients_here(self, more_to_come: bool) -> AbstractContextManager[Any]:
        """The context of one part's backward pass: processes exchange gradients only in that of a batch's last part."""
        if more_to_come and isinstance(self.replica, nn.parallel.DistributedDataParallel):
            return self.replica.no_sync()
        return nullcontext()

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rate by parameter group."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def follow(self) -> None:
        """Let the average follow a step that was just made."""
        if self.average is not None:
            self.average.update(self.model, self.position.step)

    def finish_batch(self) -> None:
        """On to the learning rates of the next batch, whether or not this one made a step."""
        if self.rates_by_step:
            self._change_rates()

    def finish_epoch(self) -> None:
        """On to the first batch of the next epoch, and to its learning rates."""
        self.position.finish_epoch()
        if not self.rates_by_step:
            self._change_rates()

    def _change_rates(self) -> None:
        with warnings.catch_warnings():
            # PyTorch misses an optimizer step where a run was resumed at the very end of an epoch.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def save_last(self, card: str = "") -> None:
        """Write `last.pth`: all that is needed to go on as if nothing had happened. The one before is `previous.pth`.

        All processes call it, the main one writes, and none goes on before it has. `card`: the weights' model card.

        Raises:
            RuntimeError: a weight or statistic is NaN or infinite; the file stays as it was.
            OSError: the disk is full or the folder not writable; the file stays as it was.
        """
        rngs = distributed.gather(rng_state(self.precision.device))
        with distributed.together():
            if distributed.is_main():
                self._write_last(rngs, card)
        self.saved_step = self.position.step

    def _write_last(self, rngs: list[dict[str, Any]], card: str) -> None:
        from fastris.weights.load import save_atomic

        self._check_finite()
        state = {
            **asdict(self.position),
            "config": self.model.config.to_dict(),
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rngs[0],
            "rng_of_others": rngs[1:],
            "recipe": self.recipe,
            "card": card,
        }
        if self.model.ancestry:
            state["ancestry"] = ancestry.to_plain(self.model.ancestry)
        if metrics := self.model.metrics_state():
            state["metrics"] = metrics
        if self.average is not None:
            state["average"] = self.average.state_dict()
        save_atomic(state, self.folder / LAST, keep=self.folder / PREVIOUS if self.last_is_good else None)
        self.last_is_good = True

    def _check_finite(self) -> None:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        broken = [name for name, weight in named if not torch.isfinite(weight).all()]
        if broken:
            raise RuntimeError(
                f"after step {self.position.step} {len(broken)} weights are not finite, {broken[0]} among them; "
                f"{self.folder / LAST} stays as it was at step {self.saved_step}. {MEND_NOT_FINITE}"
            )

    def save_best(self, scores: Mapping[str, Any], card: str = "") -> None:
        """Write `best.pth`: weights, configuration, scores and model card, which goes beside it as `README.md` too.

        Without what only training uses, so that others can load it.
        """
        from fastris.weights.card import CARD, write_card
        from fastris.weights.load import save_atomic

        config = self.model.config.for_others().to_dict()
        content = {**asdict(self.position), "config": config, "scores": dict(scores), "card": card}
        with distributed.together():
            if distributed.is_main():
                save_atomic(content | {"state_dict": self.shown.state_for_others()}, self.folder / BEST)
                if card:
                    write_card(self.folder / CARD, card)

    def restore(self, saved: SavedState) -> None:
        """Go back to a saved state, random number generators included.

        Raises:
            ValueError: it is of a run with other settings.
        """
        state = saved.content
        check_same_recipe(saved.path, state["recipe"], self.recipe)
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.model.ancestry = ancestry.from_plain(state.get("ancestry"))
        if "metrics" in state:
            self.model.restore_metrics(state["metrics"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.position = Position(**{name: state.get(name, start) for name, start in asdict(Position()).items()})
        self.saved_step = self.position.step
        self.last_is_good = not saved.note
        self._warn_of(saved)
        rngs = [state["rng"], *state.get("rng_of_others", [])]
        if distributed.rank() < len(rngs):
            restore_rng(rngs[distributed.rank()], self.precision.device)
        else:
            seed_everything(digest(self.recipe["manual_seed"], distributed.rank(), self.position.step))

    def _warn_of(self, saved: SavedState) -> None:
        then, now = saved.processes, distributed.world_size()
        notes = [saved.note] if saved.note else []
        if then != now:
            notes.append(
                f"{saved.path} was saved by {then} process(es) and goes on in {now}: the batches stay the same, but "
                "dropout draws other numbers"
            )
        for note in notes if distributed.is_main() else ():
            warnings.warn(note, stacklevel=3)
