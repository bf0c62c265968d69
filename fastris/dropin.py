"""The drop-in: swap the forwards of CRIS's parts inside somebody else's model, in place and reversibly.

``fastris.patch(model)`` looks for CRIS-style decoders, projectors and necks by their structure, whatever their classes
are called. Structure alone proves nothing, so each candidate is put to a proof first: on a deep copy with random
parameters, in float64, its own forward and the published formula must give the same outputs, the same gradients of
inputs and parameters and the same BatchNorm statistics, in eval mode and in training, and with each of its dropouts in
turn dropping everything. Only then is the forward of that one instance replaced. What cannot be proved equal is left
alone, and the report says why.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastris.dropin_proof import Candidate, candidate_for, prove

_MARK = "_fastris_patched"


@dataclass
class PatchReport:
    """What :func:`patch` did. ``replaced`` and ``left_alone`` hold (module path, what it is or why)."""

    replaced: list[tuple[str, str]] = field(default_factory=list)
    left_alone: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        replaced = ", ".join(f"{path or 'the model'} ({what})" for path, what in self.replaced)
        kept = "; ".join(f"{path or 'the model'}: {why}" for path, why in self.left_alone)
        return "\n".join(
            (
                f"fastris replaced the forward of {len(self.replaced)} modules",
                f"  replaced: {replaced or 'nothing'}",
                f"  left alone: {kept or 'no other CRIS-style part was found'}",
            )
        )

    __repr__ = __str__


def patch(model: nn.Module) -> PatchReport:
    """Replace the forwards of the CRIS-style parts of ``model`` by fastris's, on these instances only.

    Parameters, their names, buffers, hooks, the state dict, optimizer references and a surrounding DDP stay as they
    are; other instances of the same classes are not touched. Call it before ``torch.compile``. A deep copy of a patched
    model is patched; an unpickled one has its original forwards again, so that a saved model never depends on fastris.
    Which path then runs follows :func:`fastris.use_impl` and ``FASTRIS_IMPL``.

    Args:
        model: any module that contains CRIS-style decoders (published ``TransformerDecoder`` and its layers),
            projectors (``Projector``, also with several maps scored by one text kernel) or necks (``FPN``).

    Returns a :class:`PatchReport`; print it. Raises TypeError when ``model`` is no module.
    """
    _check_module(model)
    report = PatchReport()
    for path, module in model.named_modules():
        if _is_patched(module):
            report.left_alone.append((path, "already patched"))
            continue
        candidate = candidate_for(module)
        if candidate is None:
            continue
        why_not = candidate.obstacle or _own_forward(module) or prove(module, candidate)
        if why_not:
            report.left_alone.append((path, f"{candidate.name}-like, but {why_not}"))
        else:
            _swap(module, candidate)
            report.replaced.append((path, candidate.name))
    return report


def unpatch(model: nn.Module) -> int:
    """Give every patched module of ``model`` its own forward back; returns how many there were."""
    _check_module(model)
    patched = [module for module in model.modules() if _is_patched(module)]
    for module in patched:
        del module.__dict__["forward"]
    return len(patched)


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _is_patched(module: nn.Module) -> bool:
    return hasattr(module.__dict__.get("forward"), _MARK)


def _own_forward(module: nn.Module) -> str | None:
    """An unpickled module may hold its class's own forward once more, bound to itself: that is no replacement."""
    own = module.__dict__.get("forward")
    if own is None or getattr(own, "__func__", None) is type(module).forward:
        return None
    return "its forward was already replaced by someone else"


def _swap(module: nn.Module, candidate: Candidate) -> None:
    module.__dict__["forward"] = types.MethodType(_as_forward(candidate.forward, type(module).forward), module)


def _as_forward(function: Callable, original: Callable) -> Callable:
    """``function`` as a method that also takes its arguments by the original forward's names.

    A call that the proof does not cover, with an argument missing, None or beyond those of CRIS, goes to ``original``.
    The method must be named ``forward``: a pickled bound method is looked up by name, and then finds the class's own.
    """
    signature = inspect.signature(original)
    count = len(inspect.signature(function).parameters) - 1

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        values = signature.bind(self, *args, **kwargs).args[1:] if kwargs else args
        if len(values) != count or any(value is None for value in values):
            return original(self, *args, **kwargs)
        return function(self, *values)

    forward.__name__ = "forward"
    setattr(forward, _MARK, True)
    return forward
