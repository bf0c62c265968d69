"""fastris: referring image segmentation with CRIS, made fast by exact algebra and fused Triton kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastris.version import __version__

# Public name -> module that defines it. Imported on first use, so that `import fastris` costs next to nothing.
_LAZY = {
    "AlignFormer": "fastris.models.alignformer.model",
    "AlignFormerConfig": "fastris.models.alignformer.config",
    "CRIS": "fastris.models.cris.model",
    "CRISConfig": "fastris.models.cris.config",
    "CLIPConfig": "fastris.models.cris.config",
    "ImageFeatures": "fastris.models.cris.model",
    "MagNet": "fastris.models.magnet.model",
    "MagNetConfig": "fastris.models.magnet.config",
    "Segmenter": "fastris.inference.segmenter",
    "allow_fp16_accumulation": "fastris.runtime.float16_sums",
    "for_inference": "fastris.inference.folding",
    "keep_freed_memory": "fastris.runtime.host_memory",
    "patch": "fastris.dropin.patch",
    "unpatch": "fastris.dropin.patch",
    "use_impl": "fastris.dispatch",
}

__all__ = [
    "CRIS",
    "AlignFormer",
    "AlignFormerConfig",
    "CLIPConfig",
    "CRISConfig",
    "ImageFeatures",
    "MagNet",
    "MagNetConfig",
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
    from fastris.dispatch import use_impl
    from fastris.dropin.patch import patch, unpatch
    from fastris.inference.folding import for_inference
    from fastris.inference.segmenter import Segmenter
    from fastris.models.alignformer.config import AlignFormerConfig
    from fastris.models.alignformer.model import AlignFormer
    from fastris.models.cris.config import CLIPConfig, CRISConfig
    from fastris.models.cris.model import CRIS, ImageFeatures
    from fastris.models.magnet.config import MagNetConfig
    from fastris.models.magnet.model import MagNet
    from fastris.runtime.float16_sums import allow_fp16_accumulation
    from fastris.runtime.host_memory import keep_freed_memory


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastris' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
