"""The bench refuses wrong numbers, takes turns, hides nothing, and counts each kept byte once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastris.bench import measure as command
from fastris.bench.cases.arms import ARMS, choose_arms
from fastris.bench.cases.problem import Problem
from fastris.bench.cases.table import CASES, Case, choose_cases
from fastris.bench.counter import LiveStorages, saved_storages
from fastris.bench.memory import count_own
from fastris.bench.options import ARM_NAMES, Effort
from fastris.bench.report import results
from fastris.bench.report import tables as report
from fastris.bench.timing.check import Checker, WrongNumbersError
from fastris.bench.timing.harness import Cell, Setting, measure_case, order_of_round, take_turns
from fastris.commands import cli
from fastris.dispatch import requested_impl
from fastris.models import registry
from fastris.models.magnet import query_decoder
from fastris.runtime.float32_precision import float32_precision

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FEW_ROUNDS = Effort(rounds=3, min_rounds=3, seconds=0.0)


class Scaled(nn.Module):
    """Linear and ReLU; does to the output what `faults` says for the path that is asked for."""

    def __init__(self, faults):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.faults = faults

    def forward(self, x):
        output = self.linear(x).relu()
        fault = self.faults.get(requested_impl())
        return fault(output) if fault else output


def make_case(name="tiny", faults=None, composed=False, **fields):
    def build(batch):
        return Problem(Scaled(faults or {}), {"x": torch.randn(batch, 4)}, {})

    return Case(name, "tiny", "a tiny case", build, {"batch": 5}, {"batch": 2}, composed=composed, **fields)


def measure(case, dtype=torch.float32, effort=FEW_ROUNDS):
    cells: dict[str, Cell] = {}
    measure_case(case, [ARMS["reference"], ARMS["torch"]], Setting(CPU, dtype, effort), cells)
    return cells


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * 1.0001


def run_out_of_memory(output):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda output: output * 1.0001, "output 0"),
        (WrongGradient.apply, "gradient"),
        (lambda output: output / 0, "output 0 is not finite"),
        (lambda output: output[:-1], "output 0 is (4, 3), must be (5, 3)"),
    ],
)
def test_an_arm_that_is_wrong_is_refused_and_never_timed(fault, message, composed):
    cells = measure(make_case(faults={"torch": fault}, composed=composed))
    assert cells["torch"].status == "refused" and message in cells["torch"].message
    assert cells["torch"].ms == [] and cells["torch"].checked == {}
    assert cells["reference"].status == "measured" and len(cells["reference"].ms) == 3


def test_a_wrong_arm_is_refused_in_low_precision_too():
    cells = measure(make_case(faults={"torch": lambda output: output * 1.05}), torch.bfloat16)
    assert cells["torch"].status == "refused"


def test_an_arm_that_does_not_reach_a_parameter_is_refused():
    class Detaching(Scaled):
        def forward(self, x):
            weight = self.linear.weight.detach() if requested_impl() == "torch" else self.linear.weight
            return nn.functional.linear(x, weight, self.linear.bias)

    checker = Checker(Problem(Detaching({}), {"x": torch.randn(5, 4)}, {}), composed=False)
    checker.check(ARMS["reference"])
    with pytest.raises(WrongNumbersError, match=r"gradient of linear\.weight is missing"):
        checker.check(ARMS["torch"])


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (run_out_of_memory, "out of memory", "can't allocate memory"),
        (lambda output: output.no_such_method(), "failed", "AttributeError"),
    ],
)
def test_an_arm_that_fails_is_marked_and_spoils_no_other(fault, status, message):
    cells = measure(make_case(faults={"torch": fault}))
    assert cells["torch"].status == status and message in cells["torch"].message
    assert cells["reference"].status == "measured"
    cells = measure(make_case(faults={"reference": fault}))
    assert {cell.status for cell in cells.values()} == {status}  # nothing is left to compare with


def test_arms_are_checked_in_ieee_float32_and_timed_in_what_is_set():
    convolutions = []

    def watched(output):
        convolutions.append(float32_precision(torch.device("cuda"))["convolution"])
        return output

    backends: Any = torch.backends
    before, backends.cudnn.conv.fp32_precision = backends.cudnn.conv.fp32_precision, "tf32"
    try:
        cells = measure(make_case(faults={"torch": watched}))
    finally:
        backends.cudnn.conv.fp32_precision = before
    assert cells["torch"].status == "measured"
    assert convolutions[0] == "ieee" and convolutions[-1] == "tf32"
    assert convolutions == sorted(convolutions), "a check ran in TF32, or a timed step did not"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_numbers_are_timed_every_round_and_leave_no_gradients(dtype):
    cells = measure(make_case(), dtype)
    for cell in cells.values():
        assert cell.status == "measured" and len(cell.ms) == 3 and min(cell.ms) > 0 and cell.repeats >= 1
        assert cell.checked["tensors"] == 4  # the output, and the gradients of x, weight and bias
    problem = make_case().problem()
    problem.step()
    assert all(leaf.grad is None for leaf in problem.leaves().values())


def test_arms_take_turns_and_each_round_begins_with_another():
    assert [order_of_round(["a", "b", "c"], n) for n in range(3)] == [list("abc"), list("bca"), list("cab")]
    calls = []
    cells = {name: Cell(name, repeats=2) for name in "ab"}
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    take_turns(steps, cells, Effort(rounds=2, min_rounds=2), lambda: None, lambda text: None)
    assert calls == list("aabb" + "bbaa")
    assert all(len(cell.ms) == 2 for cell in cells.values())


def test_rounds_end_with_the_time_but_not_before_the_least_number():
    cells = {"a": Cell("a")}
    take_turns({"a": lambda: None}, cells, Effort(50, 4, 0.0), lambda: None, lambda text: None)
    assert len(cells["a"].ms) == 4


def test_an_arm_that_fails_midway_leaves_the_rounds_and_keeps_what_it_has():
    calls = []

    def second_time_fails():
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError

    cells = {name: Cell(name) for name in "ab"}
    steps = {"a": second_time_fails, "b": lambda: None}
    take_turns(steps, cells, Effort(4, 4), lambda: None, lambda text: None)
    assert cells["a"].status == "out of memory" and len(cells["a"].ms) == 1 and len(calls) == 2
    assert cells["b"].status == "measured" and len(cells["b"].ms) == 4


def test_medians_ratios_and_verdicts():
    assert results.Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert results.Spread.of([7.0]) == (7.0, 7.0, 7.0)
    assert results.speedup([10.0, 30.0, 20.0], [5.0, 15.0]) == (2.0, 2.0, 2.0)  # round by round
    assert results.speedup([], [5.0]) is None
    assert results.verdict(results.Spread(2.0, 1.9, 2.1), 1.5) == "yes"
    assert results.verdict(results.Spread(2.0, 1.4, 2.1), 1.5) == "yes, within noise"
    assert results.verdict(results.Spread(1.4, 1.2, 1.6), 1.5) == "no, within noise"
    assert results.verdict(results.Spread(0.6, 0.6, 0.6), 0.5, at_most=True) == "no"
    assert results.verdict(results.Spread(0.5, 0.5, 0.5), 0.5, at_most=True) == "yes"


def every_case(long: tuple[str, ...]) -> list[Any]:
    """All cases; those that take many seconds even on a small copy are variations of their parts, marked as long."""
    assert set(long) <= {case.name for case in CASES}
    marks = (pytest.mark.slow, pytest.mark.long)
    return [pytest.param(case, id=case.name, marks=marks if case.name in long else ()) for case in CASES]


@pytest.mark.parametrize("case", every_case(long=("alignformer_step", "magnet_step")))
def test_every_case_passes_its_own_check_on_a_small_copy(case):
    problem = case.check_problem(quick=True)
    checker = Checker(problem, case.composed)
    for arm in ("reference", "repaired", "torch"):
        checked = checker.check(ARMS[arm])
        assert checked.tensors >= 1 and checked.error < 1e-2


@pytest.mark.parametrize("name", ["magnet_mask_decoder", "magnet_inference"])
def test_no_pixel_is_hidden_from_magnets_query_by_rounding(monkeypatch, name):
    margins = []
    original = query_decoder._Reduced.logits

    def watched(*arguments):
        logits = original(*arguments)
        margins.append(float(logits.abs().min() / logits.abs().max()))
        return logits

    monkeypatch.setattr(query_decoder._Reduced, "logits", watched)
    case = next(case for case in CASES if case.name == name)
    with ARMS["reference"].active(), torch.no_grad():
        case.check_problem(quick=True).to(CPU, torch.float64).forward()
    assert len(margins) == 3 and min(margins) > 100 * torch.finfo(torch.float32).eps, margins


def test_cases_have_names_of_their_own_and_numbers_that_do_not_depend_on_what_came_before():
    assert len({case.name for case in CASES}) == len(CASES)
    torch.manual_seed(1)
    first = CASES[0].problem(**CASES[0].small).inputs["features"]
    torch.manual_seed(2)
    torch.testing.assert_close(first, CASES[0].problem(**CASES[0].small).inputs["features"], rtol=0, atol=0)


def test_operators_and_cases_are_chosen_by_name_and_unknown_ones_list_the_rest():
    cases, memory = choose_cases(("upsample_conv", "decoder_dropout"))
    assert [case.name for case in cases] == ["upsample_conv_26", "upsample_conv_52", "decoder_dropout"] and not memory
    assert choose_cases(("memory",)) == ([], True)
    assert choose_cases(()) == (list(CASES), True)
    with pytest.raises(ValueError, match=r"no operator or case 'softmax'.*similarity_loss.*decoder.*memory"):
        choose_cases(("softmax",))


def test_unknown_arms_list_the_rest_and_impossible_ones_say_why():
    with pytest.raises(
        ValueError, match="no arm 'fast'; the arms are reference, repaired, compiled, max_autotune, torch, triton"
    ):
        choose_arms(("fast",), CPU, torch.float32)
    with pytest.raises(ValueError, match=r"arm triton cannot run: .*Here these can: reference, repaired, .*torch"):
        choose_arms(("triton",), CPU, torch.float64)
    assert [arm.name for arm in choose_arms(("torch",), CPU, torch.float32)] == ["reference", "torch"]


def test_a_saved_storage_is_counted_once_whole_and_without_parameters():
    linear = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with saved_storages(()):
        answer = x.exp()  # whose node keeps it
    kept = weakref.ref(answer)
    del answer
    assert kept() is None  # looking at it does not keep it
    with saved_storages(linear.parameters()) as first:
        hidden = linear(x)  # keeps x, and the weight, which is a parameter
        left = hidden.sigmoid()  # keeps its output
        (left[:2] * left[2:]).sum()  # keeps two views of that output
    assert sum(first.values()) == 2 * 4 * 8 * 4
    with saved_storages([x]) as second:
        x.exp().sum()  # keeps its output
        torch.ones(1000, dtype=torch.uint8)[:3].float().mul(x[0, :3]).sum()  # three floats, and a view of x
    assert sum(second.values()) == 4 * 8 * 4 + 3 * 4


def test_low_precision_copies_of_weights_are_counted_apart():
    linear = nn.Linear(8, 6)
    x = torch.randn(4, 8, requires_grad=True)
    with LiveStorages(linear.parameters(), [x]) as counter, torch.autocast("cpu", torch.bfloat16):
        output = linear(x).sum()
    kept = counter.kept()["rest"]
    assert kept.weight_copies == 8 * 6 * 2
    assert kept.activations == 4 * 8 * 2 + output.nbytes
    assert kept.total == kept.weight_copies + kept.activations


def test_memory_of_the_models_own_parts_is_smaller_on_the_torch_path(monkeypatch):
    monkeypatch.setattr("fastris.bench.memory.registry.preset", lambda name, preset=registry.preset: preset("tiny"))
    arms = [ARMS[name] for name in ("reference", "repaired", "torch")]  # repaired is not counted
    *_, found = count_own(arms, CPU, lambda text: None)
    assert list(found["arms"]) == ["reference", "torch"]
    assert all(list(cell["stages"]) == ["neck", "decoder", "projector + loss"] for cell in found["arms"].values())
    kept = {name: results.kept_bytes(cell) for name, cell in found["arms"].items()}
    assert 0 < kept["torch"] < kept["reference"]


def without_compiler(monkeypatch):
    """No compiled arms, and ceilings measured on small tensors: both take seconds."""
    monkeypatch.setattr("fastris.bench.cases.arms.shutil.which", lambda name: None)
    monkeypatch.setattr("fastris.bench.timing.roofline.COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr("fastris.bench.timing.roofline.MATRIX_SIDE", {"cpu": 64})


@pytest.fixture
def one_case(monkeypatch):
    """`fastris bench` with a table of one case, no compiler and small ceilings; gives what puts the case there."""
    without_compiler(monkeypatch)

    def install(case):
        monkeypatch.setattr(command, "choose_cases", lambda names: ([case], False))

    return install


def test_result_file_holds_every_timing_and_what_it_was_measured_on(tmp_path, one_case, capsys):
    one_case(make_case(goals={"cpu/float32": 1000.0}))
    path = tmp_path / "new" / "result.json"
    assert cli.main(["bench", "--device", "cpu", "--quick", "--rounds", "4", f"json={path}"]) == 0
    result = results.load(path)
    assert result["complete"] and result["settings"] == {
        "dtype": "float32", "quick": True, "rounds": 4, "min_rounds": 2, "seconds": 5.0
    }  # fmt: skip
    machine = result["machine"]
    assert machine["versions"]["torch"] == torch.__version__ and machine["threads"] == torch.get_num_threads()
    assert machine["float32"] == {"matmul": "ieee", "convolution": "ieee"}
    assert machine["device"]["type"] == "cpu" and machine["device"]["name"] and machine["date"][:2] == "20"
    assert set(machine["git"]) == {"revision", "dirty"} and "clocks" in machine
    assert result["command"] == ["fastris", "bench", "device=cpu", "quick=True", "rounds=4", f"json={path}"]
    (case,) = result["cases"]
    assert (
        case["sizes"] == {"batch": 5}
        and case["goal"] == 1000.0
        and list(case["arms"]) == ["reference", "repaired", "torch"]
    )
    assert all(len(cell["ms"]) == 4 for cell in case["arms"].values())
    printed = capsys.readouterr().out
    assert printed.startswith(report.markdown(result)) and "a tiny case" in printed and "1000x | no" in printed
    assert result["ceilings"]["copy_bytes_per_s"] > 0 and case["roofline"]["ms"] > 0
    assert all(0 < cell["share"] < 1.5 and cell["kept_bytes"] > 0 for cell in case["arms"].values())
    assert "share of roofline" in printed and case["headline"]["ours"] == "torch"


def test_ctrl_c_keeps_what_was_measured(tmp_path, one_case, capsys):
    calls = []

    def interrupt_later(output):
        calls.append(1)
        if len(calls) > 60:
            raise KeyboardInterrupt
        return output

    one_case(make_case(faults={"torch": interrupt_later}))
    path = tmp_path / "result.json"
    assert cli.main(["bench", "--device=cpu", "rounds=1000", f"json={path}"]) == 130
    result = results.load(path)
    assert not result["complete"] and result["cases"][0]["arms"]["reference"]["ms"]
    assert "Incomplete: stopped by Ctrl-C" in capsys.readouterr().out


def test_a_refused_arm_is_shown_and_fails_the_command(one_case, capsys):
    one_case(make_case(faults={"torch": lambda output: -output}, goals={"cpu/float32": 1.0}))
    assert cli.main(["bench", "--device=cpu", "--quick"]) == 1
    printed = capsys.readouterr().out
    assert "REFUSED: output 0: error" in printed and "| 1x   | no" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], "no operator or case 'softmax'"),
        (["--arms", "fast", "--device", "cpu"], "no arm 'fast'"),
        (["--device", "toaster"], "device='toaster' is unknown"),
        (["rounds=0"], "rounds must be at least 1, got 0"),
        (["--treads=2"], "did you mean threads"),
    ],
)
def test_wrong_calls_are_told_in_one_line(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_report_says_where_a_file_is_none_of_its_own(tmp_path, capsys):
    path = tmp_path / "result.json"
    for content, message in (("{", "is no JSON file"), (json.dumps({"format": 0}), "has format 0")):
        path.write_text(content)
        assert report.main([str(path)]) == 2
        assert message in capsys.readouterr().err
    assert report.main([str(tmp_path / "nowhere.json")]) == 2
    assert report.main([]) == 2


@pytest.mark.slow
def test_runs_as_a_module_from_a_checkout():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "operators or cases" in done.stdout


def test_options_name_the_arms_that_there_are():
    assert tuple(ARMS) == ARM_NAMES
