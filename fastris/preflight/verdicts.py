"""What is known about the kernels on each GPU: asked for by every call, found out once, told once."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping

import torch

from fastris.preflight.alone import run_alone
from fastris.preflight.reasons import Failure, explain
from fastris.runtime.processes import is_main

Proof = Callable[[torch.device, torch.dtype], None]
"""Runs an operator's kernels on a device in a dtype, forward and backward; raises whatever is wrong with them."""
Key = tuple[str, int, torch.dtype]
"""Operator, number of the GPU, dtype."""

POSTPONED = Failure(
    "they were not proved before, and cannot be in the capture of a CUDA graph, a functorch transform, fake tensors or "
    "a backward pass",
    "run the operator once before that",
)
"""The verdict while there is none and no proof may start: nothing is wrong, so far."""

settled: dict[Key, Failure | None] = {}
"""The verdicts: None for kernels that were proved. Read by every call; written here alone."""
_proofs: dict[str, Proof] = {}
_told: set[str | Key] = set()
_proving, _telling = threading.RLock(), threading.Lock()  # who tells must never wait for who proves
_this_thread = threading.local()


def register(proofs: Mapping[str, Proof]) -> None:
    """Make the operators' proofs known, by the operators' names."""
    _proofs.update(proofs)


def known(operator: str, device: torch.device, dtype: torch.dtype) -> Failure | None:
    """The failure that was found so far, or None; proves nothing."""
    return settled.get((operator, index_of(device), dtype))


def verdict(operator: str, device: torch.device, dtype: torch.dtype) -> Failure | None:
    """None if the operator's kernels are right on ``device`` in ``dtype``, else what is wrong; proves it if need be.

    While a CUDA graph is captured, and inside functorch transforms, fake tensors and backward passes, no proof starts:
    the answer is :data:`POSTPONED`, and the next call asks again.
    """
    key = operator, index_of(device), dtype
    if key in settled:
        return settled[key]
    if getattr(_this_thread, "proves", False):
        return None
    return POSTPONED if _no_time_for_a_proof() else prove(operator, device, dtype)


def prove(operator: str, device: torch.device, dtype: torch.dtype) -> Failure | None:
    """As :func:`verdict`, but proves here and now, whatever the moment."""
    index = index_of(device)
    key = operator, index, dtype
    with _proving:
        if key in settled:
            return settled[key]
        found = try_out(operator, device, dtype)
        adopt(operator, device, dtype, found)
        return found


def try_out(operator: str, device: torch.device, dtype: torch.dtype) -> Failure | None:
    """As :func:`prove`, but as the kernels are at this moment, and what is found is not remembered."""
    index = index_of(device)
    try:
        run_alone(_marked(_proofs[operator]), device if index < 0 else torch.device(device.type, index), dtype)
    except Exception as error:  # anything may go wrong in a compiler, a driver and a GPU, and that is the question
        return explain(error, device)
    return None


def adopt(operator: str, device: torch.device, dtype: torch.dtype, found: Failure | None) -> None:
    """Take ``found`` as this process's verdict; a failure of the whole machine is one of all operators and dtypes."""
    index = index_of(device)
    with _proving:
        settled[operator, index, dtype] = found
        if found is not None and found.everywhere:
            dtypes = (torch.float32, torch.float16, torch.bfloat16)
            settled.update({(name, index, each): found for name in _proofs for each in dtypes})


def tell(operator: str, device: torch.device, dtype: torch.dtype, found: Failure) -> None:
    """Say once, in the main process, that the torch path runs in the kernels' place, why, and how to mend it."""
    key = operator, index_of(device), dtype
    if key in _told and found is not POSTPONED:
        return
    kernels = "the Triton kernels"
    if not found.everywhere:
        kernels += f" of {operator} in {str(dtype).removeprefix('torch.')}"
    text = f"{kernels} are not used on {device}: {found.reason}; "
    text += f"the torch path answers in their place, with the same results. To mend it: {found.mend}"
    with _telling:
        silent = text in _told or not is_main()
        _told.update([text] if found is POSTPONED else [text, key])
    if not silent:
        warnings.warn(text, stacklevel=4)


def index_of(device: torch.device) -> int:
    """The number of the GPU; that of the current one where the device names none. -1 for what is no GPU."""
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if device.type == "cuda" else -1


def _marked(proof: Proof) -> Proof:
    """The proof, whose own calls need no proof."""

    def marked(device: torch.device, dtype: torch.dtype) -> None:
        _this_thread.proves = True
        try:
            proof(device, dtype)
        finally:
            _this_thread.proves = False

    return marked


def _no_time_for_a_proof() -> bool:
    """Whether a proof would be part of what the caller does there, or would wait for it.

    A backward pass holds the one thread that PyTorch has for a GPU's backward passes, which the proof needs too.
    """
    captures = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if captures or torch._C._are_functorch_transforms_active() or torch._C._current_graph_task_id() != -1:
        return True
    kinds = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(kind) is not None for kind in (kinds.FAKE, kinds.PROXY, kinds.FUNCTIONAL))
