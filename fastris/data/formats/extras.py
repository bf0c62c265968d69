"""Import the libraries that only some formats need."""

from __future__ import annotations

import importlib
from typing import Any

from fastris.data.base import DataError


class MissingLibrary(DataError):
    """A format needs a library that is not installed; the message says how to install it."""


def need(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional library.

    Raises:
        MissingLibrary: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        message = f"{library} is needed {purpose}, and is not installed: pip install 'fastris[{extra}]'"
        raise MissingLibrary(message) from error
