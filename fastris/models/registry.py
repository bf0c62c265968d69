"""The registry of systems: name -> model class, configuration class and presets. Imports no torch.

To add a system of your own, register it; its presets then train, evaluate, predict and load like those here::

    register(System("toy", "mine.toy:Toy", "mine.toy:ToyConfig", ("toy_small",)))
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fastris.models.config import SYSTEM, ModelConfig


class System(NamedTuple):
    """One system; ``model`` and ``config`` are import paths, "module:Class", imported on first use.

    ``drop_in`` is the "module:NAME" of the ``fastris.dropin.parts.DropIn`` that :func:`fastris.patch` looks for in
    other people's models; empty for a system that offers nothing there.
    """

    name: str
    model: str
    config: str
    presets: tuple[str, ...]
    drop_in: str = ""


SYSTEMS: dict[str, System] = {
    "cris": System(
        "cris",
        "fastris.models.cris.model:CRIS",
        "fastris.models.cris.config:CRISConfig",
        ("cris_r50", "cris_r101", "tiny"),
        "fastris.dropin.cris.table:PARTS",
    ),
    "alignformer": System(
        "alignformer",
        "fastris.models.alignformer.model:AlignFormer",
        "fastris.models.alignformer.config:AlignFormerConfig",
        ("alignformer_swin_b", "alignformer_tiny"),
    ),
    "magnet": System(
        "magnet",
        "fastris.models.magnet.model:MagNet",
        "fastris.models.magnet.config:MagNetConfig",
        ("magnet_swin_b", "magnet_tiny"),
    ),
}
DEFAULT = "cris"
"""The system of files that name none: published checkpoints, and configurations older than the ``system`` key."""


def register(system: System) -> None:
    """Add a system. Raises ValueError if its name or one of its presets is taken."""
    taken = {system.name} & SYSTEMS.keys() | set(system.presets) & set(presets())
    if taken:
        raise ValueError(f"system {system.name!r} brings names that are taken: {', '.join(sorted(taken))}; rename them")
    SYSTEMS[system.name] = system


def presets() -> list[str]:
    """The names of all presets, which :func:`create` and the option ``model=`` accept."""
    return [preset for system in SYSTEMS.values() for preset in system.presets]


def preset(name: str) -> ModelConfig:
    """The configuration of the preset ``name``. Raises ValueError, listing all presets, for an unknown name."""
    return config_class(system_of_preset(name)).preset(name)


def system_of_preset(name: str) -> str:
    """The system that the preset ``name`` is of. Raises ValueError, listing all presets, for an unknown name."""
    for system in SYSTEMS.values():
        if name in system.presets:
            return system.name
    raise ValueError(f"unknown model {name!r}; choose from {', '.join(presets())}")


def create(what: str | Mapping[str, Any] | ModelConfig) -> Any:
    """Create a randomly initialised model from a preset's name, a configuration or a mapping of its fields."""
    if isinstance(what, str):
        what = preset(what)
    config = what if isinstance(what, ModelConfig) else read_config(what)
    return model_class(config.system)(config)


def read_config(mapping: Mapping[str, Any], source: str = "configuration") -> ModelConfig:
    """Build the configuration that a mapping describes, of the system it names or else CRIS. Raises ValueError."""
    try:
        system = system_of(mapping) or DEFAULT
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return config_class(system).from_dict(mapping, source)


def system_of(mapping: Mapping[str, Any]) -> str | None:
    """The system whose configuration ``mapping`` is, or None where it cannot be told.

    Raises ValueError for an unknown system, but only if the mapping has the fields that all our configurations have:
    other programs also store a ``system`` of their own beside weights.
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
    """The system whose ``parts`` match most of these state-dict names; CRIS where none matches."""
    firsts = [name.partition(".")[0] for name in names]

    def matches(system: str) -> int:
        parts = config_class(system).parts
        return sum(first in parts for first in firsts)

    return max((DEFAULT, *(name for name in SYSTEMS if name != DEFAULT)), key=matches)


def model_class(system: str) -> type[Any]:
    """The model class of a system, derived from :class:`fastris.models.base.ReferringModel`."""
    return resolve(SYSTEMS[system].model)


def config_class(system: str) -> type[ModelConfig]:
    """The configuration class of a system."""
    return resolve(SYSTEMS[system].config)


def model_keys() -> list[str]:
    """The configuration fields of all systems, which ``fastris train`` accepts as options."""
    return list(dict.fromkeys(f.name for name in SYSTEMS for f in dataclasses.fields(resolve(SYSTEMS[name].config))))


def published_besides() -> frozenset[str]:
    """The keys of all systems' published YAML files that do not shape a model."""
    return frozenset().union(*(config_class(name).published_besides for name in SYSTEMS))


def resolve(where: str) -> Any:
    """What "module:NAME" names."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
