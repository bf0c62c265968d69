"""The base class of model configurations: presets, reading mappings and YAML files, and text for model cards."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fastris.models.inputs import CLIP_INPUTS, Inputs
from fastris.models.limits import SIZES, check_fields, check_parameters
from fastris.models.recipe import Recipe
from fastris.options.values import shown

SYSTEM = "system"
"""The key that names the system in a configuration's mapping. CRIS's files are older than this key and lack it."""

_MAX_YAML = 100_000  # bytes; the published files have less than 3,000
_MAX_BRACKETS = 200  # lists and mappings in a file; PyYAML's time grows with the square of their nesting depth
_OPENING = ("[", "{", "<block mapping start>", "<block sequence start>")

C = TypeVar("C", bound="ModelConfig")


class ModelConfig:
    """Base of the dataclasses that describe a model.

    A configuration may come from an untrusted file, so ``__post_init__`` raises ValueError for one that cannot be
    built. The base class checks types, ``limits`` and ``parameter_counts()``; a subclass names its widths and depths in
    both, so that no file can request a model that fills the memory.

    A subclass is a dataclass with at least ``input_size`` (side of the letterboxed square, in pixels) and ``word_len``
    (tokens that a sentence is cut to).

    Attributes:
        system: the system's name in :mod:`fastris.models.registry`; title: its display name.
        published: where the system was published, for model cards.
        presets: name -> fields that differ from the defaults.
        inputs: how pixels are normalised and sentences tokenised.
        parts: the first components of its state-dict names, which identify a file without a configuration.
        added_parts: parts that a switch adds. Weights may lack one as a whole: it then keeps its initial values.
        training_parts: parts that only training uses. Files for others lack them, and a model without them passes over
            them in weights that have them.
        stages: what training may freeze, in order from the pixels on and the text encoder last: name -> the beginnings
            of its state-dict names.
        not_in_shapes: fields that cannot be derived from the weights' shapes.
        published_yaml: an example of a published YAML file, for messages.
        published_besides: keys of the published YAML files that do not shape the model: training, data and machines.
        limits: how large its own whole numbers may be; the two sizes have theirs without being named.
        recipe: how it was published to be trained and scored; the default is CRIS's.
        threshold: the probability above which a pixel belongs to a predicted mask, where the user gives none.
        smallest_batch: expressions that a training step needs at least: BatchNorm needs two.
    """

    system: ClassVar[str]
    title: ClassVar[str]
    published: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    inputs: ClassVar[Inputs] = CLIP_INPUTS
    parts: ClassVar[tuple[str, ...]] = ()
    added_parts: ClassVar[tuple[str, ...]] = ()
    training_parts: ClassVar[tuple[str, ...]] = ()
    stages: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    not_in_shapes: ClassVar[tuple[str, ...]] = ()
    published_yaml: ClassVar[str] = ""
    published_besides: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, int]] = {}
    recipe: ClassVar[Recipe] = Recipe()
    threshold: ClassVar[float] = 0.35
    smallest_batch: ClassVar[int] = 2

    input_size: int
    word_len: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(_as_dataclass(self)):
            kind, value = type(field.default), getattr(self, field.name)
            takes = (int, float) if kind is float else kind
            if kind in (int, float, bool, str) and (
                not isinstance(value, takes) or (type(value) is bool) != (kind is bool)
            ):
                raise ValueError(f"{field.name} must be of type {kind.__name__}, got {shown(value)}")
        check_fields(self, {**self.limits, **SIZES})
        check_parameters(self.parameter_counts())

    def parameter_counts(self) -> dict[str, int]:
        """About how many parameters the model has, by the fields that decide it; too many are refused by their names.

        The two sizes make none, unless a system says otherwise.
        """
        return {}

    @classmethod
    def preset(cls: type[C], name: str) -> C:
        """The preset ``name``. Raises ValueError, listing the presets, for an unknown name."""
        if name not in cls.presets:
            raise ValueError(f"unknown model {name!r}; choose from {', '.join(cls.presets)}")
        return cls(**cls.presets[name])

    @classmethod
    def from_yaml(cls: type[C], path: str | Path) -> C:
        """Read a YAML file with the configuration's fields; errors are those of :meth:`from_dict`."""
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
        """Build from a mapping of fields. Raises ValueError for a missing field and warns of unknown ones."""
        given = {key: value for key, value in mapping.items() if key != SYSTEM}
        needed = {field.name: _is_needed(field) for field in dataclasses.fields(_as_dataclass(cls))}
        missing = sorted(name for name in needed if needed[name] and name not in given)
        if missing:
            raise ValueError(f"{source} lacks the model keys {', '.join(missing)}")
        warn_of_unknown(set(given) - set(needed) - cls.published_besides, needed, source)
        return cls(**{key: value for key, value in given.items() if key in needed})

    def to_dict(self) -> dict[str, Any]:
        """A plain nested dict with the system's name, which :meth:`from_dict` accepts."""
        return {SYSTEM: self.system, **dataclasses.asdict(_as_dataclass(self))}

    def for_others(self: C) -> C:
        """The configuration of the model without its ``training_parts``, which goes with weights for others."""
        return self

    def in_words(self) -> str:
        """The model's name for the title of its card."""
        return self.title

    def without_weights(self) -> str:
        """A notice for users who train from random weights; empty where none is needed."""
        return ""


def warn_of_unknown(unknown: Iterable[Any], names: Iterable[str], source: str) -> None:
    """Warn of unknown keys, each with the closest known name."""
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
    """``config`` typed as Any: the base is no dataclass, because its fields would then come before a subclass's."""
    return config


def _read_yaml(path: Path, what: str) -> Any:
    """Parse a small YAML file. Aliases (``*name``) are refused: a few lines of them can expand to gigabytes."""
    import yaml

    if path.stat().st_size > _MAX_YAML:
        raise ValueError(f"{path} is larger than {_MAX_YAML} bytes; {what}")
    try:
        text = path.read_text(encoding="utf-8")
        brackets = 0
        for token in yaml.scan(text):
            brackets += getattr(token, "id", None) in _OPENING
            if isinstance(token, yaml.AliasToken) or brackets > _MAX_BRACKETS:
                raise ValueError(f"{path} repeats values by reference (*name) or has too many lists; write values out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        mend = what.replace("the YAML file", "that", 1)
        raise ValueError(f"{path} is no YAML file ({reason}); {mend}") from error
