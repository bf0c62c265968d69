"""The steps of the first hour on a GPU: what each takes for right, wrong, skipped or cut, and what the summary says."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastris.bench.hour import (
    curve,
    kernels,
    plan,
    problems,
    profile,
    record,
    sanitizer,
    summary,
    tune,
    work,
)
from fastris.bench.hour import tests as test_step

ROOT = Path(__file__).parents[2]
CPU = {"python": "3.12", "torch": "2.11.0", "cuda": None, "type": "cpu", "triton": "3.6.0", "driver": None}
GPU = {**CPU, "cuda": "13.0", "type": "cuda", "name": "A Card", "capability": [9, 0], "driver": "580"}


def statuses(step: dict) -> dict[str, str]:
    return {key: item["status"] for key, item in step["items"].items()}


def make_place(tmp_path: Path, **fields) -> problems.Place:
    return problems.Place(**{"device": torch.device("cpu"), "folder": tmp_path, "end": time.monotonic() + 60, **fields})


def test_each_measurement_is_on_disk_before_the_next_begins(tmp_path, monkeypatch):
    seen = []

    def look():
        seen.append(statuses(record.read_json(tmp_path / record.NOW)))

    def fail():
        look()
        raise ValueError("no good")

    def skip():
        look()
        raise problems.Skip("not here")

    rows = [
        ("first", look),
        ("bad", fail),
        ("absent", skip),
        ("cut", lambda: {"status": "cut", "again": 1}),
        ("known", fail),
    ]
    monkeypatch.setitem(sys.modules, f"{work.__package__}.made_up", SimpleNamespace(items=lambda place: iter(rows)))
    page = {"step": "made_up", "items": {"known": {"status": "ok"}, "cut": {"status": "cut"}}, "left_out": []}
    record.write_json(tmp_path / record.NOW, page)
    assert work.run("made_up", tmp_path, torch.device("cpu"), 60.0) == 0
    before = {"known": "ok", "cut": "cut"}
    assert seen == [before, {**before, "first": "ok"}, {**before, "first": "ok", "bad": "failed"}]
    items = record.read_json(tmp_path / record.NOW)["items"]
    assert items["cut"]["again"] == 1 and items["cut"]["seconds"] >= 0
    assert items["bad"]["why"] == "ValueError: no good" and items["absent"]["why"] == "not here"


def test_nothing_begins_after_the_time(tmp_path, monkeypatch):
    rows = [("late", lambda: pytest.fail("began"))]
    monkeypatch.setitem(sys.modules, f"{work.__package__}.made_up", SimpleNamespace(items=lambda place: iter(rows)))
    record.write_json(tmp_path / record.NOW, {"step": "made_up", "items": {}, "left_out": []})
    work.run("made_up", tmp_path, torch.device("cpu"), -1.0)
    assert record.read_json(tmp_path / record.NOW)["left_out"] == ["late"]


def test_every_step_has_its_module_and_what_needs_a_gpu_says_so(tmp_path):
    place = make_place(tmp_path)
    for step in plan.STEPS:
        module = __import__(f"{work.__package__}.{step.name}", fromlist=["items"])
        try:
            keys = [key for key, _ in module.items(place)]
        except problems.Skip as reason:
            assert "GPU" in str(reason)
        else:
            assert keys and len(set(keys)) == len(keys)
    assert place.labelled({"ms": 1}) == {"ms": 1, "label": problems.LABEL}


def test_on_a_gpu_every_operator_is_timed_in_each_dtype_and_batch_the_goals_first(tmp_path):
    keys = [key for key, _ in kernels.items(make_place(tmp_path, device=torch.device("cuda")))]
    cases = len(problems.OPERATOR_CASES)
    assert len(set(keys)) == len(keys) == cases * 3 * 3 + cases
    assert all("bfloat16 B=16" in key for key in keys[:cases])
    for _, case, *_ in summary.LEAST_GOALS:
        assert {f"{case} bfloat16 B=16", f"{case} bfloat16 B=16 compiled", f"{case} float32 B=4"} <= set(keys)


def test_an_arm_that_is_wrong_fails_its_measurement_and_is_not_timed(tmp_path, monkeypatch):
    class Off:
        def __init__(self, problem, composed):
            pass

        def check(self, arm):
            if arm.name == "torch":
                raise RuntimeError("off by 1")
            return SimpleNamespace(error=0.0)

    monkeypatch.setattr(kernels, "Checker", Off)
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    monkeypatch.setattr(kernels, "_verdicts", {})
    found = kernels.measure(make_place(tmp_path), "cross_attention_padded", torch.float32, 2, kernels.EAGER)
    assert found["status"] == "failed" and "torch failed: RuntimeError: off by 1" in found["why"]
    assert set(found["arms"]) == {"repaired"} and found["arms"]["repaired"]["both"]["how"] == "clock"
    assert "triton" in found["not_run"] and found["label"] == problems.LABEL


def test_tuning_without_a_file_is_a_failure(tmp_path):
    with pytest.raises(RuntimeError, match="exit code 0 and left no file"):
        tune.kept(tmp_path, 0)
    record.write_text(tmp_path / record.TUNED / "A_Card.json", "{}")
    assert tune.kept(tmp_path, 0) == {"files": ["tuned/A_Card.json"]}
    with pytest.raises(RuntimeError, match=r"exit code 2$"):
        tune.kept(tmp_path, 2)


def test_only_what_comes_after_tuning_runs_by_it():
    names = [step.name for step in plan.STEPS]
    assert [step.name for step in plan.STEPS if step.tuned] == names[names.index("tune") :]


def test_curves_that_part_are_told(tmp_path):
    torch_losses = [1.0 / (step + 1) for step in range(60)]

    def compare(triton: list[float]) -> dict:
        done = {"torch": {"losses": torch_losses}, "triton": {"losses": triton}}
        return curve.same_curve(make_place(tmp_path, done=done))

    assert compare([loss * 1.0005 for loss in torch_losses])["windows"] < 1e-3
    wrong = [torch_losses, *([] for _ in range(2))]
    wrong[1] = [torch_losses[0], torch_losses[1] * 1.01, *torch_losses[2:]]  # at the beginning
    wrong[2] = [loss * (1.2 if step > 40 else 1.0) for step, loss in enumerate(torch_losses)]  # later
    for losses in (*wrong[1:], [math.nan] * 60, [*torch_losses[:30], *[math.nan] * 30]):
        with pytest.raises(RuntimeError, match="torch and triton part"):
            compare(losses)
    with pytest.raises(problems.Skip, match="there is none"):
        curve.same_curve(make_place(tmp_path))


def test_what_lies_behind_the_encoders_learns_alike_by_every_path():
    torch_losses, published = (curve.train_parts(torch.device("cpu"), path, 4, 2, 5) for path in ("torch", "reference"))
    assert curve.apart(torch_losses, published)["first"] < 1e-4 and len(set(torch_losses)) == 4


def test_the_sanitizer_is_read():
    assert sanitizer.judge(0, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n") == {
        "summary": "ERROR SUMMARY: 0 errors"
    }
    with pytest.raises(RuntimeError, match=r"Invalid __global__ read.*ERROR SUMMARY: 1 error"):
        sanitizer.judge(86, "========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 1 error\n")
    with pytest.raises(problems.Skip, match="cannot work here"):
        sanitizer.judge(1, "========= Error: Device not supported\n")


def test_a_file_of_tests_is_read_and_failures_behind_an_illegal_access_are_tried_alone(tmp_path, monkeypatch):
    outputs = {
        "tests/x.py": "tests/x.py::a PASSED [1%]\ntests/x.py::b FAILED\ntests/x.py::c FAILED\nillegal memory access",
        "tests/x.py::c": "tests/x.py::c PASSED [100%]",
        "tests/y.py": "E   ModuleNotFoundError: No module named 'open_clip'",
        "tests/z.py": "tests/z.py::a[x y] SKIPPED (no)\nSKIPPED [1] tests/z.py:3: needs a CUDA device\n",
    }
    codes = {"tests/x.py": 1, "tests/y.py": 2}
    monkeypatch.setattr(
        test_step, "pytest", lambda place, arguments: (outputs[arguments[0]], codes.get(arguments[0], 0))
    )
    place = make_place(tmp_path)
    found = test_step.run_file(place, "tests/x.py", [])
    assert (found["status"], found["why"]) == ("failed", "1 of 3 failed: tests/x.py::b")
    assert found["tests"] == {"failed": 1, "passed": 2}
    with pytest.raises(problems.Skip, match="open_clip is missing"):
        test_step.run_file(place, "tests/y.py", [])
    with pytest.raises(problems.Skip, match="needs a CUDA device"):
        test_step.run_file(place, "tests/z.py", [])
    assert test_step.run_file(make_place(tmp_path, end=0.0), "tests/x.py", [])["status"] == "cut"
    in_parts = "tests/x.py::a \n[gw1] [ 50%] PASSED tests/x.py::a[b c] \n[gw0] [100%] FAILED tests/x.py::d \n"
    assert test_step.outcomes(in_parts) == {"tests/x.py::a[b c]": "PASSED", "tests/x.py::d": "FAILED"}


def test_tests_that_hang_are_ended(tmp_path, monkeypatch):
    (tmp_path / "pytest.py").write_text("import time; print('tests/x.py::a PASSED', flush=True); time.sleep(60)")
    monkeypatch.setattr(record, "TOP", tmp_path)
    monkeypatch.setattr(test_step, "SILENCE", 1.0)
    found = test_step.run_file(make_place(tmp_path), "tests/x.py", [])
    assert found["status"] == "failed" and "no test ended within 1 s" in found["why"]
    found = test_step.run_file(make_place(tmp_path, end=time.monotonic() + 0.5), "tests/x.py", [])
    assert found["status"] == "cut" and found["tests"] in ({}, {"passed": 1})


def test_every_file_with_a_test_for_gpus_is_run_on_one(tmp_path):
    keys = [key for key, _ in test_step.items(make_place(tmp_path, device=torch.device("cuda")))]
    for file in ("tests/models/test_paths.py -m gpu", "tests/training/test_loop.py -m gpu", test_step.CONTRACT):
        assert file in keys
    assert keys[0].startswith("tests/kernels/")


def test_a_trace_is_summed_up_by_kernel(tmp_path):
    events = [{"cat": "kernel", "name": "gemm", "dur": 3000}] * 4 + [{"cat": "gpu_memcpy", "name": "copy", "dur": 500}]
    events += [{"cat": "user_annotation", "name": "forward", "dur": 9000}, {"name": "no category"}]
    with gzip.open(tmp_path / profile.FILE, "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = profile.summed_up(tmp_path / profile.FILE)
    assert found["kernels"][0] == {"name": "gemm", "ms": 6.0, "count": 2.0} and found["kernels_ms"] == 6.25
    assert found["ranges"] == [{"name": "forward", "ms": 4.5, "count": 0.5}]


def content(mark: dict, **steps: dict) -> dict:
    entries = {
        name: {"status": "ok", "why": "", "seconds": 1.0, "items": items, "left_out": []}
        for name, items in steps.items()
    }
    return {"fingerprint": {**mark, "source": "s"}, "begun": "b", "updated": "u", "steps": entries}


def test_the_summary_holds_the_goals_to_what_was_measured():
    timing = {"spread": 0.0, "rounds": 5, "how": "graph"}
    arms = {name: {"both": {"seconds": s, **timing}} for name, s in (("repaired", 13e-6), ("triton", 1e-6))}
    compiled = {"arms": {"max_autotune": {"both": {"seconds": 5e-6, **timing}}}}
    operators = {"similarity_loss bfloat16 B=16": {"status": "ok", "arms": arms}}
    operators["similarity_loss bfloat16 B=16 compiled"] = {"status": "ok", **compiled}
    peak = {"train_step B=64 fastris, recompute=stages": {"status": "ok", "peak_bytes": 11e9, "arm": "x"}}
    text = summary.markdown(content(GPU, kernels=operators, training=peak)).replace("|   |", "| |")
    assert "# The first hour on A Card" in text
    assert "| similarity head + loss | repaired | 12x | 13.00x | reached |" in text
    assert "| similarity head + loss | max-autotune | 6x | 5.00x | **missed** |" in text
    assert "| decoder | repaired | 2x | not measured | |" in text
    assert "B=64, recompute=stages | | <= 12 GB | 11.0 GB | reached |" in text
    assert "| curve: real training steps" in text and "not reached" in text


def test_the_summary_of_a_cpu_names_no_goal_and_says_what_it_is():
    text = summary.markdown(content(CPU, device={"machine": {"status": "failed", "why": "no"}}))
    assert text.startswith("# A rehearsal on a CPU") and "nothing here says anything about a GPU" in text
    assert "## Goals" not in text and "device, machine: **failed**: no" in text


BLOCKED = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"open_clip", "pycocotools", "ftfy", "pytest", "xdist"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "complete",
    [
        pytest.param(True, id="complete", marks=pytest.mark.long),
        pytest.param(False, id="without open_clip and pytest"),
    ],
)
def test_all_steps_end_on_a_cpu_within_their_time(complete, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("" if complete else BLOCKED)
    out = tmp_path / "out"
    names = [step.name for step in plan.STEPS if complete or step.name in ("tests", "training", "profile", "curve")]
    minutes = 0.19 * len(names)
    options = [f"out={out}", f"minutes={minutes}", "device=cpu", f"steps={','.join(names)}"]
    command = [sys.executable, "-m", "bench.gpu_hour", *options]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 60 * minutes + 60
    assert {path.name for path in out.iterdir()} <= {record.RESULTS, record.LOG, record.SUMMARY, profile.FILE}
    content = json.loads((out / record.RESULTS).read_text())
    assert list(content["steps"]) == names
    assert {step["status"] for step in content["steps"].values()} <= {"ok", "cut", "skipped"}
    for name in {"kernels", "training"} & set(names):
        for item in content["steps"][name]["items"].values():
            assert item["status"] != "ok" or item["label"] == problems.LABEL
    assert (out / record.SUMMARY).read_text() in done.stdout
    if not complete:
        assert "No module named 'open_clip'" in (out / record.SUMMARY).read_text()
