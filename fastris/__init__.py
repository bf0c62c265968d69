"""fastris: referring image segmentation with CRIS, made fast by exact algebra and fused Triton kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it. Imported on first use, so that `import fastris` costs next to nothing.
_LAZY = {
    "CRIS": "fastris.models.cris",
    "CRISConfig": "fastris.models.config",
    "CLIPConfig": "fastris.models.config",
    "ImageFeatures": "fastris.models.cris",
    "Segmenter": "fastris.predict",
    "allow_fp16_accumulation": "fastris.accumulation",
    "for_inference": "fastris.nn.folding",
    "keep_freed_memory": "fastris.host_memory",
    "patch": "fastris.dropin",
    "unpatch": "fastris.dropin",
    "use_impl": "fastris.dispatch",
}

__all__ = [
    "CRIS",
    "CLIPConfig",
    "CRISConfig",
    "ImageFeatures",
    "Segmenter",
    "__version__",
    "allow_fp16_accumulation",
    "for_inference",
    "keep_freed_memory",
    "patch",
    "unpatch",
    "use_impl",
]

if TYPE_CHECKING:
    from fastris.accumulation import allow_fp16_accumulation
    from fastris.dispatch import use_impl
    from fastris.dropin import patch, unpatch
    from fastris.host_memory import keep_freed_memory
    from fastris.models.config import CLIPConfig, CRISConfig
    from fastris.models.cris import CRIS, ImageFeatures
    from fastris.nn.folding import for_inference
    from fastris.predict import Segmenter


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastris' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
