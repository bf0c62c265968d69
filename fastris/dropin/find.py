"""Find the parts of CRIS that a module may be, by its attributes or by its submodules; proof.py then decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastris.dropin.decoders import LAYER, decoders, layers, renamed_layers
from fastris.dropin.necks import NECK, gates, necks
from fastris.dropin.parts import Part
from fastris.dropin.projectors import projectors, renamed_projectors

# Recognised by attributes. Necks come before projectors: some necks also have a projector's attributes, but no
# projector has a neck's.
_BY_NAME: tuple[tuple[tuple[str, ...], Callable[[Any], list[Part]]], ...] = (
    (LAYER, layers),
    (("layers", "norm"), decoders),
    (NECK, necks),
    (("vis", "txt"), projectors),
    (("vis", "txt_fc"), projectors),
)

# Recognised by submodules, for modules without these names; each function returns [] for a module that does not fit.
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
