"""The drop-in: swap the forwards of the systems' parts inside somebody else's model, in place and reversibly.

``fastris.patch(model)`` looks for what the registered systems offer, such as CRIS-style decoders, projectors and necks,
by their structure, whatever their classes are called. Structure alone proves nothing, so each candidate is tested first
(the "proof"): on a deep copy with random parameters, in float64, its own forward and the published formula must give
the same outputs, the same gradients of inputs and parameters and the same BatchNorm statistics, in eval mode and in
training, on small and on large inputs, and with each of its dropouts in turn dropping everything; and its own forward
must not draw other random numbers or store anything. Only then is the forward of that one instance replaced. A module
that cannot be proved equal is left alone, and the report says why.

Each call of a replaced forward checks whether the proof covers it, and otherwise runs the module's own forward. It does
so for arguments of another kind, after a change of the module's settings, and where hooks, adapters or wrappers were
put on a layer whose own forward is no longer called. The first call at new sizes checks whether the two agree there
too, and puts the module's own forward back, with a warning, where they do not (sizes.py).
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastris.dropin.find import drop_ins, near_miss, parts_like
from fastris.dropin.parts import DropIn, Part
from fastris.dropin.proof import Proof, Unproved, prove
from fastris.dropin.sizes import MARK, put_back

NOTHING_LEFT = "no other {of} part was found; encoders, loss and the rest run as before"


@dataclass
class PatchReport:
    """What :func:`patch` did: ``replaced`` holds (module path, part), ``left_alone`` (module path, reason).

    ``systems``: the titles of the systems whose parts were looked for.
    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    systems: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = len(self.replaced)
        replaced = _grouped(self.replaced, "{paths} ({what})", ", ")
        left_alone = _grouped(self.left_alone, "{paths}: {what}", "; ")
        nothing_left = NOTHING_LEFT.format(of=" or ".join(f"{system}-style" for system in self.systems))
        return "\n".join(
            (
                f"fastris replaced the forward of {count} module{'' if count == 1 else 's'}",
                f"  replaced: {replaced or 'nothing'}",
                f"  left alone: {left_alone or nothing_left}",
            )
        )

    __repr__ = __str__


def _grouped(rows: list[tuple[str, str]], form: str, separator: str) -> str:
    """One entry for all modules with the same text."""
    groups: dict[str, list[str]] = {}
    for path, what in rows:
        groups.setdefault(what, []).append(path or "the model")
    return separator.join(form.format(paths=", ".join(paths), what=what) for what, paths in groups.items())


def patch(model: nn.Module) -> PatchReport:
    """Replace the forwards of the CRIS-style parts of ``model`` by fastris's, on these instances only.

    Other registered systems' parts are found as well, where they offer any: see :mod:`fastris.dropin.find`.

    Parameters, their names, buffers, hooks, the state dict, optimizer references and a surrounding DDP stay as they
    are; other instances of the same classes are not touched. A call that the proof does not cover runs the original
    forward: see the module's docstring. The first call at new sizes (batch, pixels, words; training and eval mode
    apart) costs two more forwards without gradients, and warns where it puts the original back. Sizes cannot be checked
    during a CUDA graph's capture, under vmap or with fake tensors; new ones run the original there.

    Call it before ``torch.compile``, so that the sizes that are compiled for are checked. Where they stay open
    (``dynamic=True``), ours runs for sizes between those that were checked before, the original for others. A deep copy
    of a patched model is patched; an unpickled one has its original forwards again, so that a saved model never depends
    on fastris. Which path then runs follows :func:`fastris.use_impl` and ``FASTRIS_IMPL``. The fast paths can be
    differentiated once: code that differentiates a gradient again needs ``use_impl("reference")``. Unpatch a model
    before ``nn.DataParallel``, whose copies of a module lose the replaced forward; DistributedDataParallel is fine.

    Args:
        model: any module that contains CRIS-style decoders (published ``TransformerDecoder`` and its layers, also
            those that return the cross-attention's weights), projectors (``Projector``, also with several maps scored
            by one text kernel or several text kernels over one map) or necks (``FPN``, and the gates in ETRIS's
            ``HA``). Layers and projectors may have other names.

    Returns a :class:`PatchReport`; print it. Raises TypeError when ``model`` is no module.
    """
    _check_module(model)
    offers = drop_ins()
    report = PatchReport(systems=tuple(offers))
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has: gradients are part of the proof
        _replace(model, offers, report)
    return report


def _replace(model: nn.Module, offers: dict[str, DropIn], report: PatchReport) -> None:
    """What :func:`patch` does, noted in ``report``."""
    known: dict[Any, Proof | Unproved] = {}
    ours: list[str] = []
    for path, module in model.named_modules():
        if _is_patched(module):
            report.left_alone.append((path, "already patched"))
        elif hasattr(module, "_orig_mod"):  # torch.compile's wrapper; what it wraps comes next
            continue
        elif _is_ours(module):
            if not any(path.startswith(f"{outer}." if outer else "") for outer in ours):
                report.left_alone.append((path, "already fastris"))
            ours.append(path)
        elif parts := parts_like(module, offers):
            _try_parts(report, path, module, parts, known, near_miss(module, offers))
        elif (why := near_miss(module, offers)) is not None:
            report.left_alone.append((path, why))


def _is_ours(module: nn.Module) -> bool:
    """Whether the module's forward is defined by fastris, also where somebody derived a class from ours."""
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    return owner.__module__.partition(".")[0] == __name__.partition(".")[0]


def _try_parts(
    report: PatchReport,
    path: str,
    module: nn.Module,
    parts: list[Part],
    known: dict[Any, Proof | Unproved],
    lacking: str | None,
) -> None:
    """Replace the forward by the first of ``parts`` that can be proved equal, or report why the first cannot.

    ``lacking``: which attributes the module lacks.
    """
    reasons = []
    for part in parts:
        try:
            _check_forward(module)
            _swap(module, prove(module, part, known), path)
        except Unproved as why:
            reasons.append(f"{part.name}-like, but {why}")
        else:
            report.replaced.append((path, part.name))
            return
    report.left_alone.append((path, f"{lacking} (tried without: {reasons[0]})" if lacking else reasons[0]))


def unpatch(model: nn.Module) -> int:
    """Give every patched module of ``model`` its own forward back; returns how many there were."""
    _check_module(model)
    return sum([put_back(module) for module in model.modules()])


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _is_patched(module: nn.Module) -> bool:
    return hasattr(module.__dict__.get("forward"), MARK)


def _check_forward(module: nn.Module) -> None:
    """Raise Unproved if somebody else has replaced the module's forward, or TorchScript has compiled it.

    An unpickled module may hold its class's own forward, bound to itself; that is no replacement.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise Unproved("it is compiled by TorchScript")
    own = module.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        raise Unproved("its forward was already replaced by someone else")


def _swap(module: nn.Module, proof: Proof, path: str) -> None:
    module.__dict__["forward"] = types.MethodType(_as_forward(proof, type(module).forward, path), module)


def _as_forward(proof: Proof, original: Callable, path: str) -> Callable:
    """The part's forward as a method with ``original``'s arguments, which runs ``original`` for calls without proof.

    The method must be named ``forward``: a pickled bound method is looked up by name, which then finds the class's own.
    """
    signature = inspect.signature(original)
    ours = len(inspect.signature(proof.part.forward).parameters) - 1
    names = list(signature.parameters)[1:]
    further = {name: signature.parameters[name] for name in names[ours:]}

    def as_proved(self, args: tuple, kwargs: dict) -> tuple | None:
        """The inputs when the call is covered by the proof, else None."""
        if kwargs or len(args) != ours:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            if any(not _is_unused(further[name], bound.arguments[name]) for name in further):
                return None
            args = tuple(bound.arguments[name] for name in names[:ours])
        return args if proof.covers(args) and proof.holds(self) else None

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        inputs = as_proved(self, args, kwargs)
        if inputs is None or not proof.sizes.agree(self, proof.part, original, inputs, path):
            return original(self, *args, **kwargs)
        return proof.part.forward(self, *inputs)

    forward.__name__ = "forward"
    setattr(forward, MARK, True)
    return forward


def _is_unused(parameter: inspect.Parameter, value: Any) -> bool:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return not value
    return value is parameter.default
