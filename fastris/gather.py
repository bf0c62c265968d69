"""Sharing work between the processes of a distributed run, and putting its results together again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within this block the processes that `torchrun` started know each other; alone, it does nothing.

    `device`: what this process computes on. A group that is there already is used and left as it is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or rank_and_world()[1] > 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) where `torch.distributed` is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_all(work: Callable[[], Iterable[T]]) -> list[T]:
    """What `work` gives in every process, in the order of ranks, in every process.

    Every process must call it. An error in one of them is raised in all of them, so that none waits for ever: in the
    one where it happened as it is, in the others as a RuntimeError with its text. Items are pickled between processes.
    """
    world = rank_and_world()[1]
    if world == 1:
        return list(work())
    failure: Exception | None = None
    own: list[T] = []
    try:
        own = list(work())
    except Exception as error:
        failure = error
    everyones: list[Any] = [None] * world
    dist.all_gather_object(everyones, (own, failure and f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(everyones):
        if message is not None:
            raise RuntimeError(f"process {rank} failed: {message}")
    return [item for items, _ in everyones for item in items]
