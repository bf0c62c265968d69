"""Bytes of the storages that are alive, followed one operation at a time: what is kept after a block, and its peaks.

Autograd's hooks for saved tensors see what autograd puts away. Checkpoints keep their inputs elsewhere, and selective
checkpoints their results; this counter sees those too, because it asks of every storage that an operation made or was
given whether it still exists. A storage is counted whole and once. What an operation allocates and frees
before it returns (workspaces of cuDNN and cuBLAS) is not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .kept import Kept


class LiveStorages(TorchDispatchMode):
    """A block of code whose storages are followed; what existed before it and is not touched in it does not count.

    ``weights`` (parameters and buffers) and ``data`` (the batch) stay allocated anyway and do not count. ``peaks``
    holds, for every stage, the largest number of bytes alive at once while it ran, other stages' included.
    """

    def __init__(self, weights: Iterable[Tensor], data: Iterable[Tensor] = ()):
        super().__init__()
        self.peaks: dict[str, int] = {}
        self._stage = "rest"
        weights = list(weights)
        self._of_weights = set(map(_key, weights))
        self._resident = {_key(tensor): tensor for tensor in (*weights, *data)}  # held, so that no key is used twice
        self._live: dict[int, tuple[StorageWeakRef, int, str]] = {}  # the weak reference keeps the key from reuse
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
        if sources and all(_key(source) in self._of_weights for source in sources):
            self._of_weights.update(map(_key, made))
        for tensor in (*sources, *made):
            self._see(tensor)
        if self._bound > self.peaks.get(self._stage, 0):
            self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), self.alive())
        return result

    def _see(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key not in self._resident and key not in self._live:
            storage = tensor.untyped_storage()
            self._live[key] = StorageWeakRef(storage), storage.nbytes(), self._stage
            self._bound += storage.nbytes()

    def alive(self) -> int:
        """Bytes alive now."""
        for key in [key for key, (reference, _, _) in self._live.items() if reference.expired()]:
            del self._live[key]
            self._of_weights.discard(key)
        self._bound = sum(size for _, size, _ in self._live.values())
        return self._bound

    def kept(self) -> dict[str, Kept]:
        """What is alive now, by the stage that made it; copies of weights apart."""
        self.alive()
        stages: dict[str, Kept] = {}
        for key, (_, size, name) in self._live.items():
            kept = stages.setdefault(name, Kept())
            if key in self._of_weights:
                kept.weight_copies += size
            else:
                kept.activations += size
        return stages


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
