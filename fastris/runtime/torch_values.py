"""The globals that a PyTorch file's pickle may name, and the values that are built from them.

Nothing is imported by a name from the file: a name is in the table below, or it is refused. Every tensor is checked
against the bytes that it has.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MEND = "save it again where it was made, as torch.save({'state_dict': model.state_dict()}, path)"
_MAX_KEY = 1 << 31  # larger integers can be chosen to collide in a dict

_PLAIN_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)
_STORAGE_NAMES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64},
}


class Refused(ValueError):
    """The file holds something that is not read; the message continues after the file's name."""


class Malformed(ValueError):
    """The bytes are not a complete pickle that PyTorch wrote."""


class StorageType(NamedTuple):
    """Stands for a storage class in a pickle: the dtype of its elements, None for dtypes that are not read."""

    dtype: torch.dtype | None


class Storage(NamedTuple):
    """A tensor's bytes (uint8, one-dimensional) and the dtype of its elements."""

    buffer: Tensor
    dtype: torch.dtype


@dataclass
class Record:
    """An object of TorchScript or argparse: its class's name and its state. None of its code has been executed."""

    kind: str
    state: Any = None


@dataclass(frozen=True)
class Unusable:
    """Stands for a value of a known kind that is not read, such as a sparse tensor; ``what`` names it in messages."""

    what: str


@dataclass
class NumberType:
    """NumPy's dtype of a single number, as a pickle describes it."""

    code: str
    order: str = "="


@dataclass(frozen=True)
class Function:
    """Stands for a known function in a pickle; ``build`` makes the value from its arguments."""

    build: Callable[..., Any]


def as_key(value: Any) -> Any:
    if type(value) in (str, bool, type(None)) or (type(value) is int and abs(value) < _MAX_KEY):
        return value
    raise Refused(f"holds a dict key or set element of type {type(value).__name__} or a huge number; {MEND}")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, *rest: Any) -> Any:
    """``torch._utils._rebuild_tensor_v2``, which also checks offset, size and stride against the storage's bytes."""
    if isinstance(storage, Unusable):
        return storage
    if len(rest) > 1 and rest[1]:
        return Unusable("a conjugated or negated view")
    if type(storage) is not Storage:
        raise Malformed("a tensor without a storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 64 or any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
        raise Malformed(f"a tensor of size {size!r:.80} and stride {stride!r:.80}")
    elements = storage.buffer.numel() // storage.dtype.itemsize
    if 0 not in size:
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= elements:
            raise Malformed(f"a tensor of size {tuple(size)!r:.80} in a storage of {elements} elements")
    tensor = torch.empty(0, dtype=storage.dtype)
    tensor.set_(storage.buffer.untyped_storage(), offset, tuple(size), tuple(stride))  # type: ignore[call-overload]
    return tensor.requires_grad_() if requires_grad is True else tensor


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any) -> Any:
    if isinstance(dtype, Unusable) or isinstance(storage, Unusable):
        return Unusable("a tensor of a dtype that is not read")
    if type(storage) is not Storage or not isinstance(dtype, torch.dtype):
        raise Malformed("a tensor without a storage or dtype")
    return _tensor(Storage(storage.buffer, dtype), offset, size, stride, grad, hooks, *rest)


def _parameter(data: Any, requires_grad: Any, hooks: Any = None) -> Any:
    if isinstance(data, Unusable):
        return data
    if not isinstance(data, Tensor):
        raise Malformed("a parameter without a tensor")
    return torch.nn.Parameter(data.detach(), requires_grad is True)


def _ordered(pairs: Any = ()) -> Any:
    return OrderedDict((as_key(key), value) for key, value in pairs)


def _counter(counts: Any = None) -> Any:
    if not isinstance(counts, (dict, type(None))):
        raise Malformed("a Counter of no dict")
    return Counter(counts)


def _encode(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Malformed("bytes in an unknown encoding")
    return text.encode("latin-1")


def _bytes(kind: type) -> Callable[..., Any]:
    def build(*written: Any) -> Any:
        return kind(_encode(*written)) if written else kind()

    return build


def _numpy_dtype(code: Any, *flags: Any) -> Any:
    if type(code) is not str or not re.fullmatch(r"[fiu][1248]|f16|b1|c8|c16", code):
        raise Malformed("a NumPy dtype that is no number's")
    return NumberType(code)


def _numpy_number(dtype: Any, raw: Any) -> Any:
    raw = raw.encode("latin-1") if type(raw) is str else raw
    kind = np.dtype(dtype.order + dtype.code) if type(dtype) is NumberType else None
    if kind is None or type(raw) is not bytes or len(raw) != kind.itemsize:
        raise Malformed("a NumPy number without its bytes")
    return np.frombuffer(raw, kind)[0]


def _size(numbers: Any = ()) -> torch.Size:
    if type(numbers) not in (tuple, list) or any(type(number) is not int for number in numbers):
        raise Malformed("a torch.Size of no numbers")
    return torch.Size(numbers)


def _device(kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise Malformed("a device without a name")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _set(elements: Any = ()) -> set[Any]:
    return {as_key(element) for element in elements}


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise Malformed("a complex number of no numbers")
    return complex(real, imaginary)


def _nothing(*_: Any) -> None:
    return None


def _unusable(what: str) -> Function:
    return Function(lambda *_, **__: Unusable(what))


def _known_names() -> dict[str, Any]:
    """The table of known globals by ``module name``, as pickletools writes them."""
    names: dict[str, Any] = {
        "collections OrderedDict": Function(_ordered),
        "collections Counter": Function(_counter),
        "_codecs encode": Function(_encode),
        "torch Size": Function(_size),
        "torch device": Function(_device),
        "torch._utils _rebuild_tensor": Function(_tensor),
        "torch._utils _rebuild_tensor_v2": Function(_tensor),
        "torch._utils _rebuild_tensor_v3": Function(_tensor_v3),
        "torch._utils _rebuild_parameter": Function(_parameter),
        "torch._utils _rebuild_parameter_with_state": _unusable("a parameter with a state of its own"),
        "torch._utils _rebuild_qtensor": _unusable("a quantised tensor"),
        "torch._utils _rebuild_sparse_tensor": _unusable("a sparse tensor"),
        "torch._utils _rebuild_sparse_csr_tensor": _unusable("a sparse tensor"),
        "torch._utils _rebuild_nested_tensor": _unusable("a nested tensor"),
        "torch._utils _rebuild_meta_tensor_no_storage": _unusable("a tensor without values, on the meta device"),
        "torch._utils _rebuild_wrapper_subclass": _unusable("a tensor of a subclass"),
        "torch._tensor _rebuild_from_type_v2": _unusable("a tensor of a subclass"),
        "torch.serialization _get_layout": _unusable("a memory layout"),
        "torch.nn.parameter UninitializedParameter": _unusable("a lazy parameter, which has no shape yet"),
        "torch.nn.parameter UninitializedBuffer": _unusable("a lazy buffer, which has no shape yet"),
        "numpy dtype": Function(_numpy_dtype),
        "torch.storage UntypedStorage": StorageType(torch.uint8),
        "torch UntypedStorage": StorageType(torch.uint8),
    }
    builtins: dict[str, Callable[..., Any]] = {
        "set": _set,
        "complex": _complex,
        "bytes": _bytes(bytes),
        "bytearray": _bytes(bytearray),
    }
    for name, build in builtins.items():
        names[f"builtins {name}"] = names[f"__builtin__ {name}"] = Function(build)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names[f"{module} scalar"] = Function(_numpy_number)
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            names[f"torch {name}"] = value if value in _PLAIN_DTYPES else Unusable(f"the dtype {value}")
        elif isinstance(value, torch.qscheme):
            names[f"torch {name}"] = Unusable(f"the quantisation {value}")
    for kind in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4"):
        names[f"torch {kind}Storage"] = StorageType(None)
    for kind, dtype in _STORAGE_NAMES.items():
        names[f"torch {kind}Storage"] = names[f"torch.cuda {kind}Storage"] = StorageType(dtype)
    # TorchScript's typed lists and dicts are no weights: their content is dropped
    for name in ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag"):
        names[f"torch.jit._pickle {name}"] = Function(_nothing)
    return names


KNOWN: Mapping[str, Any] = _known_names()
