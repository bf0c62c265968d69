"""What a training run writes while it runs: a progress bar, lines on the console, CSV files, TensorBoard."""

from __future__ import annotations

import csv
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO, cast

import torch

from fastris.evaluation.metrics import GENERALISED, PRECISION_LEVELS, Scores
from fastris.runtime.plain import printable
from fastris.training.curves import draw_curves
from fastris.training.trackers import open_trackers, picture_path


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, one row of `log.csv`.

    Attributes:
        step: optimizer steps so far, from 1; epoch, batch: where it is, both from 1.
        loss: mean over the batch; iou: the published training IoU, in [0, 1], of
            :func:`fastris.evaluation.metrics.batch_iou`.
        lr, lr_backbone: learning rates in this step, of the head and of the group before it (a model without one: the
            head's).
        images_per_s: images of this batch / seconds since the previous step, data loading included.
        memory_mib: peak GPU memory on CUDA, else the process's peak resident memory, in MiB.
        metrics: what the model tells of the step besides its loss, each a column of its own.
    """

    step: int
    epoch: int
    batch: int
    loss: float
    iou: float
    lr: float
    lr_backbone: float
    images_per_s: float
    memory_mib: int
    metrics: Mapping[str, float] = field(default_factory=dict)


STEP_COLUMNS = (*(f.name for f in fields(StepRecord) if f.name != "metrics"), "time")
VAL_COLUMNS = ("step", "epoch", "mIoU", "oIoU", *(f"Pr@{level}" for level in PRECISION_LEVELS), *GENERALISED,
               "expressions", "rule", "dataset", "split", "sentences", "time")  # fmt: skip


class CsvLog:
    """A CSV file that is appended to, with one row for each step, however often the run was resumed.

    Opening it drops the rows after `last_step` (a resumed run does those steps again) and a last line that a killed
    process left unfinished. Every row reaches the operating system at once, so that it outlives the process.

    Raises:
        ValueError: the file exists and has other columns.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], last_step: int):
        self.path, self.columns = path, columns
        self._rewrite(self._rows_up_to(last_step))
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns)

    def write(self, row: Mapping[str, Any]) -> None:
        with self._named_errors():
            self._writer.writerow({**row, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
            self._file.flush()

    def sync(self) -> None:
        """Make the rows so far outlive a power cut; called before a checkpoint that counts on them."""
        with self._named_errors():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # of a row that could not be written, which was an error then
            self._file.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno, f"could not write {self.path}: {error.strerror}; free some space, then go on with --resume"
            ) from error

    def _rows_up_to(self, last_step: int) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is not None and tuple(reader.fieldnames) != self.columns:
                raise ValueError(f"{self.path} has other columns than this version writes; move it away and resume")
            complete = [row for row in reader if all(row.get(c) for c in self.columns) and row["step"].isdigit()]
        return [row for row in complete if int(row["step"]) <= last_step]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        from fastris.weights.load import replacing

        with replacing(self.path) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


class _Lasting:
    """A stream for the console that outlives its terminal: where nobody is left to read, what is written is dropped.

    Otherwise a run whose terminal was closed would end by its next line, before it could save.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._dropped():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropped():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _dropped(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise


@dataclass(frozen=True)
class LogSettings:
    """What a run logs besides its CSV files.

    Attributes:
        options: text of `config.yaml`, from which the command can be repeated; empty for no such file.
        print_freq, tensorboard, wandb, progress: see :class:`RunLog`.
        held_out: text of `held_out.json`, which says what is validated on; empty for no such file.
    """

    options: str = ""
    print_freq: int = 100
    tensorboard: bool = False
    wandb: str | None = None
    progress: bool = True
    held_out: str = ""


class SilentLog:
    """Stands in for :class:`RunLog` where another process of the run keeps the log: every call does nothing."""

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class RunLog:
    """All of a run's logs behind one object; a context manager.

    Args:
        folder: gets `log.csv` (a row per step), `val.csv` (a row per validation), `curves.html`, which draws both, and
            `tensorboard/` if asked for.
        last_step: the step from which the run goes on, 0 for a new one; later rows of `log.csv` are dropped.
        last_validation: the same for `val.csv`; `last_step` where None.
        print_freq: steps between lines on the console.
        tensorboard, wandb, settings: see :func:`.trackers.open_trackers`. RuntimeError if a package is missing.
        progress: show a progress bar where standard error is a terminal.
        metrics: names of what the model tells of each step besides its loss; columns of `log.csv`.
        stream: where lines and the bar go; standard error by default.
    """

    def __init__(
        self,
        folder: Path,
        *,
        last_step: int = 0,
        last_validation: int | None = None,
        print_freq: int = 100,
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
        progress: bool = True,
        metrics: tuple[str, ...] = (),
        stream: TextIO | None = None,
    ):
        from rich.console import Console

        self.print_freq = print_freq
        self._folder = folder
        self._writer = open_trackers(folder, last_step, tensorboard=tensorboard, wandb=wandb, settings=settings)
        self.steps = CsvLog(folder / "log.csv", (*STEP_COLUMNS[:-1], *metrics, STEP_COLUMNS[-1]), last_step)
        self.validations = CsvLog(
            folder / "val.csv", VAL_COLUMNS, last_step if last_validation is None else last_validation
        )
        lasting = cast(TextIO, _Lasting(stream or sys.stderr))
        self.console = Console(file=lasting, soft_wrap=True, highlight=False, markup=False)
        self._show_bar = progress and self.console.is_terminal
        self._bar: Any = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._end_bar()
        self.steps.close()
        self.validations.close()
        if self._writer is not None:
            self._writer.close()

    def start_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None:
        """Show a bar for epoch `epoch` (from 1) of `epochs`, of which `done` of `batches` batches are behind us."""
        if not self._show_bar:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
        )
        self._bar.add_task(f"epoch {epoch}/{epochs}", total=batches, completed=done, numbers="")
        self._bar.start()

    def end_epoch(self) -> None:
        """Take the bar away, and draw the curves so far."""
        self._end_bar()
        draw_curves(self._folder)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def step(self, record: StepRecord) -> None:
        """Log one optimizer step everywhere."""
        values = asdict(record)
        metrics = values.pop("metrics")
        self.steps.write({**values, **metrics})
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, numbers=_numbers(record))
        if self.print_freq and record.step % self.print_freq == 0:
            where = f"epoch {record.epoch}  batch {record.batch}  step {record.step}"
            told = "".join(f"  {name} {value:.3g}" for name, value in metrics.items())
            self.note(f"{where}  {_numbers(record)}{told}  lr {record.lr:.3g}")
        if self._writer is not None:
            for name in ("loss", "iou", "lr", "lr_backbone", "images_per_s", "memory_mib"):
                self._writer.add_scalar(f"train/{name}", values[name], record.step)
            for name, value in metrics.items():
                self._writer.add_scalar(f"train/{name}", value, record.step)

    def validation(self, step: int, epoch: int, scores: Scores) -> None:
        """Log the scores of a validation after optimizer step `step`, in epoch `epoch` (from 1)."""
        values = {**scores.as_dict(), "step": step, "epoch": epoch}
        row = {name: values.get(name) for name in VAL_COLUMNS if name != "time"}
        self.validations.write({name: "-" if value is None else value for name, value in row.items()})
        self.note(f"epoch {epoch}  validation: {scores}")
        draw_curves(self._folder)
        if self._writer is not None:
            for name in ("mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", *GENERALISED):
                if values.get(name) is not None:
                    self._writer.add_scalar(f"val/{name}", values[name], step)
            self._writer.add_picture("val/predictions", picture_path(self._folder, epoch), step)

    def note(self, text: str) -> None:
        """A line on the console, above the bar if there is one."""
        self.console.print(f"{time.strftime('%H:%M:%S')}  {printable(text)}")

    def sync(self) -> None:
        """Make all rows so far durable."""
        self.steps.sync()
        self.validations.sync()


def memory_mib(device: torch.device) -> int:
    """Peak memory in MiB: PyTorch's on a CUDA device, else what the process kept resident (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def _numbers(record: StepRecord) -> str:
    return (
        f"loss {record.loss:.4f}  IoU {100 * record.iou:.1f} %  {record.images_per_s:.1f} images/s  "
        f"{record.memory_mib} MiB"
    )
