"""Trace a part with ``torch.export``, write it as ONNX or as ``.pt2``, and run what was written."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastris.dispatch import use_impl
from fastris.exporting.parts import PHRASES, PICTURES, Asked, Part
from fastris.runtime.extras import need

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}

INLINE_BYTES = 2**30
"""Weights of up to so many bytes are in the .onnx file itself, which cannot hold 2 GiB; others in .onnx.data beside."""

Run = Callable[[Sequence[Tensor]], list[Tensor]]
"""Inputs in the order of :meth:`.parts.Part.flat_inputs` to outputs."""


def need_libraries(form: str) -> None:
    """Raise MissingExtra, saying how to install it, where a library of this format is missing."""
    for library in ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ():
        need(library, "onnx", "for format=onnx")


def trace(part: Part, asked: Asked, features: Any = None) -> torch.export.ExportedProgram:
    """The part as a program of standard operators, for any number of pictures and phrases."""
    given = {**asked._asdict(), "features": None if features is None else tuple(features)}
    sizes = {name: torch.export.Dim(name) for name in (PICTURES, PHRASES)}

    def left_open(dimensions: Any) -> Any:
        if isinstance(dimensions, tuple):
            return tuple(left_open(each) for each in dimensions)
        return {axis: sizes[name] for axis, name in dimensions.items()}

    shapes = {name: left_open(dimensions) for name, dimensions in part.dimensions().items()}
    with torch.no_grad(), use_impl("reference"), _quiet():
        program = torch.export.export(part.module, tuple(given[name] for name in part.inputs), dynamic_shapes=shapes)
    _drop_unread(program)
    return program


def _drop_unread(program: torch.export.ExportedProgram) -> None:
    """Leave out the weights that the program does not read: a part was traced with the whole model's."""
    signature, graph = program.graph_signature, program.graph_module.graph
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    unread = [node for node in graph.nodes if node.op == "placeholder" and node.name in names and not node.users]
    for node in unread:
        program.state_dict.pop(names[node.name], None)
        graph.erase_node(node)
    gone = {node.name for node in unread}
    signature.input_specs[:] = [each for each in signature.input_specs if getattr(each.arg, "name", "") not in gone]
    program.graph_module.recompile()


def write(program: torch.export.ExportedProgram, part: Part, path: Path, form: str) -> None:
    """Write ``path``, and for large weights of ONNX ``path`` with .data behind it."""
    if form == "torch":
        torch.export.save(program, path)
        return
    weights = sum(each.nbytes for each in program.state_dict.values())
    with torch.no_grad(), _quiet():
        converted: Any = torch.onnx.export(
            program,
            input_names=list(part.flat_inputs()),
            output_names=list(part.outputs),
            dynamic_shapes=part.dimensions(),
            verbose=False,
        )
        converted.save(path, external_data=weights > INLINE_BYTES)


def opened(part: Part, path: Path, form: str) -> Run:
    """The written file, read back and ready to run."""
    return _opened_onnx(part, path) if form == "onnx" else _opened_torch(part, path)


def _opened_onnx(part: Part, path: Path) -> Run:
    runtime = need("onnxruntime", "onnx", "for format=onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        given = {name: each.numpy() for name, each in zip(part.flat_inputs(), inputs, strict=True)}
        return [torch.from_numpy(each) for each in session.run(list(part.outputs), given)]

    return run


def _opened_torch(part: Part, path: Path) -> Run:
    module = torch.export.load(path).module()

    @torch.no_grad()
    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        rest = list(inputs)
        given = [
            tuple(rest.pop(0) for _ in part.features) if each == "features" else rest.pop(0) for each in part.inputs
        ]
        found = module(*given)
        return [found] if isinstance(found, Tensor) else list(found)

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters tell of their own progress, which is for their authors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
