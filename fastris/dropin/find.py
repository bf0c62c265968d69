"""Find the parts that a module may be, by its attributes or by its submodules; proof.py then decides.

A system offers its parts by the ``drop_in`` of its row in :mod:`fastris.models.registry`, which says where its
:class:`~fastris.dropin.parts.DropIn` is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from fastris.dropin.parts import DropIn, Part
from fastris.models import registry


def drop_ins() -> dict[str, DropIn]:
    """What the registered systems offer, by the systems' titles, in the order of the registry."""
    offering = [system for system in registry.SYSTEMS.values() if system.drop_in]
    return {registry.config_class(system.name).title: registry.resolve(system.drop_in) for system in offering}


def parts_like(module: nn.Module, offers: dict[str, DropIn]) -> list[Part]:
    """The parts that ``module`` may be, likeliest first; empty when it resembles none."""
    return [dataclasses.replace(part, of=title) for title, offer in offers.items() for part in _found(module, offer)]


def _found(module: nn.Module, offer: DropIn) -> Sequence[Part]:
    for attributes, find in offer.by_name:
        if all(hasattr(module, name) for name in attributes):
            parts = find(module)
            if parts:
                return parts
    for find in offer.by_make:
        parts = find(module)
        if parts:
            return parts
    return ()


def near_miss(module: nn.Module, offers: dict[str, DropIn]) -> str | None:
    """What to say of a module that resembles a part without having all that it is recognised by; None of the others."""
    return next(filter(None, (offer.near(module) for offer in offers.values())), None)
