"""The command line as a user meets it: help, mistakes told in one line, exit codes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended_gpu import pretended_gpu

import fastris
from fastris.commands import cli, doctor
from fastris.operators import OPERATORS
from fastris.options.declare import option
from fastris.preflight import verdicts
from fastris.testing import WrongNumber

ROOT = Path(__file__).parents[2]


def run(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(args)
    return code, *capsys.readouterr()


def subprocess_run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, **kwargs)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A command `bake` whose function is `bake.function`."""

    @dataclass
    class BakeConfig:
        """Bakes a cake."""

        minutes: float = option(12.5, "time in the oven", "min")

    bake = SimpleNamespace(
        BakeConfig=BakeConfig, function=lambda config: None, run=lambda config: bake.function(config)
    )
    monkeypatch.setitem(sys.modules, "fastris.bake", bake)
    monkeypatch.setitem(cli.COMMANDS, "bake", cli.Command("fastris.bake", "BakeConfig", "bake a cake"))
    monkeypatch.delenv("FASTRIS_DEBUG", raising=False)
    return bake


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, errors = run(args, capsys)
    assert (code, errors) == (0, "")
    for name in ("demo", "train", "eval", "predict", "data", "convert", "tune", "doctor"):
        assert f"\n  {name} " in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], capsys) == (0, f"fastris {fastris.__version__}\n", "")


def test_an_unknown_command_lists_the_closest_first(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, errors = run(["trian"], capsys)
    assert (code, printed) == (2, "")
    assert "unknown command 'trian'; did you mean train? Commands: train, demo, eval" in errors
    assert "did you mean" not in run(["xyz"], capsys)[2]


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_exists_and_describes_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    entry = cli.COMMANDS[name]
    assert callable(getattr(importlib.import_module(entry.module), entry.function))
    code, printed, errors = run([name, "--help"], capsys)
    assert (code, errors) == (0, "")
    assert printed.startswith(f"usage: fastris {name} ")
    assert "options:" in printed
    assert f"{entry.config}(" not in printed, "the config class lacks a docstring"


def test_options_reach_the_command_and_its_result_is_the_exit_code(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    command.function = lambda config: seen.append(config.minutes) or 3
    assert run(["bake", "minutes=20"], capsys)[0] == 3
    command.function = lambda config: seen.append(config.minutes)
    assert run(["bake"], capsys)[0] == 0
    assert seen == [20.0, 12.5]


def test_help_tells_type_unit_and_default(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(["bake", "minutes=oops", "--help"], capsys)[1]
    assert "Bakes a cake." in printed
    assert "minutes  float  12.5  time in the oven [min]" in printed


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("the oven is cold"), "the oven is cold"),
        (RuntimeError("no power"), "no power"),
        (OSError(28, "No space left on device", "cake.png"), "cake.png: No space left on device"),
        (FileNotFoundError("no file cake.yaml; give one"), "no file cake.yaml; give one"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    error: Exception, line: str, command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: Any) -> None:
        raise error

    command.function = fail
    assert run(["bake"], capsys) == (2, "", f"fastris bake: {line}\n")


def test_a_wrong_option_is_one_line_and_exit_code_2(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bake", "minutes=soon"], capsys) == (
        2,
        "",
        "fastris bake: minutes must be float (min), got 'soon'\n",
    )


def test_debug_shows_the_traceback(command: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRIS_DEBUG", "1")
    with pytest.raises(ValueError, match="minutes"):
        cli.main(["bake", "minutes=soon"])


@pytest.mark.parametrize("bug", [TypeError, KeyError, IndexError, AttributeError, NotImplementedError, RecursionError])
def test_a_bug_keeps_its_traceback(bug: type[Exception], command: SimpleNamespace) -> None:
    def fail(config: Any) -> None:
        raise bug("bug")

    command.function = fail
    with pytest.raises(bug):
        cli.main(["bake"])


def test_ctrl_c_is_one_line_and_exit_code_130(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: Any) -> None:
        raise KeyboardInterrupt

    command.function = fail
    assert run(["bake"], capsys) == (130, "", "fastris bake: stopped\n")


def test_warnings_are_one_line_each_and_the_users_settings_return(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    show = warnings.showwarning
    command.function = lambda config: warnings.warn("a little burnt", stacklevel=1)
    code, printed, errors = run(["bake"], capsys)
    assert (code, printed, errors) == (0, "", "fastris bake: warning: a little burnt\n")
    assert warnings.showwarning is show


def test_only_the_chosen_commands_module_is_imported() -> None:
    program = (
        "import sys; from fastris.commands.cli import main; main(['--help'])\n"
        "assert not {'torch', 'cv2', 'open_clip', 'fastris.training.loop', 'fastris.inference'} & set(sys.modules)"
    )
    assert subprocess_run([sys.executable, "-c", program]).stderr == ""


HEAVY = {"torch", "torchvision", "triton", "cv2", "PIL", "open_clip", "huggingface_hub", "safetensors", "rich"}
MISTAKES = {  # command -> wrong values, each with what the message says
    "demo": [(["steps=soon"], "steps must be int (steps), got 'soon'"), (["lr=inf"], "lr=inf must be a finite number")],
    "eval": [
        ([], "model=... is missing"),
        (["model=a", "sentences=some"], "sentences must be all|first, got 'some'"),
        (["model=a", "rule=lavvt"], "rule='lavvt' is unknown; choose one of cris, lavt"),
        (["model=a", "dataset=refcocoo"], "dataset='refcocoo' is unknown; choose one of synthetic, refcoco"),
        (["model=a", "dataset=synthetic", "images=b"], "dataset=synthetic reads no files, so images must be left out"),
        (["model=a", "images_per_batch=0"], "images_per_batch=0 must be at least 1"),
    ],
    "predict": [
        (["a.png", "red", "model=a", "threshold=half"], "threshold must be float (probability, 0..1), got 'half'"),
        (["a.png", "red", "model=a", "threshold=2"], "threshold must lie in 0..1 (a probability), got 2"),
        (["a.png", " ", "model=a"], "phrases[0] is ' ', which names nothing"),
    ],
    "app": [
        (["port=70000"], "port=70000 must lie in 0..65535"),
        (["threshold=2"], "threshold must lie in 0..1 (a probability), got 2"),
        (["upload_mb=0"], "upload_mb=0 must be a finite number above 0"),
    ],
    "data": [(["lok", "."], "action must be inspect|check|convert, got 'lok'")],
    "train": [
        (["base_lrr=3"], "unknown option base_lrr; did you mean base_lr"),
        (["base_lr=fast"], "base_lr must be float, got 'fast'"),
        (["base_lr=-1"], "base_lr=-1.0 must be at least 0"),
        (["val_rule=lavvt"], "rule='lavvt' is unknown; choose one of cris, lavt"),
        (["dataset=refcocoo"], "dataset='refcocoo' is unknown; choose one of synthetic, refcoco"),
        (["gpu=10gb"], "gpu='10gb' is unknown; choose one of 8gb"),
        (["gpu=8gb", "batch_size=67"], "batch_size=67 does not split into equal parts of 2 to 16 references"),
        (["numlayers=2"], "unknown option numlayers"),
    ],
    "push": [
        (["repo=a/b"], "model=... is missing"),
        (["model=a"], "repo=... is missing"),
        (["model=a", "repo=b"], "repo=b must be USER/NAME"),
        (
            ["model=a", "repo=a/b", "license=MIT"],
            "license=MIT is none of the hub's that fastris knows; did you mean mit?",
        ),
        (["model=a", "repo=a/b", "licence=other"], "license=other needs license_name=my-licence and license_link=URL"),
        (["model=a", "repo=a/b", "licence_name=x"], "license=other needs license_name=my-licence and license_link=URL"),
        (["model=a", "repo=a/b", "license=mit"], "model=a does not exist; give the folder that save_pretrained"),
    ],
    "export": [(["format=tflite"], "format must be onnx|torch, got 'tflite'")],
    "convert": [(["a", "b", "to=x"], "to must be auto|pth|safetensors|folder, got 'x'")],
    "bench": [
        (["dtype=int8"], "dtype must be float32|bfloat16|float16, got 'int8'"),
        (["passes=sideways"], "passes must be list of forward|backward|both, got 'sideways'"),
    ],
    "tune": [
        (["minutes=soon"], "minutes must be float (min), got 'soon'"),
        (["minutes=0"], "minutes=0.0 must be more than 0"),
    ],
    "doctor": [(["json=soon"], "json must be true|false, got 'soon'")],
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_help_and_mistakes_are_answered_without_a_heavy_import(name: str, tmp_path: Path) -> None:
    asked = [["--help"], ["--hlep"], ["--zzz=1"], *(args for args, _ in MISTAKES[name])]
    program = (
        "import sys; from fastris.commands.cli import main\n"
        f"codes = [main([{name!r}, *args]) for args in {asked!r}]\n"
        f"print(codes, sorted({HEAVY!r} & set(sys.modules)))"
    )
    found = subprocess_run([sys.executable, "-c", program], cwd=tmp_path)
    assert found.stdout.startswith(f"usage: fastris {name} ")
    assert found.stdout.splitlines()[-1] == f"{[0] + [2] * (len(asked) - 1)} []"
    first, second, *errors = found.stderr.splitlines()
    assert first.startswith(f"fastris {name}: unknown option --hlep") and "unknown option --zzz" in second
    for error, (_, message) in zip(errors, MISTAKES[name], strict=True):
        assert error.startswith(f"fastris {name}: ") and message in error


def test_a_real_process_says_its_mistake_and_exits_with_2(tmp_path: Path) -> None:
    found = subprocess_run([sys.executable, "-m", "fastris", "doctor", "jsn=true"], cwd=tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "fastris doctor: unknown option jsn; did you mean json?\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = (
        "import sys, os; from fastris.commands import cli\n"
        "sys.stdin.read()\n"  # the reader's end is closed by now
        "sys.exit(cli.main(['doctor', '--help']))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen([sys.executable, "-c", program], env=env, text=True, **pipe) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_output_closed_before_the_start_is_no_error_and_no_file_takes_its_place(closed: str) -> None:
    look = "import os, sys; from fastris.commands import cli; code = cli.main(['--help'])"
    program = f"{look}; sys.exit(code or os.readlink('/proc/self/fd/1') != os.devnull)"
    found = subprocess_run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program])
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_is_full_is_one_line() -> None:
    found = subprocess_run(["sh", "-c", 'exec "$0" -m fastris --help > /dev/full', sys.executable])
    assert found.returncode == 2
    assert found.stderr == "fastris: cannot write the output: No space left on device; send it elsewhere\n"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_whose_reader_leaves_ends_with_141(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*args: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=gone, flush=gone, fileno=lambda: os.open(os.devnull, 1)))
    monkeypatch.setattr(os, "dup2", lambda *args: None)
    assert cli.main([name, "--help"]) == 141
    assert capsys.readouterr().err == ""


def test_what_an_error_quotes_cannot_steer_the_terminal(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: Any) -> None:
        warnings.warn("no \x1b[31mred", stacklevel=1)
        raise ValueError("no file a\x1b[2J\nfastris: all is well\udcff.png")

    command.function = fail
    assert run(["bake"], capsys) == (
        2,
        "",
        "fastris bake: warning: no \\x1b[31mred\nfastris bake: no file a\\x1b[2J\\nfastris: all is well\\udcff.png\n",
    )


def test_output_of_a_narrow_encoding_comes_escaped() -> None:
    program = "from fastris.commands import cli; cli._overview = lambda: 'caf\u00e9 \\udcff'; cli.main([])"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=60)
    assert (found.stdout, found.stderr) == ("caf\\xe9 \\udcff\n", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["demo", "steps=1e99"], "steps must be int (steps), got '1e99'; the largest that fits is 9223372036854775807"),
        (["demo", f"seed={10**30}"], "seed must be int, got"),
        (["demo", "seed=-1e99"], "seed must be int, got"),
        (["demo", "steps=inf"], "steps must be int (steps), got 'inf'"),
        (["demo", "lr=nan"], "lr must be float, got 'nan'"),
        (["demo", "lr=inf"], "lr=inf must be a finite number above 0"),
        (["demo", "threads=0"], "threads=0 must lie in 1..1024"),
        (["demo", f"threads={10**12}"], "must lie in 1..1024"),
        (["train", "epochs=1e99"], "epochs must be int (epochs)"),
    ],
)
def test_numbers_out_of_all_range_are_one_line(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, errors = run(args, capsys)
    assert (code, printed, errors.count("\n")) == (2, "", 1)
    assert message in errors and not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"images_per_batch": 0}, {"workers": -1}])
def test_evaluation_in_batches_of_nothing_is_refused(setting: dict[str, int]) -> None:
    from fastris.evaluation.evaluate import evaluate

    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name}=.* must be at least"):
        evaluate(None, SimpleNamespace(name="synthetic", split="val"), **setting)  # before it touches either


def test_doctor_reports_versions_devices_and_the_path_of_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(["doctor", "--json"], capsys)
    found = json.loads(printed)
    assert code == 0
    assert found["versions"]["fastris"] == fastris.__version__
    assert {"python", "system", "torch", "open_clip", "numpy"} <= set(found["versions"])
    assert "triton" in found["optional"] and "cores" in found["devices"]["cpu"]
    for operator in ("text_to_pixel_similarity", "cross_attention", "upsample2x_conv3x3"):
        path, reason = found["operators"]["cpu"][operator].split(": ", 1)
        assert path in ("reference", "torch", "triton") and reason
    page = run(["doctor"], capsys)[1]
    assert "operators on cpu\n" in page and fastris.__version__ in page


def test_doctor_proves_the_kernels_of_every_operator_on_every_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(operator: str, dtype: torch.dtype) -> None:
        if (operator, dtype) == ("cross_attention", torch.float16):
            raise WrongNumber("output 0: max error 1.0 exceeds 0.1")

    monkeypatch.setattr(doctor, "_devices", lambda: {"cpu": "1 core", "cuda:0": "a card"})
    monkeypatch.setattr(verdicts, "run_alone", lambda proof, device, dtype: proof(device, dtype))
    with pretended_gpu(failing) as proofs:
        found = json.loads(run(["doctor", "--json"], capsys)[1])
        page = run(["doctor"], capsys)[1]
    kernels = sum(bool(operator.kernels) for operator in OPERATORS.values())
    assert len(proofs.made) == len(set(proofs.made)) == 3 * kernels, "every operator in three dtypes, each once"
    kernels = found["kernels"]["cuda:0"]
    assert kernels["cross_attention, bfloat16"] == kernels["upsample2x_conv3x3, float16"] == "right"
    assert "numbers are wrong (output 0" in kernels["cross_attention, float16"]
    assert "kernels on cuda:0\n" in page and "numbers are wrong" in page
    assert found["operators"]["cuda:0"]["cross_attention"].startswith("triton")


def test_doctor_reports_what_is_broken_and_does_not_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_package.py").write_text("raise OSError('libcuda.so.1:\\n cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "OPTIONAL", {"broken_package": "broken", "no_such_package": "none"})

    def fail() -> dict[str, str]:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(doctor, "_devices", fail)
    code, printed, _ = run(["doctor"], capsys)
    assert code == 0
    assert "broken: OSError: libcuda.so.1: cannot open (pip install --force-reinstall broken)" in printed
    assert "not installed (pip install none)" in printed
    assert "broken  " in printed and "RuntimeError: driver too old" in printed
    assert "operators on cpu" in printed


@pytest.mark.slow
def test_doctor_tells_a_wrong_choice_of_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRIS_IMPL", "fastest")
    found = subprocess_run([sys.executable, "-m", "fastris", "doctor"])
    assert found.returncode == 0
    assert "FASTRIS_IMPL" in found.stdout and "fastest" in found.stdout
