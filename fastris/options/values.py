"""Convert one option's value, text from the command line or a value from YAML, to the annotated type."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRUE = frozenset({"true", "yes", "on", "1"})
FALSE = frozenset({"false", "no", "off", "0"})
_NOTHING = frozenset({"null", "none", "~", ""})
LARGEST_INT = 2**63 - 1  # the largest that tensors, files and random number generators can hold
_UNIONS = (typing.Union, types.UnionType)


class Mismatch(ValueError):
    """A value cannot be converted to the type. The message is a mend, or empty."""


def type_name(kind: Any) -> str:
    """A type in words for users: ``int``, ``true|false``, ``text or none``, ``list of int``, ``a|b``."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return " or ".join(type_name(a) for a in args)
    if origin is typing.Literal:
        return "|".join(str(a) for a in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return "(" + ", ".join(type_name(a) for a in args) + ")"
    if origin in (tuple, list):
        return f"list of {type_name(args[0])}"
    names = {bool: "true|false", str: "text", Path: "path", dict: "mapping", type(None): "none", Any: "any"}
    return names.get(origin or kind) or str(getattr(kind, "__name__", kind))


def shown(value: Any) -> str:
    """A value and its type, short enough for one line of an error message."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type_name(type(value))})"


def accepts(kind: Any, member: type) -> bool:
    """Whether ``member`` is the type ``kind`` or, if that is a union, one of its members."""
    if typing.get_origin(kind) in _UNIONS:
        return any(accepts(a, member) for a in typing.get_args(kind))
    return (typing.get_origin(kind) or kind) is member


def convert(value: Any, kind: Any) -> Any:
    """Convert to ``kind``: a scalar type, ``Path``, ``Literal``, a union, ``tuple``, ``list``, ``dict`` or ``Any``.

    Text is parsed as YAML for sequences, mappings and ``Any``. Raises :class:`Mismatch`.
    """
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in _UNIONS:
        return _convert_union(value, args)
    if origin is typing.Literal:
        return _convert_literal(value, args)
    if origin in (tuple, list):
        return _convert_sequence(value, origin, args or (Any, ...))
    if origin in (dict, Any):
        value = _from_yaml(value) if isinstance(value, str) else value
        if origin is dict and not isinstance(value, dict):
            raise Mismatch
        return value
    try:
        return _SCALARS[kind](value)
    except (ValueError, OverflowError) as error:
        raise error if isinstance(error, Mismatch) else Mismatch() from None


def _from_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise Mismatch("it is not valid YAML") from None


def _to_int(value: Any) -> int:
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            value = float(value)  # "1e5"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Mismatch
    if abs(value) > LARGEST_INT:
        raise Mismatch(f"the largest that fits is {LARGEST_INT}")
    return value


def _to_float(value: Any) -> float:
    """A number, also from text: YAML 1.1 reads ``1e-4`` as text, and writes infinity as ``.inf``."""
    if isinstance(value, str):
        value = float(value.lower().replace(".inf", "inf"))
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise Mismatch
    return float(value)


def _to_bool(value: Any) -> bool:
    text = str(value).lower()
    if text not in TRUE | FALSE:
        raise Mismatch
    return text in TRUE


def _to_text(value: Any) -> str:
    if not isinstance(value, str):
        raise Mismatch("write it in quotes to make it text" if isinstance(value, bool | int | float) else "")
    return value


def _to_none(value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value.lower() in _NOTHING):
        raise Mismatch


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    int: _to_int,
    float: _to_float,
    bool: _to_bool,
    str: _to_text,
    Path: lambda value: Path(_to_text(value)),
    type(None): _to_none,
}


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    """The first member that fits; text last, because every argument of the command line is text."""
    mend = ""
    for member in sorted(members, key=lambda m: (m in (str, Path), m is bool, m is Any)):
        try:
            return convert(value, member)
        except Mismatch as error:
            mend = str(error)
    raise Mismatch(mend)


def _convert_literal(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        word = str(choice).lower()
        if isinstance(value, bool) and word in TRUE | FALSE:  # YAML reads a bare off as false
            matches = value == (word in TRUE)
        else:
            matches = str(value) == str(choice) or (isinstance(choice, bool) and str(value).lower() == word)
        if matches:
            return choice
    raise Mismatch


def _convert_sequence(value: Any, container: Any, kinds: tuple[Any, ...]) -> Any:
    if isinstance(value, str):
        value = _from_yaml(value)
        if isinstance(value, str):  # "35,40"
            value = [part.strip() for part in value.split(",")]
    if value is None:
        raise Mismatch
    values = list(value) if isinstance(value, list | tuple) else [value]
    if container is tuple and kinds[-1] is not Ellipsis:
        if len(values) != len(kinds):
            raise Mismatch
        return tuple(convert(v, k) for v, k in zip(values, kinds, strict=True))
    return container(convert(v, kinds[0]) for v in values)
