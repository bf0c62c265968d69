"""What a training run is made of, and how it goes to disk and comes back exactly."""

from __future__ import annotations

import random
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastris.optim import Precision

if TYPE_CHECKING:
    from fastris.models.cris import CRIS

LAST, BEST, LOG, OPTIONS = "last.pth", "best.pth", "log.csv", "config.yaml"


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        epoch: epochs finished; batch: batches of the next one that are finished.
        step: optimizer steps so far, over all epochs.
        best_iou: best validation mIoU so far, a fraction of 1.
        loss_sum, iou_sum: sums over the finished batches of the epoch; truncated: expressions cut in them.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_iou: float = 0.0
    loss_sum: float = 0.0
    iou_sum: float = 0.0
    truncated: int = 0

    def advance(self, loss: float, iou: float, truncated: int = 0) -> None:
        """One more batch, one more step."""
        self.batch += 1
        self.step += 1
        self.loss_sum += loss
        self.iou_sum += iou
        self.truncated += truncated

    def finish_epoch(self) -> None:
        """On to the first batch of the next epoch."""
        self.epoch += 1
        self.batch, self.loss_sum, self.iou_sum, self.truncated = 0, 0.0, 0.0, 0


@dataclass
class Run:
    """Everything that a training run changes as it goes, with what identifies it.

    Attributes:
        recipe: the settings that a resumed run must share, or it would be another run (:func:`check_same_recipe`).
        saved_step: the step that `last.pth` in `folder` is from.
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
        """Write `last.pth`: all that is needed to go on as if nothing had happened.

        Raises:
            RuntimeError: a weight is NaN or infinite; the file stays as it was.
        """
        from fastris.checkpoint import save_atomic
        from fastris.validation import card_of

        broken = [name for name, weight in self.model.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            raise RuntimeError(
                f"after step {self.position.step} {len(broken)} weights are not finite, {broken[0]} among them; "
                f"{self.folder / LAST} stays as it was at step {self.saved_step}. Start a new run from it (weight=...) "
                "with a lower base_lr, max_norm=1 or amp=off"
            )
        save_atomic(
            {
                **asdict(self.position),
                "config": self.model.config.to_dict(),
                "state_dict": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": rng_state(),
                "recipe": self.recipe,
                "card": card_of(self, None),
            },
            self.folder / LAST,
        )
        self.saved_step = self.position.step

    def save_best(self, scores: Mapping[str, Any], card: str = "") -> None:
        """Write `best.pth`: weights, configuration, scores and model card, which goes beside it as `README.md` too."""
        from fastris.checkpoint import save_atomic
        from fastris.modelcard import CARD, write_card

        content = {**asdict(self.position), "config": self.model.config.to_dict(), "scores": dict(scores), "card": card}
        save_atomic(content | {"state_dict": self.model.state_dict()}, self.folder / BEST)
        if card:
            write_card(self.folder / CARD, card)

    def restore(self, path: Path) -> None:
        """Go back to the state in `path`, random number generators included.

        Raises:
            ValueError: the file holds no training state, or one of a run with other settings.
        """
        from fastris.checkpoint import load_torch

        state = load_torch(path)
        needed = {"state_dict", "optimizer", "scheduler", "scaler", "rng", "recipe", "step", "batch"}
        lacking = sorted(needed - set(state)) if isinstance(state, dict) else sorted(needed)
        if lacking:
            raise ValueError(
                f"resume: {path} lacks {', '.join(lacking)}, so it is no state of a training run (that is in its "
                f"{LAST}); to start a new run from its weights, give weight={path} instead of resume"
            )
        check_same_recipe(path, state["recipe"], self.recipe)
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.position = Position(**{name: state[name] for name in asdict(Position())})
        self.saved_step = self.position.step
        restore_rng(state["rng"])


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


def find_checkpoint(folder: Path, resume: bool | str | None) -> Path | None:
    """The checkpoint to go on from, or None to start a new run in `folder`.

    `resume`: False or None for a new run; True for the folder's `last.pth`; "auto" for that if it is there, else a new
    run; or the path of a checkpoint or of another run's folder.

    Raises:
        ValueError: a new run would overwrite the one that the folder holds.
        FileNotFoundError: there is nothing to resume.
    """
    own = folder / LAST
    holds_run = own.exists() or (folder / BEST).exists() or _has_rows(folder / LOG)
    if not resume or (resume == "auto" and not own.exists()):
        if holds_run:
            raise ValueError(
                f"output_folder: {folder} already holds a run; go on with it by --resume, or choose another "
                "output_folder or exp_name for a new one"
            )
        return None
    path = own if resume is True or resume == "auto" else Path(resume).expanduser()
    path = path / LAST if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"resume: there is no checkpoint {path}; give resume=PATH of a {LAST}, or leave it out to start a new run"
        )
    if holds_run and path.resolve().parent != folder.resolve():
        raise ValueError(f"resume: {path} belongs to another run than the one in {folder}; choose a new output_folder")
    return path


def _has_rows(log: Path) -> bool:
    """Whether steps were taken: the header alone is what a run leaves that failed before its first one."""
    return log.exists() and len(log.read_bytes().splitlines()) > 1


def save_options(config: Any, folder: Path) -> None:
    """Write a command's options to `config.yaml`, so that `fastris train .../config.yaml --resume` repeats them."""
    import yaml

    from fastris.checkpoint import replacing

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


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's (CPU and CUDA) global random number generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of all global random number generators, in types that `weights_only=True` reads back."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Undo everything since :func:`rng_state`; CUDA states go to as many devices as there are."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
