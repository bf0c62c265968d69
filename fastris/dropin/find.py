"""Which parts of CRIS a module looks like, by its attributes or by what it is made of. What it computes is
proof.py's question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastris.dropin.decoders import LAYER, decoders, layers, renamed_layers
from fastris.dropin.necks import NECK, gates, necks
from fastris.dropin.parts import Part
from fastris.dropin.projectors import projectors, renamed_projectors

# By attributes. The neck stands before the projector: necks that hold a projector's attributes as well exist, the
# reverse does not.
_BY_NAME: tuple[tuple[tuple[str, ...], Callable[[Any], list[Part]]], ...] = (
    (LAYER, layers),
    (("layers", "norm"), decoders),
    (NECK, necks),
    (("vis", "txt"), projectors),
    (("vis", "txt_fc"), projectors),
)

# By what a module is made of, where it has none of these names; each gives nothing for all that is unlike.
_BY_MAKE: tuple[Callable[[nn.Module], list[Part]], ...] = (gates, renamed_layers, renamed_projectors)


def parts_like(module: nn.Module) -> list[Part]:
    """The parts of CRIS that ``module`` may be, likeliest first; empty when it resembles none."""
    for attributes, make in _BY_NAME:
        if all(hasattr(module, name) for name in attributes):
            parts = make(module)
            if parts:
                return parts
    for find in _BY_MAKE:
        parts = find(module)
        if parts:
            return parts
    return []
