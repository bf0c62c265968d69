"""The one counter of bytes that a forward pass keeps for the backward pass, each storage whole and once.

That is what stays allocated, however many views of it are kept. Parameters, buffers and the batch are not counted: they
stay anyway. Two things can be counted: what autograd saves (:func:`saved_storages`), in compiled code, too, and what is
alive (:class:`LiveStorages`), which sees checkpoints as well and tells stages and copies of weights apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def saved_storages(resident: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Storage -> bytes of every one that autograd saves in this block, but those of the ``resident`` tensors.

    Tensors without values are counted by their shapes.
    """
    stays = set(map(_key, resident))
    found: dict[int, int] = {}
    held = []  # so that no two storages have one key

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (key := _key(tensor)) not in stays:
            held.append(storage)
            found[key] = storage.nbytes()
        return tensor.detach()  # an output that holds its own node would never be freed

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@dataclass
class Kept:
    """Bytes kept during one stage: ``activations`` grow with the batch; ``weight_copies``, as autocast's, do not."""

    activations: int = 0
    weight_copies: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.weight_copies


class _Found(NamedTuple):
    storage: StorageWeakRef  # while it is held, no other storage gets the same key
    size: int
    stage: str


class LiveStorages(TorchDispatchMode):
    """Follows, while it is entered, the storages that are alive, one operation at a time; freed ones stop counting.

    Hooks see what autograd puts away, but checkpoints keep their inputs elsewhere, and selective ones their results.
    What existed before and is not touched does not count, nor ``weights`` (parameters and buffers) and ``data`` (the
    batch), nor what an operation allocates and frees before it returns (workspaces of cuDNN and cuBLAS). ``peaks``
    holds, for every stage, the largest number of bytes alive at once while it ran, other stages' included.
    """

    def __init__(self, weights: Iterable[Tensor], data: Iterable[Tensor] = ()):
        super().__init__()
        weights = list(weights)
        self.peaks: dict[str, int] = {}
        self._copies = {_key(tensor): StorageWeakRef(tensor.untyped_storage()) for tensor in weights}
        self._resident = {_address(tensor): tensor for tensor in (*weights, *data)}  # held, so that addresses stay
        self._found: dict[int, _Found] = {}
        self._stage = "rest"
        self._bound = 0  # at least the bytes alive

    def enter(self, stage: str) -> str:
        """Storages first seen from now on belong to ``stage``. Returns the stage before."""
        previous, self._stage = self._stage, stage
        return previous

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A block that is ``name``'s. Blocks nest."""
        previous = self.enter(name)
        try:
            yield
        finally:
            self.enter(previous)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if sources and all(_key(source) in self._copies for source in sources):
            self._copies.update((_key(tensor), StorageWeakRef(tensor.untyped_storage())) for tensor in made)
        self._bound += sum(map(self._see, (*sources, *made)))
        if self._bound > self.peaks.get(self._stage, 0):
            self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), self.alive())
        return result

    def _see(self, tensor: Tensor) -> int:
        """Count a storage that was not met before. Returns its bytes, or 0."""
        key, storage = _key(tensor), tensor.untyped_storage()
        if key in self._found or _address(tensor) in self._resident:
            return 0
        self._found[key] = _Found(StorageWeakRef(storage), storage.nbytes(), self._stage)
        return storage.nbytes()

    def alive(self) -> int:
        """Bytes alive now."""
        for key in [key for key, found in self._found.items() if found.storage.expired()]:
            del self._found[key]
            self._copies.pop(key, None)
        self._bound = sum(found.size for found in self._found.values())
        return self._bound

    def kept(self) -> dict[str, Kept]:
        """What is alive now, by the stage that made it; copies of weights apart."""
        self.alive()
        stages: dict[str, Kept] = {}
        for key, found in self._found.items():
            kept = stages.setdefault(found.stage, Kept())
            if key in self._copies:
                kept.weight_copies += found.size
            else:
                kept.activations += found.size
        return stages


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
