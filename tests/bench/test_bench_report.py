"""Tables and charts show every arm, every loss and every missed goal of a result file."""

from __future__ import annotations

import pytest

from fastris.bench.report import charts, results
from fastris.bench.report import tables as report
from fastris.runtime.markdown import markdown_table


def cell(*ms, status="measured", message="", **fields):
    return {"status": status, "message": message, "ms": list(ms), **fields}


def case(arms, goal=None, name="tiny", op="tiny", **fields):
    arms = {"reference": cell(10.0, 10.0, 10.0), **arms}
    title = "tiny case: 3 pixels, B=2"
    fixed = {"name": name, "op": op, "title": title, "sizes": {"batch": 2}, "passes": "forward"}
    return {**fixed, "baseline": "reference", "goal": goal, "arms": arms, **fields}


def result(*cases, memory=None, **settings):
    machine = {
        "date": "2026-01-02T00:00:00+00:00",
        "device": {"type": "cpu", "name": "a processor"},
        "threads": 2,
        "versions": {"torch": "2.99", "fastris": "0.1"},
        "git": {"revision": "0123456789abcdef", "dirty": False},
    }
    settings = {"dtype": "float32", "quick": False, **settings}
    return {"machine": machine, "settings": settings, "complete": True, "cases": list(cases), "memory": memory}


def texts(chart):
    """Everything that a chart says, title first."""
    groups = [
        text for group in chart.groups for text in (group.label, group.details, *(bar.label for bar in group.bars))
    ]
    return [chart.title, *{bar.name for group in chart.groups for bar in group.bars}, *groups]


def drawn(chart, folder):
    charts.draw(chart, folder / "chart.svg")
    return (folder / "chart.svg").read_text()


def test_a_slower_arm_is_marked_in_every_table_and_chart():
    found = result(case({"torch": cell(20.0, 20.0, 20.0)}, goal=2.0))
    for text in (report.markdown(found), report.page(found, "x.json")):
        assert "slower" in text and "(torch: 0.50x the speed of reference)" in text
        assert "0.50x of 2x" in text
    assert any(text == "0.50x slower (goal 2x, missed)" for text in texts(charts.speed_chart(found)))


def test_a_case_where_fastris_is_slower_is_never_folded_away():
    lost, won = (case({"torch": cell(ms, ms)}, name=name) for ms, name in ((20.0, "lost"), (5.0, "won")))
    with_goal = case({"torch": cell(5.0, 5.0)}, goal=2.0, name="goal")
    assert [one["name"] for one in results.main_cases([lost, won, with_goal])] == ["lost", "goal"]


def test_slower_within_noise_is_said_to_be_so():
    found = result(case({"torch": cell(12.0, 10.5, 9.0)}))
    assert "slower within noise" in report.markdown(found)
    assert "speed of reference, within noise" in report.page(found, "x.json")


def test_targets_over_other_arms_and_of_the_roofline_are_judged_one_by_one():
    arms = {"repaired": cell(8.0, 8.0), "max_autotune": cell(3.0, 3.0), "torch": cell(2.0, 2.0, share=0.7)}
    targets = {"repaired": 4.0, "max_autotune": 2.0, "share": 0.8, "compiled": 3.0}
    one = case(arms, targets=targets, goal_arms=["torch"])
    assert results.goals(one) == [
        ("4x repaired", "4.00x", "yes"),
        ("2x max_autotune", "1.50x", "no"),
        ("80 % of roofline", "70 %", "no"),
        ("3x compiled", "-", "no"),
    ]
    text = report.page(result(one), "x.json")
    assert "4x repaired: yes<br>2x max_autotune: **no**" in text
    assert "(1.50x of 2x max_autotune); tiny case, 3 pixels (70 % of 80 % of roofline)" in text


def test_nothing_slower_and_nothing_missed_is_said_too():
    text = report.page(result(case({"torch": cell(2.0, 2.0, 2.0)}, goal=2.0)), "x.json")
    assert "Slower than the best other arm: nothing here." in text and "Goals not met: none." in text


def test_fastris_is_compared_with_the_best_other_arm_and_not_with_the_slowest():
    arms = {"repaired": cell(4.0, 4.0, 4.0), "torch": cell(5.0, 5.0, 5.0), "fastris_compiled": cell(8.0, 8.0, 8.0)}
    one = case(arms, goal=1.5, goal_arms=["torch", "fastris_compiled"])
    assert results.best_arms(one) == ("torch", "repaired")
    assert results.lead(one) == (0.8, 0.8, 0.8)
    text = report.page(result(one), "x.json")
    assert "(torch: 0.80x the speed of repaired)" in text and "0.80x the best other, slower" in text
    assert "1.5x: yes" in text
    head = next(line for line in text.splitlines() if line.startswith("|"))
    assert head == "|   | reference | best other | fastris | goal |"


def test_headline_goals_targets_and_chart_mean_the_same_best_arm():
    """Plain PyTorch is the algebra alone where Triton was measured, however fast it is."""
    arms = {"repaired": cell(8.0, 8.0), "torch": cell(1.0, 1.0, share=0.9), "triton": cell(2.0, 2.0, share=0.5)}
    one = case(arms, goal=6.0, targets={"repaired": 4.0, "share": 0.6})
    assert results.best_arms(one) == ("triton", "repaired")
    assert results.headline(one) == {"ours": "triton", "theirs": "repaired", "ratio": 4.0, "low": 4.0, "high": 4.0}
    assert [goal.reached for goal in results.goals(one)] == ["5.00x", "4.00x", "50 %"]
    assert "5.00x (goal 6x, missed)" in texts(charts.speed_chart(result(one)))
    assert results.best_arms(case({"torch": cell(1.0)}))[0] == "torch"


def test_arms_and_numbers_that_this_module_never_heard_of_appear():
    arms = {"torch": cell(5.0, 5.0), "wonder": cell(1.0, 1.0, share=0.5)}
    found = result(case(arms), case({}, name="other"))
    text = report.page(found, "x.json")
    assert "| wonder |" in text and "50 % of roofline" in text
    assert "wonder" in report.markdown(found) and "wonder" in texts(charts.speed_chart(found))


def test_refused_failed_and_left_out_arms_are_shown_and_never_count():
    arms = {
        "torch": cell(status="refused", message="output 0: error"),
        "compiled": cell(status="left out", message="takes long"),
    }
    found = result(case(arms, goal=2.0))
    assert "REFUSED: output 0: error" in report.markdown(found) and "left out: takes long" in report.markdown(found)
    text = report.page(found, "x.json")
    assert "**REFUSED**" in text and "2x: **no**" in text and "- of 2x" in text
    assert [bar for group in charts.speed_chart(found).groups for bar in group.bars] == []


def test_what_float32_was_timed_in_is_said_where_the_file_knows_it():
    old = result(case({}))
    assert "float32, PyTorch" in report.caption(old)
    new = {**old, "machine": {**old["machine"], "float32": {"matmul": "ieee", "convolution": "tf32"}}}
    assert "float32, float32 matrix products in IEEE and convolutions in TF32, PyTorch" in report.caption(new)


def test_readme_columns_are_few_whatever_the_number_of_arms():
    arms = {name: cell(5.0, 5.0) for name in ("repaired", "compiled", "max_autotune", "torch", "triton", "more")}
    text = report.page(result(case(arms, goal=1.0)), "x.json")
    narrow = text.split("<details>")[0]
    assert max(line.count("|") - 1 for line in narrow.splitlines()) <= 5


def test_a_pipe_in_a_title_breaks_no_table():
    text = markdown_table(("a", "b"), [("x|y", "z")], aligned=True)
    assert text.splitlines()[2].replace("\\|", "").count("|") == 3


def test_memory_is_shown_by_stage_with_its_share_and_goal():
    stages = {
        "neck": {"activations": 2**21, "weight_copies": 2**20},
        "decoder": {"activations": 2**22, "weight_copies": 0},
    }
    half = {"neck": {"activations": 2**21, "weight_copies": 0}}
    arms = {
        "reference": {"status": "measured", "message": "", "stages": stages},
        "torch": {"status": "measured", "message": "", "stages": half},
        "triton": {"status": "failed", "message": "no GPU", "stages": {}},
    }
    memory = {"title": "kept", "batch": 1, "baseline": "reference", "goal": 0.25, "arms": arms}
    text = report.memory_table(memory)
    rows = {
        line.split("|")[1].strip(): [part.strip() for part in line.split("|")[2:-1]] for line in text.splitlines()[3:]
    }
    assert rows["neck"] == ["3", "2", "FAILED"] and rows["**together**"] == ["**7**", "**2**", "**FAILED**"]
    assert rows["share of reference"][1] == "0.29 (at most 0.25: no)" and "triton: FAILED: no GPU" in text


@pytest.mark.parametrize("values", [[1.0], [0.2, 40.0], [16.0, 16.0]])
@pytest.mark.parametrize("ratios", [True, False])
def test_every_bar_lies_on_its_axis_and_its_origin_is_on_it(values, ratios):
    bars = tuple(charts.Bar("torch", value, f"{value}", 0.9 * value, 1.1 * value) for value in values)
    axes = charts.figure_of(charts.Chart("title", "", (charts.Group("one", "", bars),), ratios)).axes[0]
    low, high = axes.get_xlim()
    assert all(low <= value <= high for value in [*values, *(1.1 * value for value in values)])
    assert low <= (1.0 if ratios else 0.0) <= high


def test_no_text_of_a_chart_leaves_the_picture():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    long = case({"torch": cell(0.1, 0.1)}, goal=200.0)
    long["title"] = "a name of a case: " + "and very many details about it, " * 6
    figure = charts.figure_of(charts.speed_chart(result(long, long)))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [*figure.texts, *figure.axes[0].texts]
    assert len(texts) > 10
    for text in texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 >= 0 and box.x1 <= charts.WIDTH and box.y0 >= 0, text.get_text()


def test_a_picture_holds_every_number_and_a_changed_number_is_noticed(tmp_path):
    arms = {"torch": cell(3.0, 4.0, 5.0), "fastris_compiled": cell(20.0, 20.0, 20.0)}
    chart = charts.speed_chart(result(case(arms, goal=2.0)))
    picture = drawn(chart, tmp_path)
    assert charts.is_drawn(chart, picture)
    assert "0.50x slower" in charts.texts_of(picture) and "2.50x (goal 2x)" in charts.texts_of(picture)
    assert not charts.is_drawn(chart, picture.replace("2.50x", "9.50x"))
    assert charts.is_drawn(chart, drawn(chart, tmp_path)), "drawn twice, the same"


def test_a_factor_that_reads_1_00_is_not_called_slower():
    found = result(case({"torch": cell(10.02, 10.02, 10.02), "triton": cell(10.2, 10.2, 10.2)}))
    assert "1.00x" in texts(charts.speed_chart(found)) and "0.98x slower" in texts(charts.speed_chart(found))
    text = report.page(found, "x.json")
    assert "1.00x**" in text and "1.00x, slower" not in text and "0.98x, slower" in text


def test_markup_in_a_title_stays_text(tmp_path):
    found = case({"torch": cell(1.0)})
    found["title"] = "a < b & c: <script>"
    assert "a < b & c" in charts.texts_of(drawn(charts.speed_chart(result(found)), tmp_path))
