"""Running something so that whoever waits for it finds everything as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastris.runtime.float16_sums import allow_fp16_accumulation


def run_alone(function: Callable[[torch.device, torch.dtype], None], device: torch.device, dtype: torch.dtype) -> None:
    """Call ``function(device, dtype)`` in a thread of its own and raise what it raises; the caller waits.

    Autocast, grad and inference mode, functorch, dispatch modes, default device, hooks, current stream and the blocks
    of :func:`fastris.use_impl` are a thread's own, so a new one has none of them. What a process has only one of is put
    back: random number generators, default dtype, deterministic algorithms, float16 sums.
    """
    raised: list[BaseException] = []
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        try:
            with torch.enable_grad(), _current(device):
                function(device, dtype)
        except BaseException as error:
            raised.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=work, name="fastris-proof")
    with _kept(device):
        try:
            thread.start()
            ended.wait()  # Thread.join takes a thread for ended once Ctrl-C has interrupted it
        except BaseException:
            if begun.wait(1.0):
                ended.wait()  # as long as the proof runs, nothing can be put back
            raise
        thread.join()
    if raised:
        raise raised[0]


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


@contextmanager
def _kept(device: torch.device) -> Iterator[None]:
    """What is the process's own is as PyTorch has it from the start in this block, and afterwards as it was before."""
    dtype, strict = torch.get_default_dtype(), torch.get_deterministic_debug_mode()
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else [], device_type="cuda"), allow_fp16_accumulation(False):
        try:
            torch.set_default_dtype(torch.float32)
            torch.set_deterministic_debug_mode("default")
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_deterministic_debug_mode(strict)
