"""Export a model to a folder: its parts, each checked against the model, and what a product must know of them."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastris.exporting.parts import LOGITS, PHRASES, PICTURES, Part, draw, parts_of
from fastris.exporting.programs import SUFFIXES, Run, need_libraries, opened, trace, write
from fastris.models.base import ReferringModel
from fastris.models.inputs import inputs_of
from fastris.version import __version__

MANIFEST = "export.json"
TOLERANCE = 1e-4
"""Largest difference of an output, as a share of the model's largest number there, or of 1 where that is less."""

TRACED = (2, 3)
CHECKED = ((1, 4), (3, 1))
"""Numbers of pictures and phrases: those that are traced, and others."""


class CheckFailed(RuntimeError):
    """What was written does not compute what the model computes."""


def export_model(
    model: ReferringModel,
    out: str | Path,
    form: str = "onnx",
    *,
    name: str = "",
    overwrite: bool = False,
    tell: Callable[[str], Any] = lambda line: None,
) -> Path:
    """Write a model's parts and ``export.json`` to the folder ``out``, which appears when all is checked; its path.

    ``form`` is "onnx" or "torch" (``.pt2``); ``name`` is what the JSON calls the model; ``tell`` gets a line for each
    step. The model is put in eval mode and must be on the CPU, in float32.

    Raises MissingExtra where a library is not installed, FileExistsError for a folder that is there, ValueError for a
    model that cannot be exported, and :class:`CheckFailed` if a program's outputs differ; none leaves a folder.
    """
    need_libraries(form)
    out = Path(out).expanduser()
    check_target(out, overwrite)
    first = next(model.parameters())
    if first.device.type != "cpu" or first.dtype != torch.float32:
        raise ValueError(f"model must be float32 on the CPU to be exported, got {first.dtype} on {first.device}")
    parts = parts_of(model.eval())
    with _appearing(out) as folder:
        runs = [_write_part(model, part, folder, form, tell) for part in parts]
        difference = check(model, parts, runs)
        by = "onnxruntime" if form == "onnx" else "torch"
        sizes = " and ".join(f"{phrases} phrases about {pictures}" for pictures, phrases in CHECKED)
        tell(f"checked with {by} on {sizes} pictures: largest difference {difference:.1e}, allowed {TOLERANCE:.0e}")
        described = describe(model, parts, form, name)
        described["check"] = {"largest_difference": difference, "allowed": TOLERANCE, "by": by}
        (folder / MANIFEST).write_text(json.dumps(described, indent=2), encoding="utf-8")
    return out


def check_target(out: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless ``out`` is free, or an earlier export that may be overwritten."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise FileExistsError(f"out={out} is a file, but a folder is to be written; choose another name")
    if not (out / MANIFEST).is_file():
        raise FileExistsError(f"out={out} exists and is no export ({MANIFEST} is missing); choose another folder")
    if not overwrite:
        raise FileExistsError(f"out={out} exists; choose another folder or pass overwrite=true")


def _write_part(model: ReferringModel, part: Part, folder: Path, form: str, tell: Callable[[str], Any]) -> Run:
    begun = time.perf_counter()
    asked = draw(model, *TRACED)
    features = None
    if "features" in part.inputs:
        with torch.no_grad():
            features = model.encode_image(asked.images)
    path = folder / (part.name + SUFFIXES[form])
    write(trace(part, asked, features), part, path, form)
    size = sum(file.stat().st_size for file in folder.glob(path.name + "*")) / 1e6
    takes, gives = ", ".join(part.flat_inputs()), ", ".join(part.outputs)
    tell(f"{path.name}: {takes} -> {gives}; {size:.1f} MB, {time.perf_counter() - begun:.0f} s")
    return opened(part, path, form)


@torch.no_grad()
def check(model: ReferringModel, parts: Sequence[Part], runs: Sequence[Run]) -> float:
    """The largest difference between parts and model, see :data:`TOLERANCE`. Raises :class:`CheckFailed`."""
    largest = 0.0
    for pictures, phrases in CHECKED:
        asked = draw(model, pictures, phrases)
        features = model.encode_image(asked.images)
        logits = model.segment(features, asked.tokens, asked.index)
        known: dict[str, Tensor] = asked._asdict()
        for part, run in zip(parts, runs, strict=True):
            outputs = run([known[name] for name in part.flat_inputs()])
            known |= zip(part.outputs, outputs, strict=True)
            expected = (logits,) if part.outputs == (LOGITS,) else tuple(features)
            for name, found, right in zip(part.outputs, outputs, expected, strict=True):
                difference = _difference(found, right)
                if not difference <= TOLERANCE:  # NaN, too
                    raise CheckFailed(
                        f"{part.name} is wrong for {pictures} pictures and {phrases} phrases: its {name} differs from "
                        f"the model's by {difference:.1e}, and {TOLERANCE:.0e} is allowed; nothing was kept"
                    )
                largest = max(largest, difference)
    return largest


def _difference(found: Tensor, right: Tensor) -> float:
    if found.shape != right.shape:
        return float("inf")
    return float((found - right).abs().max() / right.abs().max().clamp_min(1))


def describe(model: ReferringModel, parts: Sequence[Part], form: str, name: str) -> dict[str, Any]:
    """What a product must know: files, shapes, how pictures and phrases become numbers, and how logits become masks."""
    config, inputs = model.config, inputs_of(model.config)
    asked = draw(model, *TRACED)
    with torch.no_grad():
        features = model.encode_image(asked.images)
        logits = model.segment(features, asked.tokens, asked.index)
    tensors = {**asked._asdict(), **dict(zip(getattr(features, "_fields", ()), features, strict=False)), LOGITS: logits}
    open_size = {"tokens": PHRASES, "index": PHRASES, LOGITS: PHRASES}

    def shape(tensor: str) -> dict[str, Any]:
        dtype = str(tensors[tensor].dtype).removeprefix("torch.")
        return {"shape": [open_size.get(tensor, PICTURES), *tensors[tensor].shape[1:]], "dtype": dtype}

    return {
        "fastris": __version__,
        "format": form,
        "model": name,
        "system": config.title,
        "parts": {
            part.name: {
                "file": part.name + SUFFIXES[form],
                "inputs": {tensor: shape(tensor) for tensor in part.flat_inputs()},
                "outputs": {tensor: shape(tensor) for tensor in part.outputs},
            }
            for part in parts
        },
        "size": config.input_size,
        "fit": inputs.fit,
        "channels": "RGB",
        "mean": list(inputs.mean),
        "std": list(inputs.std),
        "tokenizer": inputs.tokenizer,
        "word_len": config.word_len,
        "threshold": config.threshold,
        "settings": config.for_others().to_dict(),
    }


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` to write in; on success it takes that name, and on any error it is removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.tmp")
    former = folder.with_suffix(".old")
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            out.rename(former)
        folder.rename(out)
    finally:
        for left in (folder, former):
            shutil.rmtree(left, ignore_errors=True)
