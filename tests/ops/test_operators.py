"""One table of operators, which everything that knows of operators reads."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

from fastris import dispatch, ops, reference
from fastris.bench.cases.table import CASES
from fastris.commands import doctor
from fastris.operators import OPERATORS

EACH = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


@EACH
def test_every_row_names_what_exists(operator):
    function = operator.function()
    assert inspect.signature(function).parameters["impl"].default == "auto"
    assert callable(getattr(reference, operator.reference))
    if operator.kernels:
        pytest.importorskip("triton")
        assert importlib.import_module(f"fastris.kernels.{operator.kernels}")


@EACH
def test_every_operator_is_measured_and_explained(operator):
    assert any(case.op == operator.case for case in CASES), f"no case of fastris bench is of {operator.case}"
    assert operator.name in [name for name, _, _ in dispatch.chosen_paths("cpu")]
    assert operator.name in doctor.report()["operators"]["cpu"]


@EACH
def test_reference_can_be_asked_of_every_operator(operator):
    with dispatch.use_impl("reference"):
        assert dict((name, path) for name, path, _ in dispatch.chosen_paths("cpu"))[operator.name] == "reference"


def test_every_public_operator_has_a_row():
    public = {name for name in ops.__all__ if "impl" in inspect.signature(getattr(ops, name)).parameters}
    assert public - set(OPERATORS) == {"upsample2x_conv3x3_stats"}, "with the statistics of a row's own output"


def test_reading_the_table_imports_neither_pytorch_nor_triton():
    code = "import sys, fastris.operators; print({'torch', 'triton'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
