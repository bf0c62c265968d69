"""Distributed runs: several processes, one for each GPU, as `torchrun` starts them.

In a single process these functions do nothing, or the equivalent for one process. Distributed code here follows two
rules. Decisions that depend on files or the clock are made by the main process (:func:`from_main`). And no process may
wait for one that has failed: if one fails in a block under :func:`together`, all of them raise.
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
    """Create the process group for this block, so that the processes can exchange tensors and objects.

    gloo transfers CPU tensors, NCCL those on GPUs. A group that the caller has made is used and not destroyed; it must
    support CPU tensors.

    Args:
        device: the device that this process computes on.
        timeout: minutes after which a process gives up waiting for the others.

    Raises:
        RuntimeError: the processes could not find each other.
    """
    if world_size() == 1 or has_group():
        with _translate_lost_process():
            yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        backend, wait = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            dist.init_process_group(
                backend, store=_store_of_this_start(wait), rank=rank(), world_size=world_size(), timeout=wait
            )
        else:
            dist.init_process_group(backend, timeout=wait)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise RuntimeError(
            f"process {rank()} of {world_size()} could not reach the others at {where} ({_first_line(error)}); "
            "start all of them by torchrun, with the same --rdzv-endpoint on every machine"
        ) from error
    with _translate_lost_process():
        yield  # after an error the group is not destroyed: that would wait for processes that may be gone
        with together():
            pass  # no process destroys the group while another still needs it
    dist.destroy_process_group()


def _store_of_this_start(wait: timedelta) -> dist.Store:
    """A key-value store that these processes share with no earlier ones.

    `torchrun` keeps one store over its restarts, so processes would find the addresses of their dead predecessors there
    and try to connect to them (pytorch/pytorch issue 135712). So each process writes a random word, the main process
    publishes the list of all words, and once every process has found its own word in the list, the list's hash becomes
    the prefix of their keys.
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
def _translate_lost_process() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if (lost := lost_process(error, "A run that has a checkpoint goes on with --resume auto")) is None:
            raise
        raise lost from error


@contextmanager
def together() -> Iterator[None]:
    """Wait at the end of the block for all processes; if one failed in it, all of them raise.

    The failed process with the lowest rank raises its own error, the others raise :class:`StoppedElsewhere`. The block
    itself must not wait for other processes.
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
    """Collect a small Python object from each process; every process gets the list, ordered by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(function: Callable[[], T]) -> T:
    """Call `function` in the main process only; every process gets its result, or raises if it failed."""
    value: Any = None
    with together():
        if is_main():
            value = function()
    return _share(value)


def sum_over_processes(values: Tensor) -> Tensor:
    """Replace `values` in place by the elementwise sum over all processes; returns `values`."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the model in DDP, which averages gradients over the processes; a single process gets the model itself.

    In several processes its BatchNorms are replaced, in `model` itself, by ones that normalise over the whole batch, so
    that gradients equal those of one process with that batch. Weights and statistics become the main process's.
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
    """A LostProcess error if PyTorch's `error` means that another process has ended or hangs; else None.

    `go_on`: the end of the message, which says how to continue.
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
    """Stands for a tensor in an object that is sent without its tensors."""

    shape: torch.Size
    dtype: torch.dtype


def _share(value: Any) -> Any:
    """Send the main process's object to all. Tensors are sent one by one, so that no whole checkpoint is pickled."""
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
    """Receive the tensors, in the order in which :func:`_take_out` took them out, and put them in their places."""
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
