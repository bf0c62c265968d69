"""The batches of an epoch: workers read them ahead, and a sample that cannot be read is known one step early."""

from __future__ import annotations

import re
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fastris.data.samples import EpochSampler, TrainSamples, digest, worker_init
from fastris.data.tokens import PAD
from fastris.runtime.interrupt import leave_signals_to_parent
from fastris.runtime.randomness import drawing_from

Batch = dict[str, Tensor]

_DRAWS = 1  # sets what a sample draws apart from the choice of its sentence


@dataclass(frozen=True)
class Unreadable:
    """A sample that could not be read: what the data set said, and where."""

    index: int
    message: str
    where: str


@dataclass(frozen=True)
class DeadWorker:
    """A process that read samples has died: how, and what may help."""

    message: str


class Feed:
    """The batches of an epoch, from where the sampler stands; the one that comes next is always read already.

    So a sample that cannot be read is known one step early, while every weight is still as the last step left it:
    `failure` is set then, and the iteration ends. The death of a worker process is such a failure, too. PyTorch tells
    of it by an exception wherever the main process happens to be, half a step done, say; within the context that a
    feed is, it is told here and between two steps.
    """

    def __init__(self, samples: TrainSamples, sampler: EpochSampler, workers: int, device: torch.device):
        """A new loader, so that its workers know the epoch; it draws from no global random numbers."""
        self.failure: Unreadable | DeadWorker | None = None
        self._death: RuntimeError | None = None
        self._waiting = False
        self._tell: Any = None  # PyTorch's handler of SIGCHLD
        self._batches = iter(
            DataLoader(
                _Reported(samples),
                batch_sampler=sampler,
                num_workers=workers,
                collate_fn=_collate,
                pin_memory=device.type == "cuda",
                worker_init_fn=_init_worker,
                generator=torch.Generator(),
            )
        )
        self._workers = workers
        self._next = self._read()

    def __enter__(self) -> Feed:
        if self._workers and threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGCHLD)
            if callable(previous):
                self._tell = previous
                signal.signal(signal.SIGCHLD, self._child_has_ended)
        return self

    def __exit__(self, *error: object) -> None:
        if self._tell is not None:
            signal.signal(signal.SIGCHLD, self._tell)

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self._next) is not None:
            self._next = self._read()
            yield batch

    def _read(self) -> Batch | None:
        try:
            batch = self._wait_for_batch()
        except RuntimeError as error:
            if (death := dead_worker(error)) is None:
                raise
            self.failure = DeadWorker(death)
            return None
        if isinstance(batch, Unreadable):
            self.failure = batch
            return None
        return batch

    def _wait_for_batch(self) -> Batch | Unreadable | None:
        self._waiting = True
        try:
            if self._death is not None:
                raise self._death
            return next(self._batches, None)
        finally:
            self._waiting = False

    def _child_has_ended(self, number: int, frame: Any) -> None:
        try:
            self._tell(number, frame)
        except RuntimeError as error:
            if dead_worker(error) is None or self._waiting:
                raise
            self._death = error


def dead_worker(error: BaseException) -> str | None:
    """A message for the user if PyTorch's error is about a data loading process that has died; else None."""
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", str(error))
    if not isinstance(error, RuntimeError) or found is None:
        return None
    reason = found[2].split(". ")[0].rstrip(". ")
    return (
        f"process {found[1]}, which reads training images, {reason}; often the machine's memory was full, or /dev/shm "
        "(in Docker: --shm-size). Fewer of them (workers=...) need less"
    )


def count_cut(samples: TrainSamples, batch: dict[str, Tensor]) -> int:
    """Number of the batch's expressions that were cut: rows without padding that are the tokens of a cut sentence."""
    cut = 0
    for index, row in zip(batch["index"].flatten().tolist(), batch["tokens"].flatten(0, -2), strict=True):
        if row[-1] != PAD:
            rows, truncated = samples.tokenize(samples.sentences(index))
            cut += any(flag and torch.equal(row, other) for other, flag in zip(rows, truncated, strict=True))
    return cut


class _Reported(Dataset):
    """Training samples, or an :class:`Unreadable` instead of an exception, whose message PyTorch would bury.

    What a data set draws from the global generators (an augmentation, say) is decided by (seed, epoch, index) alone,
    as is the sentence: it is the same in every worker, and when a resumed run reads the sample again.
    """

    def __init__(self, samples: TrainSamples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any] | Unreadable:
        try:
            with drawing_from(digest(self.samples.seed, self.samples.epoch, index, _DRAWS)):
                return self.samples[index]
        except Exception as error:
            return Unreadable(index, str(error) or type(error).__name__, traceback.format_exc())


def _collate(items: list[dict[str, Any] | Unreadable]) -> Batch | Unreadable:
    failed = next((item for item in items if isinstance(item, Unreadable)), None)
    return default_collate(items) if failed is None else failed


def _init_worker(worker_id: int) -> None:
    leave_signals_to_parent()
    worker_init(worker_id)
