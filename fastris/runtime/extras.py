"""Import libraries that only some parts need, and that are installed as extras."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(ImportError, RuntimeError):
    """A library that this part needs cannot be imported; the message says how to install it."""


def need(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional library.

    Raises MissingExtra, with the command that installs it, where that fails. ``purpose`` begins with "for".
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name == library
        why = "is not installed" if absent else f"cannot be imported ({' '.join(str(error).split())[:200]})"
        raise MissingExtra(f"{library} is needed {purpose}, and {why}: pip install 'fastris[{extra}]'") from error
