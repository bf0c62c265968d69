"""README shows what the result files say, and says so when it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastris.bench.report import charts
from fastris.bench.report import docs as readme

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A copy of README.md, docs and the result files."""
    shutil.copy(ROOT / "README.md", tmp_path)
    for folder in (readme.RESULTS, "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_readme_and_charts_agree_with_the_result_files():
    assert readme.differences(ROOT) == [], f"mend it with: {readme.COMMAND}"


def test_a_changed_result_is_noticed_and_one_command_mends_it(checkout, capsys):
    def slow_down(content):
        for case in content["cases"]:
            case["arms"]["torch"]["ms"] = [3 * ms for ms in case["arms"]["torch"]["ms"]]

    change_json(checkout / readme.RESULTS / "cpu_float32.json", slow_down)
    assert readme.main(["--check"], checkout) == 1
    printed = capsys.readouterr().out
    assert "docs/benchmarks.md, block cpu: not what bench/results/cpu_float32.json says" in printed
    assert "README.md, block face: not what bench/results says" in printed
    assert "docs/images/cpu_float32.svg" in printed and "mend it with: python -m bench.report.docs" in printed
    assert "block demo" not in printed and "look_once" not in printed
    assert readme.main([], checkout) == 0
    assert "0.44x slower" in "".join(charts.texts_of((checkout / "docs/images/cpu_float32.svg").read_text()))
    assert readme.main(["--check"], checkout) == 0


def test_a_number_changed_by_hand_is_noticed(checkout, capsys):
    path = checkout / "docs" / "index.md"
    text = path.read_text()
    at = text.index("| the right phrase |")
    path.write_text(text[:at] + text[at:].replace("| the right phrase | ", "| the right phrase | 9", 1))
    assert readme.main(["--check"], checkout) == 1
    assert "block demo: not what bench/results/demo_metrics.json says" in capsys.readouterr().out


def test_text_outside_the_blocks_stays_as_it_is(checkout):
    path = checkout / "README.md"
    assert readme.main([], checkout) == 0
    path.write_text("# First\n" + path.read_text().replace("## Status", "words of my own\n\n## Status"))
    before = path.read_text()
    assert readme.main([], checkout) == 0
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench: cpu -->\n", "block cpu has no end; put <!-- /bench -->"),
        ("\n\n<!-- /bench -->\n", "line 3: <!-- /bench --> does not fit the mark before it"),
        ("<!-- bench: cpu -->\n<!-- bench: demo -->\n<!-- /bench -->", "line 2: <!-- bench: demo --> does not fit"),
        ("<!-- bench: toaster -->\n<!-- /bench -->", "block toaster is not of one result file; blocks can be"),
    ],
)
def test_marks_that_do_not_fit_are_named(checkout, capsys, text, message):
    (checkout / "README.md").write_text(text)
    for arguments in ([], ["--check"]):
        assert readme.main(arguments, checkout) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert (checkout / "README.md").read_text() == text


def test_a_block_whose_long_run_is_still_to_come_names_its_command_until_the_file_is_there(checkout):
    for file in ("magnet_step_cpu_float32.json", "magnet_memory.json"):
        (checkout / readme.RESULTS / file).unlink(missing_ok=True)
    waiting = readme.block(checkout, "magnet_step_cpu")
    assert waiting.startswith(
        "Not measured yet: `python -m bench op=magnet arms=torch,repaired json=bench/results/magn"
    )
    assert "bench.memory model=magnet_swin_b" in readme.block(checkout, "magnet-memory")
    results = checkout / readme.RESULTS
    shutil.copy(results / "cpu_float32.json", results / "magnet_step_cpu_float32.json")
    assert "ms<br>" in readme.block(checkout, "magnet_step_cpu")


def test_a_result_file_of_another_device_gets_a_block_and_a_chart(checkout):
    results = checkout / readme.RESULTS
    shutil.copy(results / "cpu_float32.json", results / "h200_bfloat16.json")
    path = checkout / "README.md"
    path.write_text(path.read_text() + "\n<!-- bench: h200 -->\n<!-- /bench -->\n")
    assert readme.main([], checkout) == 0
    assert "](docs/images/h200_bfloat16.svg)" in path.read_text()
    assert (checkout / readme.IMAGES / "h200_bfloat16.svg").is_file()
    assert readme.main(["--check"], checkout) == 0


def test_wrong_calls_are_told_the_right_one(capsys):
    assert readme.main(["--chekc"]) == 2
    assert "usage: python -m bench.report.docs [--check]" in capsys.readouterr().err
