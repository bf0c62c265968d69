"""Read the pickle inside a PyTorch file with a stack machine that cannot execute code.

``torch.load(weights_only=True)`` executes no code from the file either, but does not withstand hostile files: a few
bytes can make it build a set of 10^12 elements, or gigabytes of copies. This machine knows the names that PyTorch
writes for tensors and plain values, checks every tensor against its bytes, and bounds work and memory by the size of
the file. It also reads TorchScript's pickles: a module becomes a Record of its attributes, and neither its code nor its
``__setstate__`` is used. :mod:`pickletools` decodes the instructions.
"""

from __future__ import annotations

import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast

import torch
from torch import Tensor

from fastris.runtime.torch_values import (
    KNOWN,
    MEND,
    Function,
    Malformed,
    NumberType,
    Record,
    Refused,
    Storage,
    StorageType,
    Unusable,
    as_key,
)

MAX_BYTES = 16 << 20  # RN101's training state takes 0.2 MB, OpenAI's RN50x64 less
MAX_VALUES = 1_000_000
MAX_DEPTH = 64

_OPTIONS = frozenset({"argparse Namespace"})
"""Classes besides TorchScript's whose objects are read as Records: released training states carry their options so."""

_LEAVES = frozenset({str, int, float, bool, type(None), bytes, Tensor})


@dataclass
class Machine:
    """The stack machine for the pickles of one file; ``storage(dtype, key, count)`` returns the bytes of a tensor."""

    storage: Callable[[torch.dtype, str, int], Storage]
    left: int = MAX_VALUES
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, file: IO[bytes]) -> Any:
        """Read the pickle at the file's position, which moves behind it, and return its value.

        Raises Refused for content that is not read, Malformed or another error for a broken pickle.
        """
        self.stack, self.marks, self.memo = [], [], {}
        steps = cast(Any, pickletools.genops)(_Bounded(file))
        for opcode, argument, _ in steps:
            name = opcode.name
            step = _STEPS.get(name)
            if step is not None:
                step(self, argument)
            elif name in _LITERALS:
                self.stack.append(argument)
            elif name == "STOP":
                break
            elif name != "PROTO":
                raise Refused(f"asks for the pickle instruction {name}, which PyTorch does not write; {MEND}")
            self.spend(1)
        value = self.stack.pop()
        _check_tree(value, [MAX_VALUES], ())
        return value

    def spend(self, count: int) -> None:
        """Count values; raise Refused for a file that builds far more of them than a checkpoint holds."""
        self.left -= count
        if self.left < 0:
            raise Refused(f"holds more than {MAX_VALUES} values beside its tensors, and is not read; {MEND}")

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def top(self, *kinds: type) -> Any:
        if type(self.stack[-1]) not in kinds:
            raise Malformed(f"a {type(self.stack[-1]).__name__} where a {kinds[0].__name__} should be")
        return self.stack[-1]


class _Bounded:
    """A file of which one pickle can read at most MAX_BYTES."""

    def __init__(self, file: IO[bytes]):
        self.file, self.left = file, MAX_BYTES

    def read(self, count: int) -> bytes:
        return self._counted(self.file.read(min(count, self.left + 1)))

    def readline(self) -> bytes:
        return self._counted(self.file.readline(self.left + 1))

    def tell(self) -> int:
        return 0

    def _counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise Refused(f"holds more than {MAX_BYTES >> 20} MB beside its tensors, and is not read; {MEND}")
        return data


def _check_tree(value: Any, left: list[int], path: tuple[Any, ...]) -> None:
    """Raise Refused for unusable values, naming their place, for cycles, and for shared parts that repeat too often."""
    if isinstance(value, Unusable):
        place = f"entry {'.'.join(map(str, path))!r}" if path else "its content"
        raise Refused(f"holds {value.what} ({place}), which is not read; make it a plain tensor and save again")
    if isinstance(value, (StorageType, Storage, Function, NumberType)):
        raise Malformed("a name that is not used")
    if isinstance(value, Record):
        value = {"": value.state} if not isinstance(value.state, dict) else value.state
    if not isinstance(value, (dict, list, tuple)):
        return
    left[0] -= len(value)
    if len(path) > MAX_DEPTH or left[0] < 0:
        raise Refused(f"holds values that contain themselves, nest too deep or repeat without end; {MEND}")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if type(item) not in _LEAVES:
            _check_tree(item, left, (*path, key))


# The instructions, by pickletools' names.


def _global(machine: Machine, name: str) -> None:
    known = KNOWN.get(name)
    if known is None and (name.startswith("__torch__") or name in _OPTIONS):
        known = Record(name.replace(" ", "."))
    elif known is None:
        path = name.replace(" ", ".")[:200]
        raise Refused(f"holds a Python object ({path}), and reading it could run any code, so it is refused; {MEND}")
    machine.stack.append(known)


def _new(machine: Machine, _: Any) -> None:
    arguments, kind = machine.stack.pop(), machine.stack.pop()
    if type(kind) is not Record or arguments != ():
        raise Malformed("an object of no TorchScript class")
    machine.stack.append(Record(kind.kind))


def _reduce(machine: Machine, _: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    if type(function) is not Function or type(arguments) is not tuple:
        raise Malformed("a call of what is no function")
    machine.spend(sum(len(part) for part in arguments if isinstance(part, (str, bytes, list, tuple, dict, set))))
    machine.stack.append(function.build(*arguments))


def _build(machine: Machine, _: Any) -> None:
    state = machine.stack.pop()
    target = machine.top(Record, OrderedDict, NumberType)
    if type(target) is Record:
        target.state = state
    elif type(target) is OrderedDict:
        if isinstance(state, dict) and "_metadata" in state:  # versions of the modules, in a module's state dict
            vars(target)["_metadata"] = state["_metadata"]
    elif type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
        raise Malformed("a NumPy dtype without byte order")
    else:
        target.order = state[1]


def _persistent(machine: Machine, _: Any) -> None:
    """Handle ``("storage", class, key, location, count)``; old files append a view of the storage, None for none."""
    identity = machine.stack.pop()
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        raise Malformed("a reference to something else than a storage")
    _, kind, key, _, count, *view = identity
    if type(kind) is not StorageType or type(key) is not str or type(count) is not int or count < 0 or any(view):
        raise Malformed("a reference to no whole storage")
    unusable = Unusable("a quantised tensor")
    machine.stack.append(unusable if kind.dtype is None else machine.storage(kind.dtype, key, count))


def _put(machine: Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _mark(machine: Machine, _: Any) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _collect_tuple(machine: Machine, _: Any) -> None:
    items = machine.pop_mark()
    machine.stack.append(tuple(items))


def _tuple_of(count: int) -> Callable[[Machine, Any], None]:
    def step(machine: Machine, _: Any) -> None:
        if len(machine.stack) < count:
            raise Malformed("too few values for a tuple")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return step


def _append(machine: Machine, _: Any) -> None:
    item = machine.stack.pop()
    machine.top(list).append(item)


def _appends(machine: Machine, _: Any) -> None:
    items = machine.pop_mark()
    machine.top(list).extend(items)


def _set_item(machine: Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.top(dict, OrderedDict, Counter)[as_key(key)] = value


def _set_items(machine: Machine, _: Any) -> None:
    items = machine.pop_mark()
    target = machine.top(dict, OrderedDict, Counter)
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[as_key(key)] = value


def _constant(make: Callable[[], Any]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.stack.append(make())


_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
    | {"SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES"}
)
_STEPS: Mapping[str, Callable[[Machine, Any], None]] = {
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_LIST": _constant(list),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_TUPLE": _constant(tuple),
    "EMPTY_SET": _constant(set),
    "MARK": _mark,
    "TUPLE": _collect_tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "GLOBAL": _global,
    "NEWOBJ": _new,
    "REDUCE": _reduce,
    "BUILD": _build,
    "BINPERSID": _persistent,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
}
