"""What every model's configuration offers: presets, plain mappings and YAML files, and what a card says of it."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fastris.models.inputs import CLIP_INPUTS, Inputs

SYSTEM = "system"
"""The key of a configuration's mapping that says whose it is; CRIS's files, older than it, have none."""

_MAX_YAML = 100_000  # bytes; the published files have less than 3,000
_MAX_BRACKETS = 200  # lists and mappings; nesting them costs PyYAML the square of their depth
_OPENING = ("[", "{", "<block mapping start>", "<block sequence start>")

C = TypeVar("C", bound="ModelConfig")


class ModelConfig:
    """Base of the dataclasses that describe a model. What a stranger's file may hold, ``__post_init__`` checks.

    A subclass is a dataclass with at least ``input_size`` (side of the letterboxed square, in pixels) and ``word_len``
    (tokens that a sentence is cut to).

    Attributes:
        system: the name that the model's system has in :mod:`fastris.models.registry`; title: the same for people.
        published: where the system was published, for model cards.
        presets: name -> fields that differ from the defaults.
        inputs: how pixels are normalised and sentences tokenised.
        parts: the first words of its state-dict names, by which a file without a configuration is recognised.
        not_in_shapes: fields that the weights' shapes do not tell.
        published_yaml: an example of a published YAML file, for messages.
    """

    system: ClassVar[str]
    title: ClassVar[str]
    published: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    inputs: ClassVar[Inputs] = CLIP_INPUTS
    parts: ClassVar[tuple[str, ...]] = ()
    not_in_shapes: ClassVar[tuple[str, ...]] = ()
    published_yaml: ClassVar[str] = ""

    input_size: int
    word_len: int

    @classmethod
    def preset(cls: type[C], name: str) -> C:
        """The configuration of that name; ValueError, with the known names, for another."""
        if name not in cls.presets:
            raise ValueError(f"unknown model {name!r}; choose from {', '.join(cls.presets)}")
        return cls(**cls.presets[name])

    @classmethod
    def from_yaml(cls: type[C], path: str | Path) -> C:
        """Read a YAML file with the fields of the configuration. See :meth:`from_dict`."""
        path, what = Path(path), f"give the YAML file of a {cls.title} configuration"
        if not path.is_file():
            raise FileNotFoundError(f"path: there is no file {path}; {what}")
        content = _read_yaml(path, what)
        if not isinstance(content, Mapping):
            such = f" such as the published {cls.published_yaml}" if cls.published_yaml else " of its fields"
            raise ValueError(f"{path} must hold a YAML mapping{such}")
        return cls.from_dict(content, source=str(path))

    @classmethod
    def from_dict(cls: type[C], mapping: Mapping[str, Any], source: str = "configuration") -> C:
        """Build from a mapping of fields; a missing one is a ValueError, an unknown one is named in a warning."""
        given = {key: value for key, value in mapping.items() if key != SYSTEM}
        needed = {field.name: _is_needed(field) for field in dataclasses.fields(_as_dataclass(cls))}
        missing = sorted(name for name in needed if needed[name] and name not in given)
        if missing:
            raise ValueError(f"{source} lacks the model keys {', '.join(missing)}")
        warn_of_unknown(set(given) - set(needed), needed, source)
        return cls(**{key: value for key, value in given.items() if key in needed})

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict that says whose it is, accepted back by :meth:`from_dict`."""
        return {SYSTEM: self.system, **dataclasses.asdict(_as_dataclass(self))}

    def in_words(self) -> str:
        """The model's name for the title of its card."""
        return self.title


def warn_of_unknown(unknown: Iterable[Any], names: Iterable[str], source: str) -> None:
    """A warning that names the keys that mean nothing, each with the name that it is close to."""
    listed = sorted(map(str, unknown))
    if listed:
        warnings.warn(f"{source} has keys that mean nothing here: {_with_hints(listed, names)}", stacklevel=4)


def _with_hints(unknown: list[str], names: Iterable[str]) -> str:
    hints = []
    for key in (key[:40] for key in unknown[:10]):
        close = difflib.get_close_matches(key, names, n=1)
        hints.append(f"{key} (did you mean {close[0]}?)" if close else key)
    return ", ".join(hints) + (f", and {len(unknown) - 10} more" if len(unknown) > 10 else "")


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _as_dataclass(config: Any) -> Any:
    """The same, for the type checker: the base itself is no dataclass, so that its fields order nobody's."""
    return config


def _read_yaml(path: Path, what: str) -> Any:
    """Content of a YAML file of a sensible size without references, of which a few lines can unfold to gigabytes."""
    import yaml

    if path.stat().st_size > _MAX_YAML:
        raise ValueError(f"{path} is larger than {_MAX_YAML} bytes; {what}")
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for token in yaml.scan(text):
            depth += getattr(token, "id", None) in _OPENING
            if isinstance(token, yaml.AliasToken) or depth > _MAX_BRACKETS:
                raise ValueError(f"{path} repeats values by reference (*name) or has too many lists; write values out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        mend = what.replace("the YAML file", "that", 1)
        raise ValueError(f"{path} is no YAML file ({reason}); {mend}") from error
