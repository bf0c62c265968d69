"""One run in several processes, one for each GPU, as `torchrun` starts them.

In a process that runs alone every function here does nothing, or what its name says for one process. A run of several
follows two rules. What is decided by looking at files or the clock is decided by the main process (:func:`from_main`).
And an error on one side of a wait must reach the other side: a block under :func:`together` is left by all processes,
or by none.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastris.runtime.processes import (
    LostProcess,
    StoppedElsewhere,
    has_group,
    is_main,
    local_rank,
    local_world_size,
    rank,
    report,
    restarted,
    world_size,
)

__all__ = [
    "LostProcess",
    "StoppedElsewhere",
    "from_main",
    "gather",
    "has_group",
    "is_main",
    "joined",
    "local_rank",
    "local_world_size",
    "lost_process",
    "rank",
    "replicate",
    "report",
    "restarted",
    "sum_over_processes",
    "together",
    "world_size",
]

T = TypeVar("T")

_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Timed out|TCPStore|failed to recv|socket", re.I)


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[None]:
    """Within this block the processes that `torchrun` started can exchange tensors and objects.

    gloo carries what lies on CPUs, NCCL what lies on GPUs. A group that the caller has made is used as it is and left
    alone; it must be able to carry CPU tensors.

    Args:
        device: what this process computes on.
        timeout: minutes that a process waits for the others before it gives up.

    Raises:
        RuntimeError: the processes could not find each other.
    """
    if world_size() == 1 or has_group():
        with _lost_by_name():
            yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        backend, wait = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            dist.init_process_group(
                backend, store=_meeting_place(wait), rank=rank(), world_size=world_size(), timeout=wait
            )
        else:
            dist.init_process_group(backend, timeout=wait)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise RuntimeError(
            f"process {rank()} of {world_size()} could not reach the others at {where} ({_first_line(error)}); "
            "start all of them by torchrun, with the same --rdzv-endpoint on every machine"
        ) from error
    with _lost_by_name():
        yield  # after an error the group stays: leaving it would wait for processes that may be gone
        with together():
            pass  # nobody hangs up while another still listens
    dist.destroy_process_group()


def _meeting_place(wait: timedelta) -> dist.Store:
    """A store of its own for these processes and no earlier ones.

    `torchrun` keeps one store over its restarts, where processes find the addresses of their dead predecessors and try
    to reach them (pytorch/pytorch issue 135712). So each writes a word that it has just made up, the main process
    publishes the list of them, and once all agree to a list with their own word in it, it names their store.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=wait)
    everyone, word = range(world_size()), uuid.uuid4().hex
    store.set(f"fastris/word/{rank()}", word)
    end = time.monotonic() + wait.total_seconds()
    while time.monotonic() < end:
        if is_main():
            store.set("fastris/words", ",".join(store.get(f"fastris/word/{number}").decode() for number in everyone))
        words = store.get("fastris/words").decode()
        if words.split(",")[rank() : rank() + 1] == [word]:
            name = "fastris/" + hashlib.sha256(words.encode()).hexdigest()
            store.set(f"{name}/agreed/{rank()}", "")
            if store.check([f"{name}/agreed/{number}" for number in everyone]):
                return dist.PrefixStore(name, store)
        time.sleep(0.05)
    raise RuntimeError("not all of them have come")


@contextmanager
def _lost_by_name() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if (lost := lost_process(error, "A run that has a checkpoint goes on with --resume auto")) is None:
            raise
        raise lost from error


@contextmanager
def together() -> Iterator[None]:
    """Every process leaves this block, or none does: an error in one of them ends all.

    The process with the lowest rank that failed raises its own error, the others :class:`StoppedElsewhere`. The block
    must not wait for other processes.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if world_size() == 1:
        if failure is not None:
            raise failure
        return
    failures = gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    first = next((number for number, text in enumerate(failures) if text is not None), None)
    if first is None:
        return
    if failure is not None and first == rank():
        raise failure
    raise StoppedElsewhere(f"process {first} of {world_size()} ended the run: {failures[first]}")


def gather(value: T) -> list[T]:
    """The small Python objects of all processes, by rank; each process gets them all."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(function: Callable[[], T]) -> T:
    """What `function` returns in the main process, which alone calls it; its error is everyone's."""
    value: Any = None
    with together():
        if is_main():
            value = function()
    return _share(value)


def sum_over_processes(values: Tensor) -> Tensor:
    """The elementwise sum of the processes' tensors, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """The model wrapped so that backward averages gradients over the processes; alone, the model itself.

    In several processes its BatchNorms are replaced, in `model` too, by ones that normalise over the whole batch: the
    gradients are those of one process with all of it. Weights and statistics become those of the main process.
    """
    if world_size() == 1:
        return model
    from fastris.runtime.sync_batchnorm import synchronise_batchnorm

    synchronise_batchnorm(model, device)
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):  # CLIP's temperature: CRIS never uses it, and DDP would wait for its gradient
            parameter.requires_grad_(False)
    for buffer in model.buffers():  # DDP does so for the parameters
        dist.broadcast(buffer, src=0)
    ddp = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # in PyTorch 2.15
    in_forward: dict[str, Any] = {
        "forward_sync_buffers" if renamed else "broadcast_buffers": False
    }  # they stay equal by themselves
    devices = [device] if device.type == "cuda" else None
    return ddp(model, device_ids=devices, gradient_as_bucket_view=True, **in_forward)


def lost_process(error: BaseException, go_on: str) -> LostProcess | None:
    """The error to raise in place of PyTorch's where that says that another process has gone; else None.

    `go_on`: what is left and what to do, the end of the message.
    """
    if world_size() == 1 or isinstance(error, StoppedElsewhere | LostProcess) or not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
        return None
    return LostProcess(
        f"lost contact with another process of the run, which has ended or hangs ({_first_line(error)}); its own "
        f"message, or torchrun's report, says why. {go_on}"
    )


@dataclass(frozen=True)
class _Place:
    """Where a tensor was in an object that travels without its tensors."""

    shape: torch.Size
    dtype: torch.dtype


def _share(value: Any) -> Any:
    """The main process's object in every process. Tensors travel one by one: a checkpoint is never pickled whole."""
    if world_size() == 1:
        return value
    tensors: list[Tensor] = []
    box = [_take_out(value, tensors) if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    if not is_main():
        return _put_back(box[0])
    for tensor in tensors:
        if tensor.numel():
            dist.broadcast(tensor.contiguous().reshape(-1).view(torch.uint8), src=0)
    return value


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu())
        return _Place(value.shape, value.dtype)
    if isinstance(value, dict):
        return {key: _take_out(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return _like(value, [_take_out(item, tensors) for item in value])
    return value


def _put_back(value: Any) -> Any:
    """Receive the tensors in the order in which :func:`_take_out` met them."""
    if isinstance(value, _Place):
        tensor = torch.empty(value.shape, dtype=value.dtype)
        if tensor.numel():
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=0)
        return tensor
    if isinstance(value, dict):
        return {key: _put_back(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return _like(value, [_put_back(item) for item in value])
    return value


def _like(value: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
