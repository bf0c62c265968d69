"""Check a replaced forward at the first call with new sizes. See patch.py.

A proof runs on small inputs, but a forward may depend on their size: it may ignore all words after the eighth, or crop
or resize wide maps. So the first call at new sizes first checks whether the two forwards agree there: on a copy of the
module with random parameters and random inputs of the call's sizes, in the call's mode but without dropout, its own
forward and the published formula are run once each, without gradients, in float32, and in float64 where the two are not
clearly equal. The user's tensors, statistics and random numbers are not used, so the outcome does not depend on them: a
word that is cut off is found even where it is padding in this batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastris.dispatch import use_impl
from fastris.dropin.copies import (
    Noise,
    fresh_copy,
    random_copy,
    structure_of,
    tensors_in,
    unnoticed,
    without_dropout,
)

MARK = "_fastris_patched"
# The number of different sizes that are all checked. After that only sizes outside the range of those seen so far are
# checked, and of the others the 1st, 2nd, 4th, 8th and so on.
LIMIT = 64
# Largest difference of float32 results, as a fraction of their scale; above it, float64 decides.
_PLAINLY_EQUAL = 1e-5


class Sizes:
    """The sizes at which a proof was checked. ``refusal`` says where the two forwards differed, if they did.

    Modules that share a proof, and their copies, share this too.
    """

    def __init__(self) -> None:
        self.refusal: str | None = None
        self._agreed: set[tuple] = set()
        self._unanswered: set[tuple] = set()
        self._ranges: dict[tuple, tuple[tuple[int, int], ...]] = {}
        self._further = 0
        self._said: set[tuple[str, str]] = set()

    def agree(self, module: nn.Module, part: Any, original: Callable, inputs: tuple, path: str) -> bool:
        """Whether our forward may run for this call; False where the two differ or the sizes cannot be checked now."""
        kind, sizes = (module.training, _forms(inputs)), _sizes(inputs)
        if torch.compiler.is_compiling():
            return self._agree_in_graph(module, part, original, kind, sizes, path)
        if self.refusal is None and (kind, sizes) in self._agreed:
            return True
        if self.refusal is None and not _can_look(module, inputs):
            return False
        if self.looked_at(module, part, original, kind, sizes, path):
            return True
        if self.refusal is not None:
            put_back(module)
        return False

    def _agree_in_graph(self, module: Any, part: Any, original: Any, kind: tuple, sizes: tuple, path: str) -> bool:
        """Under torch.compile: fixed sizes are checked while tracing, dynamic ones must lie in the checked range."""
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if all([has_static_value(size) for size in sizes]):
            return _look_while_tracing(self, module, part, original, kind, sizes, path)
        for size, (smallest, largest) in zip(sizes, _known_while_tracing(self, kind, len(sizes)), strict=True):
            if size < smallest or size > largest:
                _say_open_while_tracing(self, path)
                return False
        return True

    def known(self, kind: tuple, count: int) -> tuple[tuple[int, int], ...]:
        """(smallest, largest) of each size that agreed, (1, 0) for none; the proof itself covers sizes from 2 on."""
        if self.refusal is not None:
            return ((1, 0),) * count
        return tuple((min(2, low), high) for low, high in self._ranges.get(kind, ((1, 0),) * count))

    def looked_at(self, module: nn.Module, part: Any, original: Callable, kind: tuple, sizes: tuple, path: str) -> bool:
        """Check the sizes, unless that is done already, and remember the outcome; whether the two forwards agree."""
        if self.refusal is not None:
            self.warn(path, self.refusal)
            return False
        if (kind, sizes) in self._unanswered:
            return False
        if not self._worth_a_look(kind, sizes):
            return True
        try:
            difference = _difference(module, part, original, kind[1], sizes)
        except (_Unanswered, torch.OutOfMemoryError) as error:
            if len(self._unanswered) < LIMIT:
                self._unanswered.add((kind, sizes))
            if not isinstance(error, _Unanswered):
                self.warn(path, f"there is not enough memory to see whether it is still {part.of}'s at new sizes")
            return False
        except Exception as error:  # a module that was changed so that it cannot be copied, say
            difference = f"it cannot be seen whether it is still {part.of}'s ({_named(error)})"
        if difference:
            self.refusal = f"{_spelled(kind, sizes)} {difference}"
            self.warn(path, self.refusal)
            return False
        self._remember(kind, sizes)
        return True

    def _worth_a_look(self, kind: tuple, sizes: tuple) -> bool:
        if (kind, sizes) in self._agreed:
            return False
        ranges = self._ranges.get(kind)
        if len(self._agreed) < LIMIT or ranges is None:
            return True
        if any(not low <= size <= high for size, (low, high) in zip(sizes, ranges, strict=True)):
            return True
        self._further += 1
        return self._further & (self._further - 1) == 0

    def _remember(self, kind: tuple, sizes: tuple) -> None:
        ranges = self._ranges.get(kind, tuple((size, size) for size in sizes))
        self._ranges[kind] = tuple((min(a, size), max(b, size)) for size, (a, b) in zip(sizes, ranges, strict=True))
        if len(self._agreed) < LIMIT:
            self._agreed.add((kind, sizes))

    def warn(self, path: str, why: str) -> None:
        """Warn, once per module and reason, that its own forward runs again."""
        if (path, why) not in self._said:
            self._said.add((path, why))
            warnings.warn(f"fastris.patch: {path or 'the model'} runs its own forward again: {why}", stacklevel=2)


def put_back(module: nn.Module) -> bool:
    """Give a patched module its own forward back; returns whether it was patched."""
    if not hasattr(module.__dict__.get("forward"), MARK):
        return False
    return module.__dict__.pop("forward", None) is not None


# torch.compile calls these three while it traces, and keeps their results as constants.
def _constant(function: Callable) -> Callable:
    """As torch.compiler.assume_constant_result, which would import the compiler here."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _look_while_tracing(sizes: Sizes, *call: Any) -> bool:
    return sizes.looked_at(*call)


@_constant
def _known_while_tracing(sizes: Sizes, kind: tuple, count: int) -> tuple[tuple[int, int], ...]:
    return sizes.known(kind, count)


@_constant
def _say_open_while_tracing(sizes: Sizes, path: str) -> None:
    sizes.warn(
        path,
        sizes.refusal
        or "it is compiled for sizes that stay open, beyond those that it ran at before; run the model at its largest "
        "sizes without torch.compile first, or compile it with dynamic=False",
    )


def _can_look(module: nn.Module, inputs: tuple) -> bool:
    """Whether sizes can be checked now: not in a CUDA graph's capture, a trace, under vmap or with fake tensors."""
    if any(type(x) not in (Tensor, nn.Parameter) for x in tensors_in(inputs)):
        return False
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return not (_device(module).type == "cuda" and torch.cuda.is_current_stream_capturing())


def _device(module: nn.Module) -> torch.device:
    """The device to check on: that of the module's parameters if it is a CUDA device, else the CPU."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return device if device.type == "cuda" else torch.device("cpu")


class _Unanswered(Exception):
    """The module's own forward does not run on random inputs of these sizes."""


def _difference(module: nn.Module, part: Any, original: Callable, forms: tuple, sizes: tuple) -> str:
    """How the module's own forward differs from the published formula at these sizes; empty if it does not."""
    device = _device(module)
    with unnoticed(device), torch.no_grad():
        for padded in _paddings(forms, sizes):
            for dtype, bound in ((torch.float32, _PLAINLY_EQUAL), (torch.float64, part.tolerance)):
                noise = Noise(dtype, device)
                bare = without_dropout(random_copy(module, noise))
                for child in bare.modules():
                    put_back(child)
                difference = _compared(bare, part, original, _inputs(forms, sizes, noise, padded), bound)
                if not difference:
                    break
            else:
                return difference
    return ""


def _compared(bare: nn.Module, part: Any, original: Callable, inputs: tuple, bound: float) -> str:
    theirs, mine = fresh_copy(bare), fresh_copy(bare)
    try:
        expected = original(theirs, *_cloned(inputs))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _Unanswered from error
    try:
        with use_impl("reference"):
            answer = part.forward(mine, *inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"fastris does not run on it ({_named(error)})"
    if structure_of(expected) != structure_of(answer):
        return f"it returns another structure than {part.of}'s"
    pairs = zip([*tensors_in(expected), *theirs.buffers()], [*tensors_in(answer), *mine.buffers()], strict=False)
    return next(filter(None, (_apart(*pair, bound, part.of) for pair in pairs)), "")


def _apart(theirs: Tensor, ours: Tensor, bound: float, of: str) -> str:
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return f"it returns {_kind(theirs)} where {of}'s returns {_kind(ours)}"
    if torch.equal(theirs, ours):
        return ""
    distance = (theirs.double() - ours.double()).abs().max() / ours.double().abs().max().clamp_min(1.0)
    return "" if distance <= bound else f"its values differ from {of}'s by {float(distance):.1g} of their scale"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of {tuple(tensor.shape)}"


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


# Nested inputs are described by their forms (what they are) and their sizes (one row of numbers). Calls of one kind
# have the same forms at all sizes.


def _forms(value: Any) -> Any:
    """What nested inputs are, as constants: (kind of dtype, number of dimensions) for a tensor."""
    if isinstance(value, Tensor):
        kind = "float" if value.is_floating_point() else "bool" if value.dtype is torch.bool else "int"
        return kind, value.ndim
    if isinstance(value, (list, tuple)):
        return "list" if isinstance(value, list) else "tuple", tuple([_forms(item) for item in value])
    return None


def _sizes(value: Any) -> tuple[int, ...]:
    """The sizes of all tensors in nested inputs, one after the other."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    sizes: tuple[int, ...] = ()
    if isinstance(value, (list, tuple)):
        for item in value:
            sizes = sizes + _sizes(item)
    return sizes


def _shaped(forms: Any, sizes: Iterator[int], make: Callable[[str, tuple[int, ...]], Any]) -> Any:
    """Build the nested inputs that ``forms`` and ``sizes`` describe; ``make(kind, shape)`` makes the tensors."""
    if forms is None:
        return None
    kind, inner = forms
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)([_shaped(form, sizes, make) for form in inner])
    return make(kind, tuple(next(sizes) for _ in range(inner)))


def _inputs(forms: Any, sizes: tuple[int, ...], noise: Noise, padded: int) -> tuple:
    """Random inputs of these sizes.

    A mask marks the last ``padded`` words of its first row as padding, one more in each further row, up to half of the
    row, and then begins anew.
    """

    def make(kind: str, shape: tuple[int, ...]) -> Tensor:
        if kind == "float":
            return noise(*shape)
        if kind == "int" or not shape:
            return torch.zeros(shape, dtype=torch.bool if kind == "bool" else torch.int64, device=noise.device)
        length = shape[-1]
        rows = torch.arange(math.prod(shape[:-1]), device=noise.device) + padded
        words = torch.arange(length, device=noise.device)
        return (words >= length - rows[:, None] % (length // 2 + 1)).view(shape)

    return _shaped(forms, iter(sizes), make)


def _paddings(forms: Any, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of padded words in the first row to check with: two for a mask of a single row, else one."""
    single: list[bool] = []
    _shaped(forms, iter(sizes), lambda kind, shape: single.append(kind == "bool" and shape[:-1] == (1,)))
    return (0, 1) if any(single) else (0,)


def _cloned(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_cloned(item) for item in value])
    return value.clone() if isinstance(value, Tensor) else value


def _spelled(kind: tuple, sizes: tuple[int, ...]) -> str:
    shapes: list[tuple[int, ...]] = []
    _shaped(kind[1], iter(sizes), lambda _kind, shape: shapes.append(shape))
    return f"on inputs of {', '.join(map(str, shapes))} {'in training' if kind[0] else 'in eval mode'}"
