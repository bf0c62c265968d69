"""CRIS (arXiv 2111.15174): CLIP's encoders, a cross-modal neck, a decoder and a text-to-pixel projector."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module here, imported on first use: a caller that only needs the configuration does not load PyTorch.
_MODULES = {
    "CRIS": "model",
    "CLIPConfig": "config",
    "CRISConfig": "config",
    "FPN": "neck",
    "ImageFeatures": "model",
    "Projector": "projector",
    "TransformerDecoder": "decoder",
    "TransformerDecoderLayer": "decoder",
}

__all__ = [
    "CRIS",
    "FPN",
    "CLIPConfig",
    "CRISConfig",
    "ImageFeatures",
    "Projector",
    "TransformerDecoder",
    "TransformerDecoderLayer",
]

if TYPE_CHECKING:
    from fastris.models.cris.config import CLIPConfig, CRISConfig
    from fastris.models.cris.decoder import TransformerDecoder, TransformerDecoderLayer
    from fastris.models.cris.model import CRIS, ImageFeatures
    from fastris.models.cris.neck import FPN
    from fastris.models.cris.projector import Projector


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
