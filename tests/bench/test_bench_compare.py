"""`fastris bench --compare` notices what became slower, and nothing else."""

from __future__ import annotations

import copy
import json
import math
from itertools import combinations

import pytest
from test_bench import make_case, without_compiler

from fastris.bench import measure as command
from fastris.bench.report import compare
from fastris.commands import cli

STEADY = [100.0, 101.0, 99.0, 102.0, 98.0, 100.5, 99.5]


def result(times, device="a processor", passes="forward + backward", batch=4, **settings):
    """A result file of one case, `times` by arm."""
    arms = {name: {"arm": name, "status": "measured", "message": "", "ms": list(ms)} for name, ms in times.items()}
    case = {"name": "tiny", "op": "tiny", "sizes": {"batch": batch}, "passes": passes, "baseline": "reference"}
    return {
        "format": 1,
        "machine": {"device": {"type": "cpu", "name": device}, "threads": 2, "versions": {"torch": "2.15"}},
        "settings": {"dtype": "float32", **settings},
        "cases": [{**case, "arms": arms}],
    }


def scaled(factor):
    return [factor * ms for ms in STEADY]


OLD = result({"reference": STEADY, "torch": scaled(0.5)})


def test_a_slowed_arm_is_noticed_and_an_unchanged_one_is_not():
    new = result({"reference": scaled(1.01), "torch": scaled(0.6), "triton": scaled(0.1)})
    found = compare.compare({**OLD, "cases": result({**times(OLD), "triton": scaled(0.1)})["cases"]}, new)
    by_arm = {row.arm: row for row in found.rows}
    assert by_arm["torch"].slower() and by_arm["torch"].relative.factor == pytest.approx(1.2 / 1.01)
    assert not by_arm["triton"].moved() and not by_arm["reference"].moved()
    assert found.slower() and "tiny, B=4, forward + backward, torch: over the baseline 0.5 -> 0.594" in found.text()
    assert "1 moved beyond noise, 2 did not" in found.text()


def times(found):
    return {name: cell["ms"] for name, cell in found["cases"][0]["arms"].items()}


def test_a_slower_machine_is_shown_and_not_held_against_any_arm():
    found = compare.compare(OLD, result({"reference": scaled(1.5), "torch": scaled(0.75)}))
    assert not found.slower() and all(row.moved() for row in found.rows)
    assert "100 -> 150 ms, 1.50x the time (slower)" in found.text()


def test_a_faster_arm_is_shown_and_is_no_failure():
    found = compare.compare(OLD, result({"reference": STEADY, "torch": scaled(0.25)}))
    assert not found.slower() and "0.50x the time (faster)" in found.text()


def test_a_wide_spread_hides_a_change_and_few_rounds_tell_only_a_large_one():
    noisy = [60.0, 90.0, 40.0, 30.0, 80.0, 55.0, 45.0]
    found = compare.compare(OLD, result({"reference": STEADY, "torch": noisy}))
    assert not found.slower()
    few = {factor: result({"reference": STEADY[:3], "torch": scaled(factor)[:3]}) for factor in (0.55, 0.7)}
    assert not compare.compare(OLD, few[0.55]).slower() and compare.compare(OLD, few[0.7]).slower()
    found = compare.compare(OLD, result({"reference": STEADY[:1], "torch": scaled(5.0)[:1]}))
    assert not found.slower() and "2 cannot be told: one of the files has a single round" in found.text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "another processor"}, "every case: device was a processor and is another processor"),
        ({"dtype": "bfloat16"}, "every case: dtype was float32 and is bfloat16"),
        ({"batch": 8}, "tiny, B=8, forward + backward: the older file does not hold it at these sizes"),
        ({"passes": "forward alone"}, "tiny, B=4, forward + backward: only in the older file"),
    ],
)
def test_only_what_agrees_is_compared_and_the_rest_says_why(change, reason):
    found = compare.compare(OLD, result({"reference": STEADY, "torch": scaled(5.0)}, **change))
    assert found.rows == [] and not found.slower() and f"not compared: {reason}" in found.text()


def test_times_in_another_float32_precision_are_not_compared_unless_the_older_file_does_not_tell():
    ieee, tf32 = ({"matmul": "ieee", "convolution": kind} for kind in ("ieee", "tf32"))

    def told(precision):
        return {**OLD, "machine": {**OLD["machine"], "float32": precision}}

    assert compare.compare(told(ieee), told(tf32)).rows == []
    assert len(compare.compare(told(tf32), told(tf32)).rows) == len(compare.compare(OLD, told(tf32)).rows) == 2


def test_another_format_and_an_arm_without_times_are_told():
    new = result({"reference": STEADY, "torch": scaled(0.5), "triton": scaled(0.1)})
    new["cases"][0]["arms"]["torch"].update(status="refused", ms=[])
    new["machine"]["versions"]["torch"] = "2.16"
    text = compare.compare({**OLD, "format": 7}, new).text()
    assert "the files have formats 7 and 1" in text and "torch was 2.15 and is 2.16" in text
    assert "forward + backward, torch: refused" in text and "triton: not in the older file" in text


def test_an_older_file_with_fewer_fields_is_read_as_far_as_it_goes():
    old = copy.deepcopy(OLD)
    del old["format"], old["machine"]["versions"]
    assert len(compare.compare(old, OLD).rows) == 2


def test_rank_test_is_exact():
    assert compare.rank_test([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / math.comb(10, 5))
    first, second = [1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]
    ranks = range(7)
    observed = sum(a > b for a in first for b in second)
    extreme = min(observed, 12 - observed)
    count = 0
    for chosen in combinations(ranks, 3):
        wins = sum(a > b for a in chosen for b in ranks if b not in chosen)
        count += min(wins, 12 - wins) <= extreme
    assert compare.rank_test(first, second) == pytest.approx(min(1.0, count / math.comb(7, 3)))
    assert compare.rank_test([1.0] * 8, [1.0] * 8) == 1.0
    long = compare.rank_test([float(n) for n in range(40)], [float(n) + 30 for n in range(40)])
    assert 0 < long < 1e-6


def test_a_deliberately_slowed_arm_fails_the_command(tmp_path, monkeypatch, capsys):
    slow = {}
    without_compiler(monkeypatch)
    monkeypatch.setattr(command, "choose_cases", lambda names: ([make_case(faults=slow)], False))

    def twenty_times_the_work(output):
        for _ in range(200):
            output = output + 0
        return output

    old, new = tmp_path / "old.json", tmp_path / "new.json"
    arguments = ["bench", "device=cpu", "arms=torch", "rounds=7"]
    assert cli.main([*arguments, f"json={old}"]) == 0
    slow["torch"] = twenty_times_the_work
    assert cli.main([*arguments, f"json={new}", f"compare={old}"]) == 1
    assert "tiny, B=5, forward + backward, torch: over the baseline" in capsys.readouterr().out
    assert compare.main([str(new), str(old)]) == 0  # the other way round it became faster
    assert "(faster)" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "message"), [("{", "is no JSON file"), (json.dumps([1]), "is no result file")])
def test_a_file_that_is_no_result_is_told_before_anything_is_measured(content, message, tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(content)
    assert cli.main(["bench", f"compare={path}"]) == 2
    assert message in capsys.readouterr().err
    assert compare.main([str(path), str(path)]) == 2 and compare.main([]) == 2
    assert cli.main(["bench", f"compare={tmp_path / 'nowhere.json'}"]) == 2
