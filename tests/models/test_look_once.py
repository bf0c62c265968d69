"""Looking once gives the numbers of asking one by one, and is refused where it does not."""

from __future__ import annotations

import functools

import pytest
import torch

from fastris import CRIS
from fastris.bench.options import Effort
from fastris.bench.report import pages, results
from fastris.bench.studies import look_once
from fastris.bench.timing.check import Checker, WrongNumbersError
from fastris.bench.timing.harness import Setting, measure_case

CPU = torch.device("cpu")


@functools.cache
def checker(kind):
    """With its truth, which is computed once."""
    return Checker(look_once.make_case(kind, 2, "tiny").check_problem(quick=True), composed=True)


@pytest.mark.parametrize("kind", ["inference", "training"])
def test_every_way_to_ask_passes_its_own_check(kind):
    checks = checker(kind)
    for way in look_once.WAYS[kind]:
        assert checks.check(way).float64_too


@pytest.mark.parametrize("kind", ["inference", "training"])
def test_looking_once_at_something_else_is_refused(kind, monkeypatch):
    encode = CRIS.encode_image
    monkeypatch.setattr(
        CRIS,
        "encode_image",
        lambda model, images: encode(model, images * (1 + 1e-4 * look_once.Asking.looks_once)),
    )
    with pytest.raises(WrongNumbersError):
        checker(kind).check(look_once.WAYS[kind][-1])


def test_every_timing_is_kept():
    case, cells = look_once.make_case("inference", 2, "tiny"), {}
    measure_case(case, look_once.WAYS["inference"], Setting(CPU, torch.float32, Effort(2, 2, 0.0)), cells)
    assert {name: (cell.status, len(cell.ms)) for name, cell in cells.items()} == {
        "published": ("measured", 2), "one by one": ("measured", 2), "look once": ("measured", 2)
    }  # fmt: skip


def test_the_page_shows_rates_and_the_gain_over_the_published_way():
    content = results.load(look_once.RESULT)
    case = content["cases"][0]
    for arm, ms in (("published", 100.0), ("look once", 25.0), ("one by one", 50.0)):
        case["arms"][arm].update(status="measured", ms=[ms, ms, ms])
    case["sizes"]["expressions"] = 4
    content["cases"] = [case]
    text = pages.look_once_page(content, "x.json")
    assert "| 40.0 (10.0) | 80.0 (20.0) | 160 (40.0) | **4.00x** (4.00 to 4.00) |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training", "1"], "training must be at least 2 each, got 1"),
        (["--expressions", "0"], "expressions must be at least 1 each, got 0"),
        (["--model", "toaster"], "unknown model 'toaster'"),
        (["--device", "toaster"], "device='toaster' is unknown"),
    ],
)
def test_wrong_calls_are_told_in_one_line(arguments, message, capsys, tmp_path):
    assert look_once.main([*arguments, f"json={tmp_path / 'x.json'}"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
