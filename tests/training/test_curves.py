"""curves.html shows what the CSV files hold, and needs nothing else."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from training_helpers import rows

from fastris.pictures.curves import MOST, Chart, page, thinned, ticks
from fastris.training.curves import draw_curves


def test_run_leaves_curves_that_need_nothing_else(uninterrupted: Path) -> None:
    text = (uninterrupted / "curves.html").read_text(encoding="utf-8")
    tree = ElementTree.fromstring(text.split("\n", 1)[1].replace('<meta charset="utf-8">', ""))
    assert [each.text for each in tree.iter("h2")] == ["Loss", "mIoU", "Learning rate", "Throughput"]
    assert not re.search(r"<script|<link|https?:|src=|@import|url\(", text)
    validations, steps = rows(uninterrupted / "val.csv"), rows(uninterrupted / "log.csv")
    told = [each.text or "" for each in tree.iter("title")]
    for row in validations:
        assert f"validation: {100 * float(row['mIoU']):.4g} % at step {row['step']}" in told
    for row in steps:
        assert f"training: {float(row['loss']):.4g} at step {row['step']}" in told
        assert f"encoders: {float(row['lr_backbone']):.4g} at step {row['step']}" in told
    lines = [each.get("points", "").split() for each in tree.iter("polyline")]
    assert [len(line) for line in lines] == [8, 2, 8, 8, 8, 8]
    assert len(list(tree.iter("tr"))) == 1 + len(validations)


def test_lines_stay_inside_their_chart_and_higher_is_higher() -> None:
    text = page("<a>&", "facts", [Chart("t", {"x": [(1, 0.2), (2, 0.9), (3, 0.5)]}, " %")], (), ())
    assert "&lt;a&gt;&amp;" in text and "<a>" not in text
    points = re.search(r'polyline points="([^"]*)"', text)
    assert points is not None
    places = [tuple(map(float, each.split(","))) for each in points[1].split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places) and places[1][1] < places[2][1] < places[0][1]
    assert all(0 <= x <= 520 and 0 <= y <= 260 for x, y in places)


def test_long_lines_are_averaged_and_what_is_not_finite_left_out() -> None:
    kept = thinned([(float(x), math.nan if x == 5 else 2.0 * x) for x in range(10 * MOST + 1)])
    assert len(kept) <= MOST and all(y == pytest.approx(2 * x) for x, y in kept)
    assert thinned([]) == [] and "nothing yet" in page("", "", [Chart("t", {})], (), ())


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (1e-6, 3e-4), (-3.0, 41.0), (5.0, 5.0), (0.0, 0.0), (1e9, 1.1e9)]
)
def test_ticks_are_few_and_hold_all_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8 and found[0] <= low and found[-1] >= high and found == sorted(set(found))


def test_nothing_is_drawn_before_the_first_step(tmp_path: Path) -> None:
    assert draw_curves(tmp_path) is None and not list(tmp_path.iterdir())
