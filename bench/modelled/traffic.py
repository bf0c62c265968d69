"""What a computation does, operation by operation: arithmetic, and bytes through memory if nothing is fused.

Every PyTorch operation that runs within :class:`Traffic` is taken as one kernel, which reads each of its inputs and
writes each of its outputs once. A view costs nothing; an expanded tensor counts the elements that exist; a table is
read only where it is looked up. Arithmetic is that of matrix products and convolutions, two operations for each
multiplication.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from ..timing.roofline import FORMULAS

aten = torch.ops.aten

LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}
"""Operations that read no more of their first argument than they write."""

OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.bernoulli_, aten.normal_, aten.uniform_, aten.random_}
"""Operations that write their first argument without reading it."""

FACTORIES = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
"""Operations that touch no memory."""


@dataclass(frozen=True)
class Operation:
    """One kernel: its arithmetic in a low precision or in a ``wide`` one (float32 and up), and its bytes."""

    name: str
    flops: int
    bytes: int
    wide: bool


class Traffic(TorchDispatchMode):
    """Collects the operations that run in its block, on numbers or on shapes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function.overloadpacket
        moved = 0 if packet in FACTORIES else _bytes_moved(function, args, kwargs, result)
        flops = count_flops(packet, args, kwargs, result)
        if moved or flops:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            wide = all(t.itemsize > 2 for t in tensors if t.is_floating_point())
            self.operations.append(Operation(str(packet), flops, moved, wide))
        return result


def count_flops(packet: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Arithmetic of one operation; 0 for all but matrix products, convolutions and attention."""
    formula = FORMULAS.get(packet)
    if formula is not None:
        return shape_wrapper(formula)(*args, **kwargs, out_val=result)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _bytes_moved(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    written = _written(function, args, kwargs)
    old = {_storage(tensor) for tensor in given}
    new = [tensor for tensor in made if _storage(tensor) not in old]
    if not new and not written:
        return 0  # a view
    packet = function.overloadpacket
    read = given[1:] if packet in LOOKUPS or packet in OVERWRITES else given
    read = [tensor for tensor in read if not any(tensor is out for out in tree_leaves(kwargs.get("out")))]
    looked_up = existing_bytes(new) if packet in LOOKUPS else 0
    return existing_bytes(read) + looked_up + existing_bytes(new) + existing_bytes(written)


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that the operation changes."""
    changed = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name, args[place] if place < len(args) else None)
        changed += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return changed


def existing_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, each once; an axis that is only expanded holds one element."""
    found = {}
    for tensor in tensors:
        count = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            count *= size if stride else min(size, 1)
        found[_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()] = count * tensor.itemsize
    return sum(found.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
