"""The systems by name: which class builds a model, which presets it has, and whose a file is. Imports no torch.

A system of your own needs one call, after which its presets train, score, predict and load like those here::

    register(System("toy", "mine.toy:Toy", "mine.toy:ToyConfig", ("toy_small",)))
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fastris.models.config import SYSTEM, ModelConfig


class System(NamedTuple):
    """A system; ``model`` and ``config`` are "module:Class", imported when a model or configuration is wanted."""

    name: str
    model: str
    config: str
    presets: tuple[str, ...]


SYSTEMS: dict[str, System] = {
    "cris": System(
        "cris",
        "fastris.models.cris.model:CRIS",
        "fastris.models.cris.config:CRISConfig",
        ("cris_r50", "cris_r101", "tiny"),
    ),
}
DEFAULT = "cris"
"""Whose configurations and checkpoints are that do not say it: files older than the key, and published ones."""


def register(system: System) -> None:
    """Add a system. ValueError where its name or one of its presets is taken."""
    taken = {system.name} & SYSTEMS.keys() | set(system.presets) & set(presets())
    if taken:
        raise ValueError(f"system {system.name!r} brings names that are taken: {', '.join(sorted(taken))}; rename them")
    SYSTEMS[system.name] = system


def presets() -> list[str]:
    """The names of all models that :func:`create` and ``model=`` take."""
    return [preset for system in SYSTEMS.values() for preset in system.presets]


def preset(name: str) -> ModelConfig:
    """The configuration of a named model; ValueError, with all names, where there is none."""
    for system in SYSTEMS.values():
        if name in system.presets:
            return config_class(system.name).preset(name)
    raise ValueError(f"unknown model {name!r}; choose from {', '.join(presets())}")


def create(what: str | Mapping[str, Any] | ModelConfig) -> Any:
    """A new model, with its start values, of a preset's name, a configuration or a configuration's mapping."""
    if isinstance(what, str):
        what = preset(what)
    config = what if isinstance(what, ModelConfig) else read_config(what)
    return model_class(config.system)(config)


def read_config(mapping: Mapping[str, Any], source: str = "configuration") -> ModelConfig:
    """The configuration that a mapping describes, of the system that it names, or of CRIS. ValueError, as from_dict."""
    try:
        system = system_of(mapping) or DEFAULT
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return config_class(system).from_dict(mapping, source)


def system_of(mapping: Mapping[str, Any]) -> str | None:
    """The system whose configuration this is; None where nothing says so. ValueError for one that is not known.

    Other programs put a ``system`` of their own beside weights, so one that is not known is an error only where the
    fields are there that all of our configurations have.
    """
    name = mapping.get(SYSTEM)
    if isinstance(name, str) and name in SYSTEMS:
        return name
    if "clip" in mapping:
        return DEFAULT
    if isinstance(name, str) and {"input_size", "word_len"} <= mapping.keys():
        raise ValueError(f"it is of the system {name[:80]!r}, and known are {', '.join(SYSTEMS)}; register it first")
    return None


def system_of_names(names: Iterable[str]) -> str:
    """The system that has most of these state-dict names, by their first words; CRIS where none has any."""
    firsts = [name.partition(".")[0] for name in names]

    def share(system: str) -> int:
        parts = config_class(system).parts
        return sum(first in parts for first in firsts)

    return max((DEFAULT, *(name for name in SYSTEMS if name != DEFAULT)), key=share)


def model_class(system: str) -> type[Any]:
    """The class of a system's models, under :class:`fastris.models.base.ReferringModel`."""
    return _resolve(SYSTEMS[system].model)


def config_class(system: str) -> type[ModelConfig]:
    """The class of a system's configurations."""
    return _resolve(SYSTEMS[system].config)


def model_keys() -> list[str]:
    """The fields of all systems' configurations, which may stand among a training's options."""
    return list(dict.fromkeys(f.name for name in SYSTEMS for f in dataclasses.fields(_resolve(SYSTEMS[name].config))))


def _resolve(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
