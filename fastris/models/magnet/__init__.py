"""MagNet (arXiv 2312.12198): Swin and BERT that look at each other after every stage, and a decoder of masks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module here, imported on first use: a caller that only needs the configuration does not load PyTorch.
_MODULES = {
    "MagNet": "model",
    "MagNetConfig": "config",
}

__all__ = ["MagNet", "MagNetConfig"]

if TYPE_CHECKING:
    from fastris.models.magnet.config import MagNetConfig
    from fastris.models.magnet.model import MagNet


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
