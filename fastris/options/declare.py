"""Command-line options: a dataclass declares them, YAML files and ``key=value`` arguments fill it in.

A command declares its options once, as a dataclass whose fields are made by :func:`option`. From that one declaration
come the values (:func:`load_options`), the checks with their messages, and the help page (:func:`describe`)::

    @dataclass
    class BakeConfig:
        image: str = option(REQUIRED, "photo to look at", positional=True)
        minutes: float = option(12.5, "time in the oven", unit="min")

    config = load_options(BakeConfig, ["photo.png", "minutes=20"])
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import shutil
import textwrap
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fastris.options.values import FALSE, TRUE, Mismatch, accepts, convert, shown, type_name
from fastris.options.yaml_files import read_options

REQUIRED: Any = dataclasses.MISSING
"""Default of an option that the user has to give."""

_EXTRA = "extra"
_SEE_HELP = "--help lists the options"

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    unit: str = "",
    *,
    positional: bool = False,
    hidden: bool = False,
    default_text: str = "",
) -> Any:
    """A dataclass field that :func:`load_options` fills in and :func:`describe` prints.

    ``default``: any value; a list or mapping is copied for each instance; ``REQUIRED`` if the user must give one.
    ``positional``: the field takes arguments that are not options, in field order; a field of type ``tuple[str, ...]``
    takes all that are left. ``hidden``: left out of the help page. ``default_text``: what that shows as the default.
    """
    metadata = {"help": help, "unit": unit, "positional": positional, "hidden": hidden, "default_text": default_text}
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def extra_option(names: Callable[[], Iterable[str]] = tuple) -> Any:
    """The field ``extra: dict[str, Any]``, which keeps a YAML file's keys that are no options of this command.

    ``names()``, called when needed, returns the keys that are also allowed on the command line (``fastris train
    num_layers=2``); any other unknown key there is an error.
    """
    metadata = {"help": "", "unit": "", "positional": False, "hidden": True, "names": names}
    return dataclasses.field(default_factory=dict, metadata=metadata)


def load_options(cls: type[T], args: Iterable[str], allow_extra: bool = False) -> T:
    """Fill the dataclass ``cls`` from ``file.yaml``, ``key=value``, ``--key value``, ``--key=value`` and ``--flag``s.

    Files come first, in order, then the arguments in order: the last one wins. ``-`` and ``_`` in a name are the same.
    Unknown keys of a file go to ``cls.extra`` if the dataclass has that field, and are an error if not. On the command
    line they are an error unless ``extra_option(names)`` lists them, or ``allow_extra``, which keeps any key.

    For a class with positional fields an argument is an option only if it starts with ``--`` or its key is a known
    option, so "a sign that says 1+1=2" is a phrase; but a key that is nearly an option's name is an error. Everything
    after ``--`` is positional.

    A class may have ``guesses``, option by the name that others give it, for the hint after an unknown one; and
    ``expand(args)``, which returns the arguments to read instead.

    Raises ``ValueError`` (unknown option, wrong value, malformed YAML) or ``OSError`` (a file that cannot be read).
    """
    reader = _Reader(cls, allow_extra)
    files, assignments, positional = reader.split(list(getattr(cls, "expand", list)(list(args))))
    for file in files:
        for key, value in read_options(file, reader.fields).items():
            reader.assign(key, value, file=file)
    for key, value in assignments:
        reader.assign(key, value)
    reader.assign_positional(positional, assigned={key for key, _ in assignments})
    return reader.build()


def usage(cls: type) -> str:
    """The usage line after the command's name: ``IMAGE PHRASE [PHRASE ...] [options.yaml] [name=value ...]``."""
    hints = typing.get_type_hints(cls)
    parts = []
    for field in dataclasses.fields(cls):
        if field.metadata.get("positional"):
            name = field.name.upper()
            many = typing.get_origin(hints[field.name]) in (tuple, list)
            parts.append(f"{name.removesuffix('S')} [{name.removesuffix('S')} ...]" if many else name)
    return " ".join([*parts, "[options.yaml] [name=value ...]"])


def describe(cls: type) -> str:
    """The help page: the options of ``cls`` as lines of ``name  type  default  help [unit]``.

    Required options come first, then the others in the order of the fields: inherited ones, then those of ``cls``.
    """
    hints = typing.get_type_hints(cls)
    visible = [f for f in dataclasses.fields(cls) if not f.metadata.get("hidden") and f.name != _EXTRA]
    visible.sort(key=lambda f: not _is_required(f))
    blocks = []
    for title, positional in (("arguments", True), ("options", False)):
        fields = [f for f in visible if bool(f.metadata.get("positional")) is positional]
        if fields:
            rows = [(f.name, type_name(hints[f.name]), _default_text(f), _help_text(f)) for f in fields]
            blocks.append(f"{title}:\n" + _table(rows))
    return "\n\n".join(blocks)


class _Reader:
    """Parses arguments for one dataclass: collects checked values, and reports unknown names with suggestions."""

    def __init__(self, cls: type, allow_extra: bool) -> None:
        self.cls = cls
        self.hints = typing.get_type_hints(cls)
        fields = [f for f in dataclasses.fields(cls) if f.init]
        self.extra_field = next((f for f in fields if f.name == _EXTRA), None)
        self.fields = {f.name: f for f in fields if f.name != _EXTRA}
        self.positional = [f for f in self.fields.values() if f.metadata.get("positional")]
        self.allow_extra = allow_extra and self.extra_field is not None
        self.values: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}

    def split(self, args: list[str]) -> tuple[list[str], list[tuple[str, str]], list[str]]:
        """Sort the arguments into (YAML files, assignments, positional arguments)."""
        files: list[str] = []
        assignments: list[tuple[str, str]] = []
        positional: list[str] = []
        queue = list(args)
        while queue:
            token = queue.pop(0)
            key, equals, value = token.partition("=")
            if token == "--":
                positional.extend(queue)
                break
            if token.startswith("--"):
                assignments.append(self._flag(key[2:], value if equals else None, queue))
            elif equals and self._is_assignment(key):
                assignments.append((self._name(key), value))
            elif token.lower().endswith((".yaml", ".yml")):
                files.append(token)
            elif self.positional and (token == "-" or not token.startswith("-")):
                positional.append(token)
            else:
                raise ValueError(self._unexpected(token))
        return files, assignments, positional

    def assign(self, key: str, value: Any, file: str = "") -> None:
        where = f"{file}: " if file else ""
        name = self._name(key)
        known = name in self.fields
        if not known and not (self.extra_field if file else self._is_extra(name)):
            raise ValueError(where + self._unknown(key))
        if file and not known:
            self.extra[name] = value
            return
        kind = self.hints[name] if known else Any
        try:
            (self.values if known else self.extra)[name] = convert(value, kind)
        except Mismatch as error:
            unit = self.fields[name].metadata.get("unit") if known else ""
            wanted = type_name(kind) + (f" ({unit})" if unit else "")
            got = shown(value) if file else repr(value)
            mend = f"; {error}" if str(error) else ""
            raise ValueError(f"{where}{name} must be {wanted}, got {got}{mend}") from None

    def assign_positional(self, tokens: list[str], assigned: set[str]) -> None:
        rest = list(tokens)
        for field in self.positional:
            if field.name in assigned:
                continue
            if typing.get_origin(self.hints[field.name]) in (tuple, list):
                if rest:
                    self.values[field.name] = typing.get_origin(self.hints[field.name])(rest)
                rest = []
            elif rest:
                self.assign(field.name, rest.pop(0))
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}; {_SEE_HELP}")

    def build(self) -> Any:
        for field in self.fields.values():
            if _is_required(field) and field.name not in self.values:
                name = field.name.upper() if field.metadata.get("positional") else f"{field.name}=..."
                raise ValueError(f"{name} is missing ({field.metadata.get('help', '')}); {_SEE_HELP}")
        if self.extra_field is not None:
            self.values[_EXTRA] = self.extra
        return self.cls(**self.values)

    def _name(self, key: str) -> str:
        name = key.replace("-", "_")
        return name if name in self.fields else key

    def _is_extra(self, name: str) -> bool:
        if self.extra_field is None:
            return False
        return self.allow_extra or name in set(self.extra_field.metadata.get("names", tuple)())

    def _is_assignment(self, key: str) -> bool:
        """Whether ``key=...`` is an option. It always is, unless the command takes phrases and the key is no option.

        Raises ValueError where the command takes phrases and the key is nearly an option's name.
        """
        name = self._name(key)
        if not self.positional or name in self.fields or self._is_extra(name):
            return True
        if self._close(key) and key.isidentifier():
            raise ValueError(f"{self._unknown(key)}; if it is a phrase, write -- before the phrases")
        return False

    def _flag(self, key: str, value: str | None, queue: list[str]) -> tuple[str, str]:
        name = self._name(key)
        negated = self._name(key[3:]) if key.startswith("no-") else ""
        if value is None and name not in self.fields and negated in self.fields:
            if not accepts(self.hints[negated], bool):
                raise ValueError(f"--{key}: {negated} is not an on/off option; write {negated}=...")
            return negated, "false"
        if name not in self.fields and not self._is_extra(name):
            raise ValueError(self._unknown(f"--{key}"))
        if value is not None:
            return name, value
        if name in self.fields and accepts(self.hints[name], bool) and not self._is_value(queue, self.hints[name]):
            return name, "true"
        if not queue or queue[0] == "--":
            raise ValueError(f"--{key} needs a value, as in --{key} VALUE or {name}=VALUE")
        return name, queue.pop(0)

    def _is_value(self, queue: list[str], kind: Any) -> bool:
        """Whether the next argument is an on/off flag's value: an on/off word, or text that can be nothing else."""
        token = queue[0].lower() if queue else "--"
        is_other = self.positional or token.startswith("--") or "=" in token or token.endswith((".yaml", ".yml"))
        return token in TRUE | FALSE or (accepts(kind, str) and not is_other)

    def _close(self, key: str) -> list[str]:
        name = key.lstrip("-").replace("-", "_")
        known = getattr(self.cls, "guesses", {}).get(name.lower())
        if known is not None:
            return [known]
        return difflib.get_close_matches(name, list(self.fields), n=3, cutoff=0.7)

    def _unknown(self, key: str) -> str:
        close = self._close(key)
        return f"unknown option {key}; " + (f"did you mean {', '.join(close)}?" if close else _SEE_HELP)

    def _unexpected(self, token: str) -> str:
        if token.startswith("-"):
            mend = "; if it is a phrase, write -- before the phrases" if self.positional else ""
            return self._unknown(token) + mend
        if token in self.fields:
            return f"option {token} needs a value, as in {token}=VALUE"
        return f"unexpected argument {token!r}; write name=value, or an options file that ends in .yaml; {_SEE_HELP}"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is REQUIRED and field.default_factory is REQUIRED


def _default_text(field: dataclasses.Field[Any]) -> str:
    if text := field.metadata.get("default_text"):
        return str(text)
    if callable(field.default_factory):
        return str(field.default_factory())
    if _is_required(field):
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if isinstance(field.default, tuple):
        return "[" + ", ".join(str(v) for v in field.default) + "]"
    return str(field.default) or "''"


def _help_text(field: dataclasses.Field[Any]) -> str:
    unit = field.metadata.get("unit")
    return field.metadata.get("help", "") + (f" [{unit}]" if unit else "")


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    widths = [min(max(len(row[i]) for row in rows), limit) for i, limit in enumerate((24, 22, 18))]
    indent = 2 + sum(w + 2 for w in widths)
    room = max(30, shutil.get_terminal_size((110, 24)).columns - indent)
    lines = []
    for *cells, text in rows:
        left = "  " + "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        wrapped = textwrap.wrap(text, room) or [""]
        if len(left) > indent:  # a long cell takes its own line
            lines.append(left.rstrip())
            left = " " * indent
        lines.append((left + wrapped[0]).rstrip())
        lines.extend(" " * indent + line for line in wrapped[1:])
    return "\n".join(lines)
