"""``fastris export``: a model as programs that products run without fastris."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastris.options.declare import option
from fastris.runtime.plain import printable


@dataclass
class ExportConfig:
    """Write a model as ONNX for any runtime, or as PyTorch's exported program, and check it against the model.

    fastris export model=demo/model out=product
    fastris export model=best_model.pth out=product format=torch

    Where one encoding of a picture serves every phrase (CRIS), the folder holds encoder and head: encode a picture
    once, and run the head for its phrases. Elsewhere (MagNet, AlignFormer) it holds the whole model. The numbers of
    pictures and phrases are open. export.json says how pictures and phrases become their inputs.
    """

    model: str | None = option(
        None,
        "model folder, CRIS checkpoint (.pth, .safetensors) or Hugging Face id; without it the tiny model that knows "
        "drawn shapes only",
        default_text="shapes",
    )
    out: str = option("export", "folder to write")
    format: Literal["onnx", "torch"] = option("onnx", "onnx (pip install 'fastris[onnx]'), or torch: .pt2 files")
    overwrite: bool = option(False, "replace an earlier export")


def run(options: ExportConfig) -> int:
    """Export, check, and print a line for each file and for the check."""
    from fastris.weights.shipped import NAME, shipped_model

    source = shipped_model() if options.model is None else options.model  # before anything slow
    from fastris.exporting.folder import check_target, export_model
    from fastris.exporting.programs import need_libraries
    from fastris.weights.load import load_model

    need_libraries(options.format)
    check_target(Path(options.out).expanduser(), options.overwrite)
    model = load_model(source).float()
    written = export_model(
        model,
        options.out,
        options.format,
        name=options.model or NAME,
        overwrite=options.overwrite,
        tell=lambda line: print(printable(line), flush=True),
    )
    print(printable(f"wrote {written}: {model.in_words()}"))
    return 0
