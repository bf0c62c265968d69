"""The tiny model that comes with fastris, for trying it before one has another: it knows drawn shapes only.

``fastris demo compact=true`` makes its folder; its card says with which seed, and what it scores.
"""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).resolve().parent.parent / "pretrained" / "shapes"
"""Its folder, as ``save_pretrained`` writes one."""

NAME = "fastris/pretrained/shapes"
"""What records call it, wherever fastris is installed."""

NOTICE = (
    "no model is given, so the tiny one that comes with fastris answers: it knows drawn shapes only; give model=... "
    "for photographs"
)


def shipped_model() -> Path:
    """The folder of the model. Raises FileNotFoundError where this installation lacks it."""
    if not (SHIPPED / "model.safetensors").is_file():
        raise FileNotFoundError(
            "model is missing, and this installation lacks the tiny one of drawn shapes; give model=PATH: a model "
            "folder (`fastris demo` trains and writes one), a checkpoint (.pth, .safetensors) or a Hugging Face id"
        )
    return SHIPPED
