"""The first hour on a GPU: what a step found is on disk whatever ends it, and a second start goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastris.bench import gpu_hour
from fastris.bench.hour import (
    boxed,
    profile,
    record,
    runner,
    summary,
)
from fastris.bench.hour.plan import Step

ROOT = Path(__file__).parents[2]
CPU = {"python": "3.12", "torch": "2.11.0", "cuda": None, "type": "cpu", "triton": "3.6.0", "driver": None}

WORKER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
step, out = sys.argv[1], Path(sys.argv[2])
path = out / "now.json"
page = json.loads(path.read_text())
with (out / "calls.txt").open("a") as calls:
    calls.write(step + "\\n")

def write():
    path.with_suffix(".part").write_text(json.dumps(page))
    os.replace(path.with_suffix(".part"), path)

def item(key, work=lambda: None):
    if key in page["items"]:
        return
    page.update(item=key, since=time.time())
    write()
    work()
    page["items"][key] = {"status": "ok"}
    page.update(item=None, since=None)
    write()

def hang():
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    (out / "child.txt").write_text(str(child.pid))
    time.sleep(1000)

print("output of", step, flush=True)
item("a")
item("b", {"crash": os.abort, "hang": hang, "interrupt": lambda: (os.kill(os.getppid(), signal.SIGINT), hang()),
           "die": lambda: None}.get(step, lambda: None))
if step == "die":
    sys.exit(3)
item("c")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The command with steps of a tiny worker without PyTorch: ``hour("crash", "fine")`` does those two."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    out = tmp_path / "out"
    hour = SimpleNamespace(out=out, probe=CPU, patience=60.0, source="1")

    def worker(step: Step, folder: Path, device: str, until: float) -> list[str]:
        return [sys.executable, "-S", str(script), step.name, str(folder)]

    def do(*names: str, minutes: float = 1.0, again: tuple[str, ...] = ()) -> int:
        steps = tuple(Step(name, f"title of {name}", 1.0, hour.patience) for name in names)
        monkeypatch.setattr(runner, "STEPS", steps)
        monkeypatch.setattr(summary, "STEPS", steps)
        return runner.run(out, minutes, "auto", (), again)

    monkeypatch.setattr(runner, "worker", worker)
    monkeypatch.setattr(record, "probe", lambda device: hour.probe)
    monkeypatch.setattr(record, "source_digest", lambda folders: hour.source)
    hour.do = do
    hour.steps = lambda: json.loads((out / "results.json").read_text())["steps"]
    hour.calls = lambda: (out / "calls.txt").read_text().split()
    return hour


def statuses(step: dict) -> dict[str, str]:
    return {key: item["status"] for key, item in step["items"].items()}


def test_a_second_start_goes_on_with_what_is_not_finished(fake, capsys):
    assert fake.do("fine") == 0
    assert fake.do("fine", "other") == 0
    assert fake.calls() == ["fine", "other"]
    assert "finished before (ok)" in capsys.readouterr().out
    assert fake.do("fine", "other", again=("fine",)) == 0
    assert fake.calls() == ["fine", "other", "fine"]
    assert fake.steps()["fine"]["tail"] == "output of fine\n"
    assert not (fake.out / record.NOW).exists()


@pytest.mark.parametrize("change", ["source", "version"])
def test_finished_steps_are_done_anew_when_code_or_versions_changed_and_the_old_ones_are_kept(fake, change):
    fake.do("fine")
    old = json.loads((fake.out / record.RESULTS).read_text())
    if change == "source":
        fake.source = "2"
    else:
        fake.probe = {**CPU, "torch": "2.12.0"}
    fake.do("fine")
    assert fake.calls() == ["fine", "fine"]
    assert json.loads((fake.out / record.OLD).read_text()) == old


def test_new_tests_leave_measurements_as_they_are(fake, monkeypatch):
    fake.do("fine", "tests")
    monkeypatch.setattr(record, "source_digest", lambda folders: "2" if folders == ("tests",) else "1")
    fake.do("fine", "tests")
    assert fake.calls() == ["fine", "tests", "tests"]


def test_a_full_time_box_keeps_what_was_measured_and_leaves_nothing_running(fake):
    assert fake.do("hang", "fine", minutes=0.05) == 0
    step = fake.steps()["hang"]
    assert (step["status"], statuses(step), step["left_out"]) == ("cut", {"a": "ok"}, ["b"])
    assert "1 of its measurements on disk; under way: b" in step["why"]
    assert fake.steps()["fine"]["status"] == "ok"
    assert has_gone(int((fake.out / "child.txt").read_text()))
    fake.do("hang", "fine", minutes=0.02)
    assert fake.calls() == ["hang", "fine", "hang"]  # what was cut is gone on with


def has_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_crash_costs_one_measurement_and_no_other_step(fake):
    assert fake.do("crash", "fine") == 1
    step = fake.steps()["crash"]
    assert (step["status"], statuses(step)) == ("failed", {"a": "ok", "b": "failed", "c": "ok"})
    assert step["items"]["b"]["why"] == "ended its process (signal SIGABRT)"
    assert fake.calls() == ["crash", "crash", "fine"]
    assert fake.steps()["fine"]["status"] == "ok"


def test_a_measurement_that_hangs_is_ended_and_the_next_one_begins(fake):
    fake.patience = 1.0
    assert fake.do("hang") == 1
    step = fake.steps()["hang"]
    assert statuses(step) == {"a": "ok", "b": "failed", "c": "ok"} and "hung" in step["items"]["b"]["why"]
    assert has_gone(int((fake.out / "child.txt").read_text()))


def test_a_process_that_dies_between_measurements_is_told_with_its_output(fake):
    assert fake.do("die", "fine") == 1
    step = fake.steps()["die"]
    assert step["status"] == "failed" and "exit code 3" in step["why"] and step["tail"] == "output of die\n"
    assert fake.calls() == ["die", "fine"]


def test_ctrl_c_keeps_what_was_written_and_says_how_to_go_on(fake, capsys):
    assert fake.do("fine", "interrupt", "other") == 130
    assert "The same command goes on from there" in capsys.readouterr().out
    assert {name: step["status"] for name, step in fake.steps().items()} == {"fine": "ok", "interrupt": "cut"}
    assert statuses(fake.steps()["interrupt"]) == {"a": "ok"}
    assert has_gone(int((fake.out / "child.txt").read_text()))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_a_killed_start_had_measured_is_taken_up(fake):
    fake.do("fine")
    mark = json.loads((fake.out / record.RESULTS).read_text())["fingerprint"]
    page = {"step": "other", "fingerprint": mark, "items": {"a": {"status": "ok", "mine": 1}}, "item": "b"}
    record.write_json(fake.out / record.NOW, {**page, "since": 0.0, "left_out": [], "skipped": ""})
    fake.do("fine", "other")
    assert fake.steps()["other"]["items"]["a"] == {"status": "ok", "mine": 1}
    assert statuses(fake.steps()["other"]) == {"a": "ok", "b": "ok", "c": "ok"}


def test_a_step_to_be_done_anew_takes_nothing_up(fake):
    fake.do("fine")
    mark = json.loads((fake.out / record.RESULTS).read_text())["fingerprint"]
    page = {"step": "fine", "fingerprint": mark, "items": {"a": {"status": "ok", "mine": 1}}, "item": "b"}
    record.write_json(fake.out / record.NOW, {**page, "since": 0.0, "left_out": [], "skipped": ""})
    fake.do("fine", again=("fine",))
    assert fake.steps()["fine"]["items"]["a"] == {"status": "ok"}


@pytest.mark.parametrize("begun", [False, True])
def test_whatever_moment_ends_the_run_the_measurements_are_in_a_file(fake, monkeypatch, begun):
    """As by the power, when the page of the step under way goes: results.json must have it by then."""
    kept, unlink = [], Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        if path.name == record.NOW and path.exists():
            kept.append({name: statuses(step) for name, step in fake.steps().items()})
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    fake.do("interrupt" if begun else "fine")
    assert kept == [{"interrupt": {"a": "ok"}} if begun else {"fine": {"a": "ok", "b": "ok", "c": "ok"}}]


def test_ctrl_c_pressed_twice_loses_nothing(fake, monkeypatch, capsys):
    keep = runner._Hour._keep

    def impatient(*arguments) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        keep(*arguments)

    monkeypatch.setattr(runner._Hour, "_keep", impatient)
    assert fake.do("interrupt") == 130
    assert statuses(fake.steps()["interrupt"]) == {"a": "ok"}
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_ctrl_c_before_the_first_step_is_told_without_a_traceback(fake, monkeypatch, capsys):
    def interrupted(device):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "probe", interrupted)
    assert fake.do("fine") == 130
    assert "stopped before the first step" in capsys.readouterr().out


def test_output_without_end_keeps_its_beginning_and_its_end(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(b"before\n" + b"first" + b"x" * 2 * runner.LOG_BYTES + b"last")
    tail = runner._shortened(log, len(b"before\n"))
    content = log.read_bytes()
    assert len(content) < 1.1 * runner.LOG_BYTES and content.startswith(b"before\nfirst") and content.endswith(b"last")
    assert len(tail) == runner.TAIL and tail.endswith("last")


def test_the_folder_holds_at_most_eight_files():
    names = {
        record.RESULTS,
        record.OLD,
        record.LOG,
        record.NOW,
        record.SUMMARY,
        profile.FILE,
        f"{record.TUNED}/GPU.json",
    }
    assert len(names) <= 8
    assert all(name in (record.__doc__ or "") for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "out"),
        (["out=FOLDER", "minutes=0"], "minutes must lie above 0"),
        (["out=FOLDER", "minutes=nan"], "minutes"),
        (["out=FOLDER", "steps=kernel"], "steps=kernel is no step; the steps are device, tests"),
        (["out=FOLDER", "again=all"], "again=all is no step"),
        (["out=FOLDER", "minute=3"], "minute"),
        (["out=FILE"], "FILE"),
        (["out=FILE/below"], "FILE"),
        (["out=FOREIGN"], "was not written by this command; choose another folder"),
        (["out=HALF"], "was not written by this command; choose another folder"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "probe", lambda device: CPU)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "FOREIGN").mkdir()
    (tmp_path / "FOREIGN" / record.RESULTS).write_text("[]")
    (tmp_path / "HALF").mkdir()
    (tmp_path / "HALF" / record.RESULTS).write_text('{"format": 1}')
    assert gpu_hour.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_help_comes_without_pytorch():
    code = "import sys; from bench.gpu_hour import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "minutes" in done.stdout


def test_whatever_a_process_started_is_known(tmp_path):
    code = "import subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-S", "-c", code])
    try:
        for _ in range(200):
            if boxed.descendants(process.pid):
                break
            time.sleep(0.05)
        (child,) = boxed.descendants(process.pid)
        assert child in boxed.descendants(os.getpid())
    finally:
        boxed._ended(process, "")
    assert has_gone(child)
