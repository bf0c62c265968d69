"""Check and compare state dicts of any model: strip wrappers' prefixes, refuse odd tensors, report misfits.

Nothing here opens a file; :mod:`fastris.models.pretrained` and :mod:`fastris.weights.load` do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LISTED = 30


class Reshaped(NamedTuple):
    """A weight whose shape in the file differs from the model's."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} is {self.found}, the model's is {self.expected}"


@dataclass(frozen=True)
class LoadReport:
    """How a set of weights and a model fit, by state-dict name.

    ``missing``: in the model but not in the weights. ``unexpected``: in the weights but not in the model. ``reshaped``:
    in both, with different shapes. ``kept``: allowed to be missing from an encoder's weights (CRIS's ``connect`` and
    BatchNorm's step counters, say), so the model keeps its own values. ``new_parts``: parts of the model, added by a
    switch, that the weights lack as a whole; their names are among the missing. ``loaded``: the number of tensors that
    match.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[Reshaped, ...] = ()
    kept: tuple[str, ...] = ()
    loaded: int = 0
    source: str = "weights"
    new_parts: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether all names and shapes match, apart from those in ``kept`` and in ``new_parts``."""
        return not (self._lost or self.unexpected or self.reshaped)

    @property
    def _lost(self) -> tuple[str, ...]:
        """What is missing in parts that the weights have."""
        return tuple(name for name in self.missing if _part(name) not in self.new_parts)

    @property
    def notice(self) -> str:
        """One line that tells of ``new_parts``; empty where there are none."""
        if not self.new_parts:
            return ""
        count = len(self.missing) - len(self._lost)
        return (
            f"{self.source} has no weights of {' and '.join(self.new_parts)} ({count} tensors): new in this model, "
            "they keep their initial values"
        )

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.loaded} tensors loaded"]
        for title, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.reshaped),
            ("that no encoder's weights have, left as they were", self.kept),
        ):
            if names:
                parts.append(f"{len(names)} {title}: {_listing(names)}")
        return "; ".join(parts)


class WeightsError(ValueError):
    """Weights that do not fit the model; ``report`` holds every name, of which the message shows the first few."""

    def __init__(self, message: str, report: LoadReport):
        super().__init__(message)
        self.report = report


def _part(name: str) -> str:
    return name.partition(".")[0]


def normalise_names(state: Mapping[str, Any], source: str = "weights") -> dict[str, Tensor]:
    """Remove the prefixes of DDP (``module.``) and torch.compile (``_orig_mod.``) from the names.

    Raises ValueError for an entry that is no tensor, for an empty state dict and for two names that become equal.
    """
    if not state:
        raise ValueError(f"{source} holds an empty state dict; save model.state_dict() into it")
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{source}: state dict entry {key!r} must be a tensor under a name, got {type(value)}")
        name = key.replace("_orig_mod.", "").removeprefix("module.")
        if name in plain:
            raise ValueError(f"{source} holds {name} twice, with and without a wrapper's prefix; remove one of them")
        plain[name] = value
    return plain


def check_plain(state: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError, naming the tensor, unless all are dense, real and as large in memory as their shapes say.

    A file can expand one value to a shape of 10^12, or give one block of memory many names; a model of those shapes
    would need far more memory than the file has bytes.
    """
    held: dict[int, int] = {}
    claimed = 0
    for name, tensor in state.items():
        what = _oddity(tensor)
        if what:
            raise ValueError(
                f"{source}: {name} is {what}; make it a dense, contiguous, real tensor where it was made and save again"
            )
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            held[storage._cdata] = storage.nbytes()
            claimed += tensor.numel() * tensor.element_size()
    if claimed > 4 * sum(held.values()) + (1 << 20):
        raise ValueError(
            f"{source}: its {len(state)} tensors share memory: they stand for {claimed} bytes and have "
            f"{sum(held.values())}; save each of them with .clone()"
        )


def _oddity(tensor: Tensor) -> str:
    """Why a tensor is not plain (dense, real, not expanded), in words; empty if it is plain."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    if tensor.is_complex():
        return f"complex ({tensor.dtype})"
    memory = 0 if tensor.is_meta else tensor.untyped_storage().nbytes()
    expanded = any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    if expanded or (not tensor.is_meta and tensor.numel() * tensor.element_size() > memory):
        return f"expanded to {tuple(tensor.shape)} from fewer values"
    return ""


def _never(name: str) -> bool:
    return False


class Adopted(NamedTuple):
    """Another model's weights, renamed for the part of a model that starts from them (CLIP's for CRIS's backbone).

    ``part``: the prefix of that part's names. ``optional``: tells whether a name in it may be missing. ``fitted``:
    makes of a tensor, given its name, one of the model's shape where that differs, or leaves it as it is.
    """

    state: Mapping[str, Tensor]
    part: str
    optional: Callable[[str], bool] = _never
    fitted: Callable[[str, Tensor, torch.Size], Tensor] | None = None

    def fitting(self, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights, those of another shape than in ``own`` as ``fitted`` makes them."""
        if self.fitted is None:
            return self.state
        return {
            name: self.fitted(name, tensor, own[name].shape)
            if name in own and own[name].shape != tensor.shape
            else tensor
            for name, tensor in self.state.items()
        }


def without_parts(
    state: Mapping[str, Tensor], model: Mapping[str, Tensor], parts: Sequence[str]
) -> Mapping[str, Tensor]:
    """The weights without those of the named ``parts`` that the model lacks as a whole: what only training uses."""
    lacking = set(parts) - {_part(name) for name in model}
    return {name: tensor for name, tensor in state.items() if _part(name) not in lacking} if lacking else state


def compare(
    state: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    source: str,
    part: str = "",
    optional: Callable[[str], bool] = _never,
    added: Sequence[str] = (),
) -> LoadReport:
    """Match weights with a model's state dict by name and shape.

    ``part``: only names with this prefix are compared. ``optional``: tells whether a name may be missing; if so, it is
    reported as ``kept``. ``added``: parts that the weights may lack as a whole; those that they lack are reported as
    ``new_parts``.
    """
    wanted = {name: t for name, t in model.items() if name.startswith(part)}
    absent = [name for name in wanted if name not in state]
    kept = [name for name in absent if optional(name)]
    shared = [name for name in wanted if name in state]
    reshaped = [
        Reshaped(n, tuple(state[n].shape), tuple(wanted[n].shape)) for n in shared if state[n].shape != wanted[n].shape
    ]
    lacking = {_part(name) for name in wanted} - {_part(name) for name in state}
    return LoadReport(
        missing=tuple(name for name in absent if name not in set(kept)),
        unexpected=tuple(name for name in state if name not in wanted),
        reshaped=tuple(reshaped),
        kept=tuple(kept),
        loaded=len(shared) - len(reshaped),
        source=source,
        new_parts=tuple(name for name in added if name in lacking),
    )


def copy_fitting(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    """Copy the tensors whose name and shape match into ``own``.

    Raises ValueError, before anything is copied, for tensors without values (meta device).
    """
    lacking = [name for name, tensor in state.items() if tensor.is_meta]
    if lacking:
        raise ValueError(f"{source}: {lacking[0]} has no values (meta device); save the model with its weights")
    with torch.no_grad():
        for name, tensor in state.items():
            if name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)


def misfit_message(report: LoadReport, found: str, expected: str) -> str:
    """The error message for weights that do not fit; ``found`` and ``expected`` name the two image encoders."""
    lines = [f"the weights in {report.source} do not fit the model"]
    if found != expected:
        lines[0] += f": their image encoder looks like {found}, the model's is {expected}; use weights of {expected}"
    if report.missing:
        lines.append(f"  missing ({len(report.missing)}): {_listing(report.missing)}")
    if report.unexpected:
        lines.append(f"  unexpected ({len(report.unexpected)}): {_listing(report.unexpected)}")
    if report.reshaped:
        lines.append(f"  of another shape ({len(report.reshaped)}): {_listing(report.reshaped)}")
    return "\n".join(lines)


def _listing(names: Iterable[Any]) -> str:
    shown = [str(name) for name in names]
    rest = len(shown) - _LISTED
    return ", ".join(shown[:_LISTED]) + (f", and {rest} more" if rest > 0 else "")
