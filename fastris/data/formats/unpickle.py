"""A pickle reader for plain data, which cannot execute code.

Python's own unpickler looks up and calls whatever a file names; with globals refused, seven bytes (a memo index of a
billion) still take 16 GB, and a key that is a million tuples deep still ends the process: the tests show both. This
one knows only the opcodes that build lists, dicts, tuples, strings, numbers, booleans and None, for protocols 0 to 5
of Python 2 and 3. Any other opcode is refused by name before it has an effect, and work and memory stay proportional
to the size of the file: no key is hashed whose hash a file could choose, but for `MAX_NUMBER_KEYS` of a dict.

Records that hold encoded images are read with `binary=True`, where bytes stay bytes. Protocol 2 has no instruction for
bytes: Python 3 writes a text and a call of `_codecs.encode(text, "latin1")`. That one spelling is understood as the
bytes that it stands for; nothing is looked up or called for it.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fastris.data.base import DataError
from fastris.data.formats.budget import LIST, TABLE, Budget
from fastris.data.formats.unpickle_values import (
    MAX_NUMBER,
    Malformed,
    check_keys,
    check_tree,
    line_int,
    long,
    pairs,
    quoted,
    text,
)
from fastris.data.paths import content, regular

MAX_BYTES = 128 << 20  # 50,000 references with 150,000 sentences take about 30 MB
_ENCODE, _BYTES = object(), object()  # stand on the stack for the only two globals that are understood
_KNOWN = {
    (b"_codecs", b"encode"): _ENCODE,
    (b"__builtin__", b"bytes"): _BYTES,
    (b"builtins", b"bytes"): _BYTES,
}
_GAP = object()  # stands in the memo for an index that was skipped
_MEND = (
    "Only lists, dicts, tuples, strings, numbers, booleans and None are read from a pickle, because anything else "
    "can run code. Download the file again, or save it with plain values (int(x) for a NumPy number)"
)


def load_plain(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Read a pickle file of plain data.

    Strings that Python 2 wrote as bytes are decoded as UTF-8 and, where that fails, as Latin-1.

    Args:
        path: the file.
        max_bytes: a larger file is refused unread.

    Returns:
        lists, dicts, tuples, str, int, float, bool and None, nested at most 32 deep.

    Raises:
        DataError: the file is too large or damaged, or it asks for anything but plain data; the message names the
            file, what was refused, and the mend.
    """
    path = Path(path)
    if regular(path) > max_bytes:
        raise DataError(f"{path} is larger than {max_bytes} bytes and was not read; refs of 50,000 objects take 30 MB")
    return loads_plain(content(path, max_bytes), str(path))


def loads_plain(data: bytes, source: str = "the pickle", *, binary: bool = False) -> Any:
    """`load_plain` for bytes in memory; `source` is how error messages name them.

    With `binary`, bytes are accepted and returned as bytes. Python 2's strings still become text: UTF-8 or, where that
    fails, Latin-1.
    """
    machine = _Machine(data, source, binary)
    try:
        value = machine.run()
        check_tree(value, [8 * len(data) + 1000])
    except DataError:  # a ValueError too, but its message is already complete
        raise
    except (ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        at = f"at byte {min(machine.position, len(data))} of {len(data)}"
        reason = f"{type(error).__name__.lstrip('_')}: {error}"
        raise DataError(f"{source} is not a whole pickle ({at}; {reason}). Download it again") from error
    return value


class _Machine:
    """The pickle stack machine, without the opcodes that name, call or build objects."""

    __slots__ = ("binary", "budget", "data", "gaps", "marks", "memo", "position", "scattered", "source", "stack")

    def __init__(self, data: bytes, source: str, binary: bool = False):
        self.data = data
        self.source = source
        self.binary = binary
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.budget = Budget(source, len(data))
        self.memo: list[Any] = []  # by index; picklers count from 0 or 1
        self.scattered: dict[str, Any] = {}  # the memo's entries at other indices, which are kept as texts: see `_put`
        self.gaps = 0

    def run(self) -> Any:
        data, handlers = self.data, _HANDLERS
        while True:
            opcode = data[self.position]
            self.position += 1
            handler = handlers[opcode]
            if handler is not None:
                handler(self)
            elif opcode == pickle.STOP[0]:
                return self.stack.pop()
            else:
                self.refuse(opcode)

    def line(self) -> bytes:
        start = self.position
        end = self.data.index(b"\n", start)
        self.position = end + 1
        return self.data[start:end]

    def number(self) -> bytes:
        line = self.line()
        if len(line) > MAX_NUMBER:
            raise Malformed(f"a number of {len(line)} digits")
        return line

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def top(self, kind: type) -> Any:
        top = self.stack[-1]
        if type(top) is not kind:
            raise Malformed(f"{kind.__name__} expected, {type(top).__name__} found")
        return top

    def refuse(self, opcode: int) -> NoReturn:
        from pickletools import opcodes

        name = {ord(known.code): known.name for known in opcodes}.get(opcode)
        if name is None:
            raise Malformed(f"unknown opcode {opcode:#04x}")
        if name in ("GLOBAL", "INST"):
            what = f"the global {text(self.line())}.{text(self.line())}"
        elif name == "STACK_GLOBAL":
            what = "the global " + ".".join(str(part)[:200] for part in self.stack[-2:])
        elif name == "PERSID":
            what = f"the persistent id {text(self.line())}"
        else:
            what = f"the pickle instruction {name}"
        raise DataError(f"{self.source} asks for {what[:500]}, which was refused. {_MEND}")


_Handler = Callable[[_Machine], Any]


def _constant(value: Any) -> _Handler:
    return lambda machine: machine.stack.append(value)


def _empty(kind: Callable[[], Any], size: int) -> _Handler:
    def handler(machine: _Machine) -> None:
        machine.budget.spend(size)
        machine.stack.append(kind())

    return handler


def _written(convert: Callable[[bytes], Any]) -> _Handler:
    """Handler of a value that is written as text, up to the end of the line."""
    return lambda machine: machine.stack.append(convert(machine.number()))


def _reader(layout: str) -> Callable[[_Machine], Any]:
    """A function that reads one number of a fixed size."""
    form = struct.Struct(layout)
    size, unpack = form.size, form.unpack_from

    def read(machine: _Machine) -> Any:
        start = machine.position
        machine.position = start + size
        return unpack(machine.data, start)[0]

    return read


def _fixed(layout: str) -> _Handler:
    read = _reader(layout)
    return lambda machine: machine.stack.append(read(machine))


def _counted(layout: str, convert: Callable[[bytes], Any]) -> _Handler:
    """Handler of a value made from bytes, whose number comes first."""
    read = _reader(layout)

    def handler(machine: _Machine) -> None:
        count = read(machine)
        start = machine.position
        machine.position = end = start + count
        if count < 0 or end > len(machine.data):
            raise Malformed(f"{count} bytes are announced, {len(machine.data) - start} are left")
        machine.stack.append(convert(machine.data[start:end]))

    return handler


def _skip(count: int) -> _Handler:
    def handler(machine: _Machine) -> None:
        machine.position += count

    return handler


def _bytes(layout: str) -> _Handler:
    """Handler of bytes, whose number comes first: as they are if `binary`, else as text."""
    as_bytes, as_text = _counted(layout, lambda raw: raw), _counted(layout, text)
    return lambda machine: (as_bytes if machine.binary else as_text)(machine)


def _global(machine: _Machine) -> None:
    start = machine.position
    name = _KNOWN.get((machine.line(), machine.line())) if machine.binary else None
    if name is None:
        machine.position = start
        machine.refuse(pickle.GLOBAL[0])
    machine.stack.append(name)


def _reduce(machine: _Machine) -> None:
    """Handler of the two calls by which protocol 2 writes bytes; any other call is refused."""
    given, function = machine.stack.pop(), machine.stack.pop()
    if function is _BYTES and given == ():
        machine.stack.append(b"")
    elif function is _ENCODE and type(given) is tuple and given[1:] == ("latin1",) and type(given[0]) is str:
        machine.budget.spend(len(given[0]))
        machine.stack.append(given[0].encode("latin-1"))
    else:
        machine.refuse(pickle.REDUCE[0])


def _mark(machine: _Machine) -> None:
    machine.budget.spend(LIST)
    machine.marks.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _collect(kind: Callable[[list[Any]], Any], size: int) -> _Handler:
    """Handler that puts everything since the last mark into a container."""

    def handler(machine: _Machine) -> None:
        machine.budget.spend(size)
        items = machine.pop_mark()
        machine.stack.append(kind(items))

    return handler


def _tuple_of(count: int) -> _Handler:
    def handler(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise Malformed("too few values for a tuple")
        machine.budget.spend(LIST)
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return handler


def _append(machine: _Machine) -> None:
    item = machine.stack.pop()
    machine.top(list).append(item)


def _appends(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.top(list).extend(items)


def _setitem(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    target = machine.top(dict)
    if type(key) is not str:
        check_keys([key], len(target))
    target[key] = value


def _setitems(machine: _Machine) -> None:
    items = machine.pop_mark()
    target = machine.top(dict)
    target.update(pairs(items, len(target)))


def _put(read: Callable[[_Machine], int]) -> _Handler:
    """Handler that stores the topmost value in the memo: in a list, as long as the indices are consecutive.

    Other indices are kept as texts: a file could choose numbers, but not texts, that all have one hash.
    """

    def handler(machine: _Machine) -> None:
        index, value, memo = read(machine), machine.stack[-1], machine.memo
        if index == len(memo):
            memo.append(value)
        elif 0 <= index < len(memo):
            memo[index] = value
        elif index == 1 and not memo:
            memo.extend((_GAP, value))
            machine.gaps = 1
        else:
            machine.budget.spend(TABLE)
            machine.scattered[str(index)] = value

    return handler


def _get(read: Callable[[_Machine], int]) -> _Handler:
    def handler(machine: _Machine) -> None:
        index, memo = read(machine), machine.memo
        value = memo[index] if 0 <= index < len(memo) else machine.scattered[str(index)]
        if value is _GAP:
            raise KeyError(index)
        machine.stack.append(value)

    return handler


def _written_index(machine: _Machine) -> int:
    return int(machine.number())


_byte, _uint32 = _reader("<B"), _reader("<I")

_OPCODES: dict[bytes, _Handler] = {
    pickle.PROTO: _skip(1),
    pickle.FRAME: _skip(8),
    pickle.MARK: _mark,
    pickle.POP: _pop,
    pickle.POP_MARK: _Machine.pop_mark,
    pickle.DUP: lambda machine: machine.stack.append(machine.stack[-1]),
    pickle.NONE: _constant(None),
    pickle.NEWTRUE: _constant(True),
    pickle.NEWFALSE: _constant(False),
    pickle.INT: _written(line_int),
    pickle.LONG: _written(lambda line: int(line.rstrip(b"L"))),
    pickle.FLOAT: _written(float),
    pickle.BININT: _fixed("<i"),
    pickle.BININT1: _fixed("<B"),
    pickle.BININT2: _fixed("<H"),
    pickle.BINFLOAT: _fixed(">d"),
    pickle.LONG1: _counted("<B", long),
    pickle.LONG4: _counted("<i", long),
    pickle.STRING: lambda machine: machine.stack.append(quoted(machine.line())),
    pickle.UNICODE: lambda machine: machine.stack.append(machine.line().decode("raw-unicode-escape")),
    pickle.SHORT_BINSTRING: _counted("<B", text),
    pickle.BINSTRING: _counted("<i", text),
    pickle.SHORT_BINBYTES: _bytes("<B"),
    pickle.BINBYTES: _bytes("<I"),
    pickle.BINBYTES8: _bytes("<Q"),
    pickle.GLOBAL: _global,
    pickle.REDUCE: _reduce,
    pickle.SHORT_BINUNICODE: _counted("<B", bytes.decode),
    pickle.BINUNICODE: _counted("<I", bytes.decode),
    pickle.BINUNICODE8: _counted("<Q", bytes.decode),
    pickle.EMPTY_LIST: _empty(list, LIST),
    pickle.EMPTY_DICT: _empty(dict, TABLE),
    pickle.EMPTY_TUPLE: _constant(()),
    pickle.LIST: _collect(list, LIST),
    pickle.TUPLE: _collect(tuple, LIST),
    pickle.DICT: _collect(pairs, TABLE),
    pickle.TUPLE1: _tuple_of(1),
    pickle.TUPLE2: _tuple_of(2),
    pickle.TUPLE3: _tuple_of(3),
    pickle.APPEND: _append,
    pickle.APPENDS: _appends,
    pickle.SETITEM: _setitem,
    pickle.SETITEMS: _setitems,
    pickle.PUT: _put(_written_index),
    pickle.BINPUT: _put(_byte),
    pickle.LONG_BINPUT: _put(_uint32),
    pickle.MEMOIZE: _put(lambda machine: len(machine.memo) - machine.gaps + len(machine.scattered)),
    pickle.GET: _get(_written_index),
    pickle.BINGET: _get(_byte),
    pickle.LONG_BINGET: _get(_uint32),
}

_HANDLERS: list[_Handler | None] = [_OPCODES.get(bytes([opcode])) for opcode in range(256)]
