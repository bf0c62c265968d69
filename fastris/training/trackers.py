"""Experiment trackers beside the CSV logs: TensorBoard and Weights & Biases, each only if asked for."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


def picture_path(folder: Path, epoch: int) -> Path:
    """Where the predictions after epoch `epoch` (from 1) are drawn."""
    return folder / "predictions" / f"epoch_{epoch:03d}.png"


class Tracker(Protocol):
    """The interface of a tracker: it is given numbers by name and step, and pictures."""

    def add_scalar(self, name: str, value: float, step: int) -> None: ...

    def add_picture(self, name: str, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Several trackers behind the interface of one."""

    def __init__(self, trackers: list[Tracker]):
        self.trackers = trackers

    def add_scalar(self, name: str, value: float, step: int) -> None:
        for tracker in self.trackers:
            tracker.add_scalar(name, value, step)

    def add_picture(self, name: str, path: Path, step: int) -> None:
        """A PNG; nothing happens where there is no such file."""
        for tracker in self.trackers if path.is_file() else ():
            tracker.add_picture(name, path, step)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def open_trackers(
    folder: Path,
    last_step: int,
    *,
    tensorboard: bool = False,
    wandb: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Trackers | None:
    """The trackers that were asked for, or None.

    Args:
        folder: of the run. last_step: the step from which it goes on, 0 for a new one.
        tensorboard: write event files to `folder/tensorboard`.
        wandb: the name of a Weights & Biases project. settings: of the run, shown there.

    Raises:
        RuntimeError: the package is not installed.
    """
    trackers: list[Tracker] = []
    if tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard", last_step))
    if wandb:
        trackers.append(WeightsAndBiases(folder, last_step, wandb, settings or {}))
    return Trackers(trackers) if trackers else None


class TensorBoard:
    """Event files for TensorBoard; a resumed run's later events are taken back."""

    def __init__(self, folder: Path, last_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard=true", "tensorboard") from None
        self._writer: Any = SummaryWriter(str(folder), purge_step=last_step + 1)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def add_picture(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a Weights & Biases project; the run's folder remembers its id, so that a resumed run goes on there.

    Steps that a resumed run does again are already there, with the same numbers, and wandb leaves them as they are.
    """

    def __init__(self, folder: Path, last_step: int, project: str, settings: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise _missing(f"wandb={project}", "wandb") from None
        self._module = wandb
        folder.mkdir(parents=True, exist_ok=True)
        remembered = folder / "wandb_id.txt"
        if not last_step or not remembered.is_file():
            remembered.write_text(uuid.uuid4().hex[:16] + "\n", encoding="utf-8")
        self._run: Any = wandb.init(
            project=project,
            name=folder.name,
            id=remembered.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._run.log({name: value}, step=step)

    def add_picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._module.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _missing(option: str, package: str) -> RuntimeError:
    return RuntimeError(
        f"{option} needs the package {package}, which is not installed; "
        f"run pip install 'fastris[{package}]', or leave the option out (log.csv holds the same numbers)"
    )
