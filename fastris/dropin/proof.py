"""Prove by tests that a module computes what a system's part computes, and check that it stays so. See patch.py."""

from __future__ import annotations

import inspect
import operator
import pickle
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastris.dispatch import use_impl
from fastris.dropin.copies import (
    HOOKS,
    Noise,
    fresh_copy,
    random_copy,
    structure_of,
    tensors_in,
    unnoticed,
    without_dropout,
)
from fastris.dropin.parts import Part
from fastris.dropin.sizes import Sizes

# The scales of the test inputs; large ones reveal a module that clamps its values.
SCALES = (1.0, 1e4)
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


class Unproved(Exception):
    """The module could not be proved equal and is left alone; the message is the report's reason."""


@dataclass(frozen=True)
class Proof:
    """What was proved, and what must not change for the proof to hold.

    Attributes:
        part: the part that the module was proved to be.
        without: the positions of optional inputs that may be None.
        bypassed: the submodules whose own forwards are no longer called, with their classes.
        settings: the module's own numbers, strings and flags.
        sizes: the sizes of inputs that were checked since.
    """

    part: Part
    without: frozenset[int]
    bypassed: tuple[tuple[str, type], ...]
    settings: dict[str, Any]
    sizes: Sizes = field(default_factory=Sizes)

    def holds(self, module: nn.Module) -> bool:
        """False when somebody hooked, wrapped or replaced a bypassed descendant, or changed a setting."""
        for name, value in self.settings.items():
            now = getattr(module, name, None)
            if type(now) is not type(value) or now != value:
                return False
        return self.disturbed(module) is None

    def disturbed(self, module: nn.Module) -> str | None:
        """The first bypassed submodule that was replaced, or was given hooks or another forward; else None."""
        for name, kind in self.bypassed:
            try:
                child = operator.attrgetter(name)(module)
            except AttributeError:
                return name
            if type(child) is not kind or "forward" in child.__dict__ or any(getattr(child, h) for h in HOOKS):
                return name
        return None

    def covers(self, inputs: tuple) -> bool:
        """Whether the inputs are of the kind that was proved."""
        for place, value in enumerate(inputs):
            if value is None and place not in self.without:
                return False
        return self.part.takes(*inputs)


def prove(module: nn.Module, part: Part, known: dict[Any, Proof | Unproved] | None = None) -> Proof:
    """Prove that the module's own forward equals ``part``'s in every test; raises Unproved with what differed.

    ``known`` caches the outcomes: modules that no test could tell apart, such as a decoder's layers, are proved once.
    """
    known = {} if known is None else known
    key = part.name, part.forward, _likeness(module)
    if key not in known:
        try:
            known[key] = _prove(module, part)
        except Unproved as why:
            known[key] = why
    outcome = known[key]
    if isinstance(outcome, Unproved):
        raise outcome
    disturbed = outcome.disturbed(module)
    if disturbed:
        raise Unproved(f"its {disturbed} has hooks or a forward that somebody replaced, which we would not run")
    return outcome


def _prove(module: nn.Module, part: Part) -> Proof:
    if part.obstacle:
        raise Unproved(part.obstacle)
    _check_signature(module, part)
    with unnoticed(torch.device("cpu")), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        original = _attempt(
            "no copy of it could be made", random_copy, module, Noise(torch.float64, torch.device("cpu"))
        )
        inputs = _attempt("no inputs for it could be made", part.inputs, original)
        bypassed: set[str] = set()
        for probe in (*(_Probe(False, None, scale, scale == 1.0) for scale in SCALES), _Probe(True)):
            bypassed |= _compare(original, part, inputs, probe)
        for name, child in original.named_modules():
            if _is_dropout(child) and name in bypassed:  # the others' own forwards run in both
                _compare(original, part, inputs, _Probe(True, name, weights=False))
        without = frozenset(place for place in part.optional if _equal_without(original, part, inputs, place))
    kinds = tuple((name, type(child)) for name, child in module.named_modules() if name in bypassed)
    return Proof(part, without, kinds, _settings(module))


def _likeness(module: nn.Module) -> tuple:
    """A key that is equal for two modules that no test could tell apart; the parameters' values do not matter."""
    places: dict[int, int] = {}
    rows: list[tuple] = []
    for name, child in module.named_modules(remove_duplicate=False):
        rows.append((name, type(child), places.setdefault(id(child), len(places))))
        for key, value in vars(child).items():
            if key not in _MODULE_ATTRIBUTES:
                rows.append((key, type(value), value if _is_plain(value) else id(value)))
        for key, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is None:
                rows.append((key, None))
                continue
            drawn = tensor.is_floating_point() or key == "num_batches_tracked"
            place = places.setdefault(id(tensor), len(places))
            rows.append((key, type(tensor), place, tensor.shape, tensor.dtype, tensor.device, drawn or id(tensor)))
    return tuple(rows)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _check_signature(module: nn.Module, part: Part) -> None:
    signature = _attempt("its forward cannot be inspected", inspect.signature, type(module).forward)
    theirs, ours = (list(s.parameters.values())[1:] for s in (signature, inspect.signature(part.forward)))
    if len(theirs) < len(ours) or any(p.kind in _VARIABLE for p in theirs[: len(ours)]):
        raise Unproved(f"its forward takes {_named(theirs)} where {part.of}'s takes {_named(ours)}")
    needed = [p for p in theirs[len(ours) :] if p.default is p.empty and p.kind not in _VARIABLE]
    if needed:
        raise Unproved(f"its forward needs {_named(needed)} as well")
    codes = [getattr(vars(kind).get("forward"), "__code__", None) for kind in type(module).__mro__]
    if any("autocast" in code.co_names for code in codes if code):
        raise Unproved("its forward switches autocast by itself")


def _named(parameters: list[inspect.Parameter]) -> str:
    return f"({', '.join(p.name for p in parameters)})"


class _Probe(NamedTuple):
    """One test: the mode and the inputs' scale that both forwards run with."""

    training: bool
    dropped: str | None = None  # the dropout that drops everything
    scale: float = 1.0
    weights: bool = True  # whether gradients of matrices and kernels are compared: they cost most of the time

    def __str__(self) -> str:
        when = "in training" if self.training else "in eval mode"
        size = f" on inputs of scale {self.scale:g}" if self.scale != 1.0 else ""
        return f"{when}{size}{f' with {self.dropped} dropping everything' if self.dropped else ''}"


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, (nn.Dropout, nn.MultiheadAttention))


def _equal_without(original: nn.Module, part: Part, inputs: tuple, place: int) -> bool:
    """Whether the two are also equal with None as the input at ``place``."""
    missing = (*inputs[:place], None, *inputs[place + 1 :])
    try:
        for training in (False, True):
            _compare(original, part, missing, _Probe(training, weights=False))
    except Unproved:
        return False
    return True


def _compare(original: nn.Module, part: Part, inputs: tuple, probe: _Probe) -> set[str]:
    """Run one test; raises Unproved where the two forwards differ.

    Returns the names of the submodules that the module's own forward calls more often than ours.
    """
    theirs = _attempt(
        f"its forward does not run on {part.of}'s inputs", _run, original, type(original).forward, inputs, probe
    )
    if theirs.random:
        raise Unproved(f"{probe} it draws random numbers of its own")
    if theirs.stored:
        raise Unproved(f"{probe} it stores {theirs.stored} on itself")
    with use_impl("reference"):
        ours = _attempt("fastris does not run on it", _run, original, part.forward, inputs, probe)
    if theirs.structure != ours.structure:
        raise Unproved(f"it returns {_spelled(theirs.structure)} where {part.of}'s returns {_spelled(ours.structure)}")
    if len(theirs.tensors) != len(ours.tensors):
        raise Unproved(f"{probe} it adds or drops buffers")
    for mine, yours in zip(theirs.tensors, ours.tensors, strict=True):
        if mine.shape != yours.shape:
            raise Unproved(f"it returns the shape {tuple(mine.shape)} where {part.of}'s returns {tuple(yours.shape)}")
        if mine.dtype != yours.dtype:
            raise Unproved(f"it changes the dtype from {_dtype(yours)} to {_dtype(mine)}")
        if torch.equal(mine, yours):
            continue
        scale = yours.double().abs().max().clamp_min(1.0) if yours.numel() else torch.tensor(1.0)
        if not torch.isfinite(mine).all() or (mine.double() - yours.double()).abs().max() > part.tolerance * scale:
            raise Unproved(f"{probe} its values or gradients differ from {part.of}'s")
    return {name for name, count in theirs.calls.items() if count > ours.calls[name]}


def _attempt(trouble: str, function: Callable, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:  # whatever other people's code raises on our test, it is no proof
        lines = str(error).splitlines() or [""]
        raise Unproved(f"{trouble} ({type(error).__name__}: {lines[0][:120]})") from error


class _Traces(NamedTuple):
    """The results of one pass: ``tensors`` holds outputs, gradients of inputs and parameters, and buffers.

    ``calls`` counts each submodule's calls, ``stored`` names the attributes that were set, ``random`` says whether
    random numbers were drawn.
    """

    tensors: list[Tensor]
    structure: Any
    calls: Counter[str]
    stored: str
    random: bool


def _run(original: nn.Module, forward: Callable, inputs: tuple, probe: _Probe) -> _Traces:
    module = without_dropout(fresh_copy(original).train(probe.training), probe.dropped)
    calls: Counter[str] = Counter()
    for name, child in module.named_modules():
        if name:
            child.register_forward_pre_hook(lambda _module, _args, name=name: calls.update((name,)))
    leaves = [(x * probe.scale).requires_grad_() if x.is_floating_point() else x for x in tensors_in(inputs)]
    given = _like(inputs, iter(leaves))
    attributes = [(child, _attributes(child)) for child in module.modules()]
    before = _random_states()
    answer = forward(module, *given)
    drew = _random_states() != before
    stored = {key for child, known in attributes for key in _changed(known, _attributes(child))}
    outputs = tensors_in(answer)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    parameters = [p for p in module.parameters() if probe.weights or p.ndim < 2]
    targets = [x for x in (*leaves, *parameters) if x.requires_grad]
    gradients = torch.autograd.grad(outputs, targets, upstream, allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, targets, strict=True)]
    tensors = [*outputs, *filled, *module.buffers()]
    return _Traces(tensors, structure_of(answer), calls, ", ".join(sorted(stored)), drew)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, int]]:
    """A module's own attributes with their lengths, which show that a list, dict or set has grown."""
    return {
        key: (value, len(value) if isinstance(value, (list, dict, set)) else 0)
        for key, value in vars(module).items()
        if key not in _MODULE_ATTRIBUTES
    }


def _changed(before: dict[str, tuple[Any, int]], after: dict[str, tuple[Any, int]]) -> list[str]:
    nothing = (None, -1)
    pairs = ((key, before.get(key, nothing), after.get(key, nothing)) for key in before.keys() | after.keys())
    return [key for key, old, new in pairs if old[0] is not new[0] or old[1] != new[1]]


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if key not in _MODULE_ATTRIBUTES and isinstance(value, (bool, int, float, str, type(None)))
    }


def _random_states() -> bytes:
    return pickle.dumps((torch.random.get_rng_state().numpy(), random.getstate(), np.random.get_state()))


def _spelled(structure: Any) -> str:
    if isinstance(structure, tuple):
        return f"a {structure[0].__name__} of {len(structure) - 1}"
    return f"a {structure.__name__}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _like(structure: Any, leaves: Any) -> Any:
    if isinstance(structure, Tensor):
        return next(leaves)
    return structure if structure is None else type(structure)(_like(item, leaves) for item in structure)
