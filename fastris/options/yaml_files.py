"""Read an options file: YAML in which the sections of the published files are flattened."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastris.options.values import shown
from fastris.runtime.plain import check_file

SECTIONS = frozenset({"data", "train", "distributed", "test"})
"""Sections of the published files, in lower case; their entries are read as if they were at the top level."""


def read_options(file: str, fields: Collection[str] = ()) -> dict[str, Any]:
    """The options that a YAML file gives, by name. A top-level key that is one of ``fields`` is never a section.

    Raises ``FileNotFoundError``, or ``ValueError`` where the file is empty, not UTF-8, not YAML, no mapping, or gives a
    name twice (YAML itself would silently keep the last one).
    """
    import yaml

    path = Path(file)
    check_file(f"{file}: the options file", path, "give the path of a YAML file of `name: value` lines")
    try:
        text = path.read_text(encoding="utf-8-sig")
        _refuse_duplicates(yaml.compose(text, Loader=yaml.SafeLoader), file)
        content = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: {_problem(error)}") from None
    if content is None:
        raise ValueError(f"{file}: the options file is empty; write `name: value` lines, or leave the file out")
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold `name: value` lines, but holds {shown(content)}")
    return _flatten(content, fields, file)


def _flatten(content: dict[Any, Any], fields: Collection[str], file: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        is_section = str(key).lower() in SECTIONS and key not in fields and (value is None or isinstance(value, dict))
        for name, item in (value or {}).items() if is_section else [(key, value)]:
            if not isinstance(name, str):
                raise ValueError(f"{file}: option names must be text, got {shown(name)}; write it in quotes")
            if name in flat and flat[name] != item:
                raise ValueError(f"{file}: {name} is given twice, as {flat[name]!r} and {item!r}; keep one")
            flat[name] = item
    return flat


def _refuse_duplicates(node: Any, file: str) -> None:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_duplicates(child, file)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen and key.value != "<<":
                raise ValueError(f"{file}: line {key.start_mark.line + 1} gives {key.value} a second time; keep one")
            seen.add(key.value)
        _refuse_duplicates(value, file)


def _problem(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "'\\t'" in problem:
        problem = "a tab where YAML wants spaces; replace it by spaces"
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"not valid YAML: {where}{problem}"
