"""Bytes that a forward pass keeps for the backward pass, counted where autograd puts them away.

A storage is counted whole and once, however many views of it are kept, because that is what stays allocated.
Parameters and buffers are not counted: they stay allocated anyway. Tensors computed from parameters alone, such as the
low-precision copies that autocast makes of weights, count, but are listed apart: they do not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastris import CRIS, CRISConfig

from ..cases.arms import Arm
from ..cases.builders import enliven, make_tokens
from ..cases.table import REAL_LENGTHS
from ..timing.harness import Outcome, Progress, failures_into, release

GOAL = 0.5
"""Bytes kept by an arm, at most this fraction of the baseline's."""

BATCH = 2
DTYPE = torch.bfloat16
TITLE = (
    f"kept for backward per image: neck + decoder + projector + loss of CRIS-RN50 at 416x416, B={BATCH}, dropout 0.1, "
    f"{str(DTYPE).removeprefix('torch.')} autocast, 17 words, of which 4 and 5 real"
)


@dataclass
class Kept:
    """Bytes kept during one stage: ``activations`` grow with the batch, ``weight_copies`` do not."""

    activations: int = 0
    weight_copies: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.weight_copies


@dataclass
class MemoryCell(Outcome):
    """One arm's count for a batch of :data:`BATCH`: stage -> :class:`Kept`, as a dict."""

    stages: dict[str, Any] = field(default_factory=dict)


class KeptStorages:
    """Counts what is kept for backward, stage by stage; a storage belongs to the first stage that keeps it.

    ``resident`` are the tensors that stay allocated anyway: parameters and buffers.
    """

    def __init__(self, resident: Iterable[Tensor]):
        self.stages: dict[str, Kept] = {}
        self._seen: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        self._of_weights = _OfWeights(resident)
        self._resident = set(self._of_weights.storages)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what the forward pass in this block keeps as ``name``'s."""
        kept = self.stages.setdefault(name, Kept())

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            key = _key(storage)
            if key not in self._seen and key not in self._resident:
                self._seen[key] = storage
                if key in self._of_weights.storages:
                    kept.weight_copies += storage.nbytes()
                else:
                    kept.activations += storage.nbytes()
            return tensor

        with self._of_weights, saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


class _OfWeights(TorchDispatchMode):
    """Follows which storages hold nothing but functions of the resident tensors: casts, concatenations, transposes."""

    def __init__(self, resident: Iterable[Tensor]):
        super().__init__()
        self.storages = {_key(tensor.untyped_storage()): tensor.untyped_storage() for tensor in resident}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if sources and all(_key(source.untyped_storage()) in self.storages for source in sources):
            for made in tree_leaves(result):
                if isinstance(made, Tensor):
                    self.storages[_key(made.untyped_storage())] = made.untyped_storage()
        return result


def _key(storage: torch.UntypedStorage) -> int:
    return storage.data_ptr()


def count_memory(
    arms: list[Arm], device: torch.device, progress: Progress, cells: dict[str, MemoryCell], config: CRISConfig
) -> None:
    """Count for every arm what CRIS's own parts keep at the sizes of ``config``. Fills ``cells``."""
    cells.update({arm.name: MemoryCell(arm.name) for arm in arms})
    for arm in arms:
        progress(f"counting {arm.name}")
        with failures_into(cells[arm.name]), arm.active():
            stages = kept_by_own_parts(config, device)
            cells[arm.name].stages = {name: asdict(kept) for name, kept in stages.items()}
            cells[arm.name].status = "measured"
        release(device)


def kept_by_own_parts(config: CRISConfig, device: torch.device) -> dict[str, Kept]:
    """What neck, decoder and projector with the loss keep for a batch of :data:`BATCH` in a training step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = enliven(CRIS(config)).train()
        parts = torch.nn.ModuleDict({"neck": model.neck, "decoder": model.decoder, "proj": model.proj}).to(device)
        side = config.input_size // 32
        maps = [
            torch.randn(BATCH, channels, scale * side, scale * side).to(device, DTYPE).requires_grad_()
            for channels, scale in zip(config.fpn_in, (4, 2, 1), strict=True)
        ]
        words = torch.randn(BATCH, config.word_len, config.vis_dim).to(device).requires_grad_()
        state = torch.randn(BATCH, config.word_dim).to(device, DTYPE).requires_grad_()
        padding = (make_tokens(BATCH, config.word_len, REAL_LENGTHS) == 0).to(device)
        mask = torch.rand(BATCH, 1, config.input_size, config.input_size).to(device)
    counter = KeptStorages([*parts.parameters(), *parts.buffers()])
    with torch.autocast(device.type, dtype=DTYPE):
        with counter.stage("neck"):
            fused = parts["neck"](maps, state)
        with counter.stage("decoder"):
            decoded = parts["decoder"](fused, words, padding)
            decoded = (decoded[-1] if isinstance(decoded, list) else decoded).reshape(fused.shape)
        with counter.stage("projector + loss"):
            parts["proj"](decoded, state, mask)
    return counter.stages
