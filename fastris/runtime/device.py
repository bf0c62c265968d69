"""Choose the device, mixed precision and memory layout of a run, and its number of data loading processes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from fastris.runtime import distributed


@dataclass(frozen=True)
class Precision:
    """Mixed precision on one device; `name` is "bf16", "fp16" or "off". Use :meth:`choose` to make one."""

    name: str
    device: torch.device

    @classmethod
    def choose(cls, amp: str, device: torch.device) -> Precision:
        """The precision that the option `amp` stands for on `device`.

        "auto" is bf16 on CUDA devices that support it (compute capability 8.0 and up), fp16 with a loss scaler on older
        ones, and off elsewhere.

        Raises:
            ValueError: `amp` is unknown or cannot run on the device.
        """
        has_bf16 = device.type != "cuda" or (
            torch.cuda.get_device_capability(device) >= (8, 0) and torch.cuda.is_bf16_supported()
        )
        if amp == "auto":
            amp = "off" if device.type != "cuda" else "bf16" if has_bf16 else "fp16"
        if amp not in ("bf16", "fp16", "off"):
            raise ValueError(f"amp={amp!r} is unknown; choose auto, bf16, fp16 or off")
        if amp == "fp16" and device.type != "cuda":
            raise ValueError(f"amp=fp16 needs a CUDA device, but device is {device}; use amp=auto, bf16 or off")
        if amp == "bf16" and not has_bf16:
            raise ValueError(f"amp=bf16 is not in the hardware of {device}; use amp=auto or amp=fp16")
        return cls(amp, device)

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[self.name]

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context for the forward pass; it does nothing for "off"."""
        dtype = torch.float16 if self.name == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.name != "off")

    def scaler(self) -> torch.amp.GradScaler:
        """The loss scaler, which does nothing unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def layout_for(device: torch.device) -> torch.memory_format:
    """The memory format of images and convolutions for training on ``device``.

    channels_last on GPUs, whose matrix units read it directly. Not on CPUs: there PyTorch's BatchNorm loses so much
    precision in that layout that the whole model fails the check against float64 with which the benchmarks begin.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def choose_workers(workers: int | None) -> int:
    """The number of data loading processes: ``workers``, or for None one per CPU core, at most 4.

    Several processes of a run on one machine divide the cores among them.
    """
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, max(1, cores // distributed.local_world_size()))


def choose_device(name: str) -> torch.device:
    """The device of a name: PyTorch's ("cuda:1", "cpu", "mps"), or "auto" for the first CUDA device, else the CPU.

    In a run of several processes, "auto" and "cuda" stand for the GPU with the process's local rank.

    Raises:
        ValueError: PyTorch does not know the name, or the machine has no such device, or too few of them.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is unknown to PyTorch; write auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"device={name}: PyTorch sees {found} CUDA device(s) here; use device=auto or device=cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name}: PyTorch finds no Apple GPU here; use device=auto or device=cpu")
    if device.type == "cuda" and distributed.world_size() > 1:
        return _own_gpu(device)
    return device


def _own_gpu(device: torch.device) -> torch.device:
    processes, found, own = distributed.local_world_size(), torch.cuda.device_count(), distributed.local_rank()
    if processes > found:
        raise ValueError(
            f"this machine runs {processes} processes and PyTorch sees {found} CUDA device(s), but each process needs "
            f"one of its own; give torchrun --nproc-per-node {found}, or device=cpu"
        )
    if device.index is not None:
        raise ValueError(f"device={device} would put every process on one GPU; write device=cuda")
    return torch.device("cuda", own)
