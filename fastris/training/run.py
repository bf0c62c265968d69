"""What a training run is made of, and how it goes to disk and comes back exactly."""

from __future__ import annotations

import math
import shlex
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastris.data.samples import digest
from fastris.runtime import distributed
from fastris.runtime.device import Precision
from fastris.runtime.randomness import restore_rng, rng_state, seed_everything
from fastris.runtime.runlock import locked
from fastris.training.skipped import MEND_NOT_FINITE, Statistics

if TYPE_CHECKING:
    from fastris.models.cris.model import CRIS

LAST, PREVIOUS, BEST, LOG, OPTIONS = "last.pth", "previous.pth", "best.pth", "log.csv", "config.yaml"


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        epoch: epochs finished; batch: batches of the next one that are finished.
        step: optimizer steps so far, over all epochs.
        best_iou: best validation mIoU so far, a fraction of 1.
        loss_sum, iou_sum: sums over the finished batches of the epoch; truncated: expressions cut in them.
        skipped: batches among them that were left out because their loss or gradient was not finite.
        skipped_in_a_row: how many of the latest batches were, across epochs.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_iou: float = 0.0
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
        """Over the batches of the epoch that made a step; NaN where none did."""
        return self.loss_sum / steps if (steps := self.batch - self.skipped) else math.nan

    @property
    def mean_iou(self) -> float:
        """As :attr:`mean_loss`, of the training IoU."""
        return self.iou_sum / steps if (steps := self.batch - self.skipped) else math.nan


@dataclass
class Run:
    """Everything that a training run changes as it goes, with what identifies it.

    Attributes:
        model: the model itself; replica: what a training step calls, which in several processes is DDP around it.
        statistics: a copy of the model's buffers, for steps that are taken back.
        recipe: the settings that a resumed run must share, or it would be another run (:func:`check_same_recipe`).
        saved_step: the step that `last.pth` in `folder` is from.
        last_is_good: whether that file may become `previous.pth`; not if it was found damaged.
    """

    folder: Path
    model: CRIS
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    precision: Precision
    recipe: dict[str, Any]
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

    def replicate(self) -> None:
        """Make steps train on all processes' batches together, from the main process's weights."""
        self.replica = distributed.replicate(self.model, self.precision.device)
        self.statistics = Statistics(self.model)

    def keeping_gradients_here(self, more_to_come: bool) -> AbstractContextManager[Any]:
        """For all but the last part of a batch: its gradients stay in the process until the last part's are there."""
        if more_to_come and isinstance(self.replica, nn.parallel.DistributedDataParallel):
            return self.replica.no_sync()
        return nullcontext()

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rate by parameter group, "backbone" and "head"."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def finish_epoch(self) -> None:
        """On to the first batch of the next epoch, and to its learning rates."""
        self.position.finish_epoch()
        with warnings.catch_warnings():
            # PyTorch misses an optimizer step where a run was resumed at the very end of an epoch.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def save_last(self) -> None:
        """Write `last.pth`: all that is needed to go on as if nothing had happened. The one before is `previous.pth`.

        All processes call it, the main one writes, and none goes on before it has.

        Raises:
            RuntimeError: a weight or statistic is NaN or infinite; the file stays as it was.
            OSError: the disk is full or the folder not writable; the file stays as it was.
        """
        rngs = distributed.gather(rng_state(self.precision.device))
        with distributed.together():
            if distributed.is_main():
                self._write_last(rngs)
        self.saved_step = self.position.step

    def _write_last(self, rngs: list[dict[str, Any]]) -> None:
        from fastris.training.validation import card_of
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
            "card": card_of(self, None),
        }
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
        """Write `best.pth`: weights, configuration, scores and model card, which goes beside it as `README.md` too."""
        from fastris.weights.card import CARD, write_card
        from fastris.weights.load import save_atomic

        content = {**asdict(self.position), "config": self.model.config.to_dict(), "scores": dict(scores), "card": card}
        with distributed.together():
            if distributed.is_main():
                save_atomic(content | {"state_dict": self.model.state_dict()}, self.folder / BEST)
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


class SavedState(NamedTuple):
    """What :meth:`Run.save_last` has written, read back from `path`; `note` says if another file was damaged."""

    path: Path
    content: dict[str, Any]
    note: str = ""

    @property
    def processes(self) -> int:
        """Number of processes of the run that wrote it."""
        return 1 + len(self.content.get("rng_of_others", []))

    @classmethod
    def read(cls, path: Path) -> SavedState:
        """Read `path`; where it is the `last.pth` of a run and damaged, the `previous.pth` beside it.

        Every byte is held against the file's checksums.

        Raises:
            ValueError: the file is damaged and there is no other one, or it holds no training state.
        """
        from fastris.weights.load import load_torch

        previous, note = path.with_name(PREVIOUS), ""
        try:
            state = load_torch(path)
        except ValueError as error:
            if path.name != LAST or not previous.is_file():
                raise
            try:
                state = load_torch(previous)
            except ValueError as worse:
                raise ValueError(f"{error}. And {worse}; or start a new run in another folder") from worse
            note = f"{error}. Going on from the checkpoint before it, {previous}"
            path = previous
        needed = {"state_dict", "optimizer", "scheduler", "scaler", "rng", "recipe", "step", "batch"}
        lacking = sorted(needed - set(state)) if isinstance(state, dict) else sorted(needed)
        if lacking:
            raise ValueError(
                f"resume: {path} lacks {', '.join(lacking)}, so it is no state of a training run (that is in its "
                f"{LAST}); to start a new run from its weights, give weight={path} instead of resume"
            )
        return cls(path, state, note)


def check_same_recipe(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError that names every setting in which a checkpoint and the run that wants to resume from it differ."""
    names = sorted(saved.keys() | now.keys())
    changed = [
        f"{name}={saved.get(name)!r}, now {now.get(name)!r}" for name in names if saved.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"resume: {path} was trained with {'; '.join(changed)}. These settings change the run: give the same ones, "
            f"or start a new run in another folder from its weights with weight={path}"
        )


@contextmanager
def own_folder(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Within this block `folder` is this run's alone. The main process takes it, on behalf of all of them.

    What killed runs left there half written goes. `patience`: seconds to wait for a run that has the folder; a file
    server may take that long to notice that the machine of a killed one is gone.

    Raises:
        ValueError: another run has it.
        OSError: nothing can be written into it.
    """
    with ExitStack() as stack:
        with distributed.together():
            if distributed.is_main():
                _check_writable(folder)
                if stack.enter_context(locked(folder, ("output_folder", "exp_name"), patience)):
                    _clear(folder)
        yield


def _clear(folder: Path) -> None:
    from fastris.runtime.storage import remove_leftovers
    from fastris.weights.card import CARD

    for name in (LAST, PREVIOUS, BEST, LOG, "val.csv", OPTIONS, CARD):
        remove_leftovers(folder / name)


def find_checkpoint(folder: Path, resume: bool | str | None, restarted: bool = False) -> Path | None:
    """The checkpoint to go on from, or None to start a new run in `folder`.

    `resume`: False or None for a new run; True for the folder's `last.pth`; "auto" for that if it is there, else a new
    run; or the path of a checkpoint or of another run's folder. Where `torchrun` has `restarted` the processes, the
    folder's own checkpoint is the one, whatever `resume` says.

    Of a folder that others may write into the answer can be out of date: call it within :func:`own_folder`.

    Raises:
        ValueError: a new run would overwrite the one that the folder holds.
        FileNotFoundError: there is nothing to resume.
    """
    own = _newest(folder)
    holds_run = own.exists() or (folder / BEST).exists() or _has_rows(folder / LOG)
    if restarted and own.exists():
        return own
    if not resume or (resume == "auto" and not own.exists()):
        if holds_run:
            raise ValueError(
                f"output_folder: {folder} already holds a run; go on with it by --resume, or choose another "
                "output_folder or exp_name for a new one"
            )
        return None
    path = own if resume is True or resume == "auto" else Path(resume).expanduser()
    path = _newest(path) if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"resume: there is no checkpoint {path}; give resume=PATH of a {LAST}, or leave it out to start a new run"
        )
    if holds_run and path.resolve().parent != folder.resolve():
        raise ValueError(f"resume: {path} belongs to another run than the one in {folder}; choose a new output_folder")
    return path


def _newest(folder: Path) -> Path:
    """The folder's `last.pth`, or its `previous.pth` where there is only that."""
    return folder / (PREVIOUS if (folder / PREVIOUS).exists() and not (folder / LAST).exists() else LAST)


def _check_writable(folder: Path) -> None:
    """OSError, before any work is done, where a checkpoint could not be written later. Creates nothing that stays."""
    existing = next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"output_folder: nothing can be written into {existing} ({error.strerror}), so no checkpoint could be "
            "saved; choose another output_folder",
        ) from error


def _has_rows(log: Path) -> bool:
    """Whether steps were taken: the header alone is what a run leaves that failed before its first one."""
    return log.exists() and len(log.read_bytes().splitlines()) > 1


def save_options(config: Any, folder: Path) -> None:
    """Write a command's options to `config.yaml`, so that `fastris train .../config.yaml --resume` repeats them."""
    import yaml

    from fastris.weights.load import replacing

    values = asdict(config)
    values.update(values.pop("extra"))
    values.pop("resume")
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
    with replacing(folder / OPTIONS) as path:
        path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def resume_command(folder: Path) -> str:
    """The command line that continues the run in `folder`."""
    return f"fastris train {shlex.quote(str(folder / OPTIONS))} --resume"
