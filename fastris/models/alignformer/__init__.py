"""AlignFormer (arXiv 2301.06429): Swin and BERT that learn from each other stage by stage, and a language centre."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module here, imported on first use: a caller that only needs the configuration does not load PyTorch.
_MODULES = {
    "AlignFormer": "model",
    "AlignFormerConfig": "config",
    "BERTConfig": "config",
}

__all__ = ["AlignFormer", "AlignFormerConfig", "BERTConfig"]

if TYPE_CHECKING:
    from fastris.models.alignformer.config import AlignFormerConfig, BERTConfig
    from fastris.models.alignformer.model import AlignFormer


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
