"""What the bench compares is what it says: arms, stages, passes, batches, counted work and traces."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_bench import CPU, FEW_ROUNDS, Scaled, every_case, make_case, without_compiler
from torch import nn

from fastris import reference
from fastris import testing as bounds
from fastris.bench import measure as command
from fastris.bench.cases.arms import ARMS, choose_arms, compiled_or_failed
from fastris.bench.cases.problem import Problem
from fastris.bench.cases.table import CASES
from fastris.bench.report.results import headline
from fastris.bench.report.tables import details
from fastris.bench.timing import roofline
from fastris.bench.timing.check import Checker
from fastris.bench.timing.harness import Cell, Setting, Step, kept_bytes, measure_case, timed
from fastris.bench.timing.tracing import write_trace
from fastris.commands import cli
from fastris.data.tokens import TOKENIZERS, TokenBatch
from fastris.dispatch import use_impl
from fastris.models import registry
from fastris.models.base import Pixels, ReferringModel
from fastris.models.config import ModelConfig
from fastris.models.inputs import Inputs

ROOT = Path(__file__).parents[2]
NAMED = {case.name: case for case in CASES}


def test_the_stages_of_the_model_each_have_a_case():
    stages = {"image_encoder", "text_encoder", "neck", "self_attention", "cross_attention", "feed_forward", "projector"}
    assert stages | {"loss", "train_step", "inference"} <= set(NAMED)


def test_repaired_attention_keeps_no_attention_maps():
    problem = NAMED["self_attention"].problem(batch=1, height=16, width=16, dim=32, heads=4)
    kept = {name: kept_bytes(Step(problem, ARMS[name])) for name in ("reference", "repaired")}
    maps = 4 * 256 * 256 * 4  # heads x pixels x pixels, float32
    assert kept["reference"] > maps > kept["repaired"] > 0
    with ARMS["reference"].active():
        assert nn.functional.multi_head_attention_forward.__module__ == "torch.nn.functional", "repaired for good"


def test_repaired_position_tables_are_computed_once(monkeypatch):
    built = []
    original = reference.sine_positions_2d
    monkeypatch.setattr(reference, "sine_positions_2d", lambda *size: built.append(size) or original(*size))
    problem = NAMED["decoder"].problem(**{**NAMED["decoder"].small, "height": 3, "width": 9})
    for name, expected in (("reference", 2), ("repaired", 1)):
        built.clear()
        with ARMS[name].active():
            problem.step()
            problem.step()
        assert len(built) == expected


def test_repaired_dropout_drops_as_often_as_published():
    case = NAMED["decoder_dropout"]
    problem = case.problem(**{**case.small, "layers": 1, "dropout": 0.5})
    spread = {}
    for name in ("reference", "repaired"):
        owner, runnable = ARMS[name].prepare(problem)
        with ARMS[name].active(), torch.no_grad():
            outputs = torch.stack([owner.forward(runnable)[0] for _ in range(60)])
        spread[name] = float(outputs.std(dim=0).mean())
    assert spread["repaired"] == pytest.approx(spread["reference"], rel=0.1)
    problem.module.eval()
    with ARMS["repaired"].active(), torch.no_grad():
        owner, runnable = ARMS["repaired"].prepare(problem)
        runnable.eval()
        torch.testing.assert_close(owner.forward(runnable), owner.forward(runnable), rtol=0, atol=0)


def test_without_a_compiler_compiled_arms_say_so_and_are_left_out(monkeypatch):
    monkeypatch.setattr("fastris.bench.cases.arms.shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert [arm.name for arm in choose_arms((), CPU, torch.float32)] == ["reference", "repaired", "torch"]
    with pytest.raises(ValueError, match=r"arm compiled cannot run: .*install g\+\+.*Here these can: reference, rep"):
        choose_arms(("compiled",), CPU, torch.float32)


def test_max_autotune_runs_on_a_cpu_only_when_asked_for(monkeypatch):
    monkeypatch.setattr("fastris.bench.cases.arms.shutil.which", lambda name: name)
    assert "max_autotune" not in [arm.name for arm in choose_arms((), CPU, torch.float32)]
    assert [arm.name for arm in choose_arms(("max_autotune",), CPU, torch.float32)] == ["reference", "max_autotune"]


def test_code_that_would_fall_back_to_eager_fails_instead():
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with compiled_or_failed(), pytest.raises(Exception, match="recompile_limit"):
        for size in range(2, 20):
            compiled(torch.ones(size))
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_arms_are_checked_and_timed_on_a_cpu():
    case = NAMED["cross_attention"]
    arms = choose_arms(("compiled", "fastris_compiled"), CPU, torch.float32)
    if len(arms) < 3:
        pytest.skip("no C++ compiler")
    cells: dict[str, Cell] = {}
    measure_case(small(case), arms, Setting(CPU, torch.float32, FEW_ROUNDS, quick=True), cells)
    assert {cell.status for cell in cells.values()} == {"measured"}, {c.arm: c.message for c in cells.values()}


def small(case):
    return replace(case, sizes={**case.sizes, **case.small})


@pytest.mark.slow
@pytest.mark.long
def test_a_compiled_decoder_agrees_with_float64():
    checker = Checker(NAMED["decoder"].check_problem(quick=True), composed=True)
    for name in ("compiled", "fastris_compiled"):
        if ARMS[name].obstacle(CPU, torch.float32):
            pytest.skip("no C++ compiler")
        assert checker.check(ARMS[name]).float64_too


def test_forward_and_backward_are_timed_apart_and_leave_no_gradients():
    calls = []

    def watched(output):
        calls.append("forward")
        output.register_hook(lambda gradient: calls.append("backward"))
        return output

    problem = make_case(faults={"torch": watched}).problem()
    expected = {"forward": ["forward"], "backward": ["forward", "backward"], "both": ["forward", "backward"]}
    for passes, order in expected.items():
        step = Step(problem, ARMS["torch"], passes)
        calls.clear()
        if step.set_up is not None:
            step.set_up()
            assert calls == ["forward"]
        step()
        assert calls == order, passes
        assert all(leaf.grad is None for leaf in problem.leaves().values())


def test_what_is_set_up_before_a_step_is_not_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("fastris.bench.timing.harness.time.perf_counter", lambda: clock[0])

    class Slow:
        def set_up(self):
            clock[0] += 100

        def __call__(self):
            clock[0] += 1

    assert timed(Slow(), 3, lambda: None) == 1.0


def test_every_output_that_is_not_a_loss_takes_part_in_backward():
    problem = NAMED["text_encoder"].check_problem(quick=True)
    with use_impl("torch"):
        outputs = problem.training_forward()
        seen = []
        for number, output in enumerate(outputs):
            output.register_hook(lambda gradient, number=number: seen.append(number))
        problem.backward(outputs)
    assert sorted(seen) == [0, 1]


def test_tuned_problems_step_with_fused_adam_and_leave_the_weights():
    for tuned in (False, True):
        problem = Problem(Scaled({}), {"x": torch.randn(3, 4)}, {}, optimizer=True).to(CPU, torch.float32, tuned)
        before = [parameter.clone() for parameter in problem.module.parameters()]
        problem.step()
        (adam,) = problem._adam
        assert bool(adam.defaults["fused"]) is tuned and adam.state
        assert problem.with_module(problem.module)._adam[0] is adam
        for parameter, old in zip(problem.module.parameters(), before, strict=True):
            torch.testing.assert_close(parameter, old, rtol=0, atol=0)


def test_batches_change_sizes_and_title_and_keep_the_check_small():
    case = NAMED["decoder"].at_batch(32)
    assert case.sizes["batch"] == 32 and "B=32" in case.title and not case.goals and case.name == "decoder"
    assert case.check_problem(quick=False).inputs["vis"].shape[0] == 4
    assert NAMED["decoder"].at_batch(1).check_problem(quick=False).inputs["vis"].shape[0] == 1
    assert NAMED["decoder"].at_batch(4) is NAMED["decoder"]
    with pytest.raises(ValueError, match="neck needs a batch of at least 2, got 1"):
        NAMED["neck"].at_batch(1)


def test_cases_are_chosen_by_batch_and_pass():
    config = command.BenchConfig(op=("decoder", "inference"), batch=(1, 2), passes=("forward", "both"))
    chosen = [(case.name, case.sizes["batch"], case.timed) for case in command.chosen_cases(config)[0]]
    assert chosen[:4] == [("decoder", b, t) for t in ("forward", "both") for b in (1, 2)]
    assert chosen.count(("inference", 2, "both")) == 1
    with pytest.warns(UserWarning, match="left out: neck needs a batch of at least 2, got 1"):
        command.chosen_cases(command.BenchConfig(op=("neck",), batch=(1, 2)))
    with pytest.raises(ValueError, match="inference has no backward pass"):
        command.chosen_cases(command.BenchConfig(op=("inference",), passes=("backward",)))
    with pytest.raises(ValueError, match="train_step needs a batch of at least 2"):
        command.chosen_cases(command.BenchConfig(op=("train_step",), batch=(1,)))


def test_a_batch_that_runs_out_of_memory_is_marked_and_the_next_case_runs(monkeypatch, capsys):
    def full(output):
        if len(output) > 5:
            raise MemoryError("out of memory")
        return output

    without_compiler(monkeypatch)
    monkeypatch.setattr(command, "choose_cases", lambda names: ([make_case(faults={"torch": full})], False))
    assert cli.main(["bench", "device=cpu", "arms=torch", "rounds=3", "batch=50,2"]) == 1
    printed = capsys.readouterr().out
    assert "OUT OF MEMORY" in printed and re.search(r"tiny, B=2 +\| reference \| [\d.e-]+ ", printed)


@pytest.mark.parametrize(
    "case",
    every_case(long=("alignformer_step", "magnet_step", "magnet_inference", *(f"magnet_stage{n}" for n in range(4)))),
)
def test_work_of_every_case_is_counted_and_leaves_nothing_behind(case):
    case = small(case)
    work = roofline.count_work(case, torch.float32)
    assert work["bytes"] > 0 and min(work["flops"].values()) >= 0
    without_products = "loss", "deformable_attention", "upsampled_bce"  # matrix products and convolutions are counted
    assert case.name in without_products or min(work["flops"].values()) > 0
    with ARMS["torch"].active():  # no fake tensor may be left in a cache
        case.problem(**case.check).step()


def test_operations_of_a_grouped_convolution_and_an_in_place_product_are_counted_right():
    convolution = nn.Conv2d(8, 12, 3, groups=4, padding=1, bias=False)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    forward = 2 * 2 * 5 * 5 * 12 * (8 // 4) * 9
    assert roofline.counted(lambda: convolution(x).sum().backward()) == 3 * forward
    total, left, right = torch.zeros(3, 4), torch.randn(3, 5), torch.randn(5, 4)
    assert roofline.counted(lambda: total.addmm_(left, right)) == 2 * 3 * 5 * 4


def test_compulsory_bytes_of_a_linear_layer():
    case = make_case()  # x (5, 4), weight (3, 4), bias (3), output (5, 3)
    x, parameters, output = 4 * 20, 4 * 15, 4 * 15
    assert roofline.count_bytes(case, torch.float32) == 2 * (x + parameters + output)
    assert roofline.count_bytes(case, torch.bfloat16) == 2 * (x / 2 + parameters + output / 2)
    assert roofline.count_bytes(case.of_pass("forward"), torch.float32) == x + parameters + output
    assert roofline.count_bytes(case.of_pass("backward"), torch.float32) == output + 2 * (x + parameters)


def test_the_bound_is_the_larger_of_two_times_and_better_ceilings_win():
    low, high = (roofline.Ceilings(1e9 * f, 1e12 / f, "float32", 1, 1) for f in (1.0, 2.0))
    assert roofline.bound({"flops": {"a": 4e9, "b": 2e9}, "bytes": 1e6}, low) == {"ms": 2.0, "limit": "matrix rate"}
    assert roofline.bound({"flops": {"a": 0}, "bytes": 1e6}, low) == {"ms": 1.0, "limit": "bandwidth"}
    both = low.or_better(high)
    assert (both.copy_bytes_per_s, both.matrix_flops_per_s) == (2e9, 1e12)


def test_the_headline_is_the_best_of_ours_over_the_best_of_theirs():
    def case(**times):
        cells = {name: {"status": "measured", "ms": ms} for name, ms in times.items()}
        return {"baseline": "reference", "arms": cells}

    published = {"reference": [9.0, 9.0], "repaired": [8.0, 8.0], "compiled": [6.0, 4.0]}
    found = headline(case(**published, torch=[1.0, 1.0], triton=[2.0, 2.0]))
    assert (found["ours"], found["theirs"], found["ratio"]) == ("triton", "compiled", 2.5)  # torch is only the algebra
    assert headline(case(repaired=[8.0], torch=[2.0]))["ratio"] == 4.0  # where Triton does not run, torch is ours
    assert headline(case(reference=[8.0], torch=[2.0])) is None


def test_a_run_says_of_every_goal_what_was_reached():
    cells = {
        name: {"status": "measured", "ms": [ms], "share": 0.5, "flops": 2e9, "kept_bytes": 2**20, "peak_bytes": None}
        for name, ms in {"reference": 9.0, "repaired": 8.0, "triton": 2.0}.items()
    }
    targets = {"repaired": 3.0, "max_autotune": 2.0, "share": 0.6}
    case = {"name": "tiny", "sizes": {"batch": 2}, "passes": "forward", "baseline": "reference", "goal": None}
    case |= {"arms": cells, "targets": targets}
    text = details({"cases": [case | {"headline": headline(case)}], "ceilings": None})
    assert text.endswith(
        "Goals, for the best of fastris:\n"
        "  tiny, B=2: 3x repaired: yes (4.00x)\n"
        "  tiny, B=2: 2x max_autotune: no (-)\n"
        "  tiny, B=2: 60 % of roofline: no (50 %)"
    )
    assert "  tiny, B=2: 4.00x [4.00-4.00] (triton over repaired)" in text
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["case", "arm", "GFLOP", "GFLOP/s", "share of roofline", "kept, MiB", "peak, MiB"]
    assert rows[4] == ["", "triton", "2", "1e+03", "50%", "1.0", "-"]


@dataclass
class WordsConfig(ModelConfig):
    system: ClassVar[str] = "words"
    title: ClassVar[str] = "Words"
    presets: ClassVar[dict[str, Any]] = {"words_small": {}}
    inputs: ClassVar[Inputs] = Inputs(tokenizer="lengths")
    input_size: int = 8
    word_len: int = 5
    width: int = 3


class Words(ReferringModel):
    config_class = WordsConfig

    def __init__(self, config):
        super().__init__(config)
        self.pixels = nn.Conv2d(3, self.config.width, 2, stride=2)
        self.words = nn.Embedding(20, self.config.width)

    def encode_image(self, images):
        return Pixels(self.pixels(images))

    def segment(self, features, tokens, index=None):
        return (features.select(index).images * self.words(tokens).mean(1)[:, :, None, None]).sum(1, keepdim=True)


class PublishedWords(nn.Module):
    """Its authors' code: the same, differently written."""

    def __init__(self, trained, factor=1.0):
        super().__init__()
        self.model, self.factor, self.calls = trained.model, factor, 0

    def forward(self, img, word, mask):
        self.calls += 1
        scores = (
            torch.einsum("bchw,blc->bhw", self.model.pixels(img), self.model.words(word)) / word.shape[1] * self.factor
        )
        target = reference.resize_target(mask, scores.shape[-2:])
        return nn.functional.binary_cross_entropy_with_logits(scores[:, None], target), scores[:, None].detach()


def test_a_second_systems_training_step_is_one_row_with_its_published_code(monkeypatch):
    def lengths(sentences, words):
        tokens = torch.tensor([[min(19, len(one.split()))] * words for one in sentences])
        return TokenBatch(tokens, torch.zeros(len(sentences), dtype=torch.bool))

    monkeypatch.setitem(sys.modules, "words_system", types.SimpleNamespace(Words=Words, WordsConfig=WordsConfig))
    monkeypatch.setitem(TOKENIZERS, "lengths", lengths)
    monkeypatch.setitem(registry.SYSTEMS, "words", registry.System("words", "words_system:Words",
                        "words_system:WordsConfig", ("words_small",)))  # fmt: skip
    row = replace(NAMED["train_step"], name="words_step", published=PublishedWords, check={}, check_small=False,
                  sizes={"preset": "words_small", "side": 8, "words": 5, "lengths": (2, 4), "batch": 3})  # fmt: skip
    cells: dict[str, Cell] = {}
    measure_case(row, [ARMS["reference"], ARMS["torch"]], Setting(CPU, torch.float32, FEW_ROUNDS), cells)
    assert {cell.status for cell in cells.values()} == {"measured"}, {c.arm: c.message for c in cells.values()}
    steps = {name: Step(row.problem(), ARMS[name]) for name in cells}
    for step in steps.values():
        step()
    assert steps["reference"].problem.module.calls == 1 and not hasattr(steps["torch"].problem.module, "calls")
    wrong = replace(row, published=lambda trained: PublishedWords(trained, 1.01))
    measure_case(wrong, [ARMS["reference"], ARMS["torch"]], Setting(CPU, torch.float32, FEW_ROUNDS), cells)
    assert cells["torch"].status == "refused"


def test_a_trace_names_the_stages(tmp_path):
    case = NAMED["train_step"]
    problem = case.problem(**{**case.small, **case.check, "batch": 2})
    write_trace(Step(problem, ARMS["torch"]), tmp_path / "trace.json.gz", problem.module)
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    stages = {"model.backbone.visual", "model.backbone.encode_text", "model.neck.fuse", "model.decoder", "model.proj"}
    assert stages | {"step", "forward", "backward", "optimizer", "model.decoder.layers.0"} <= names
    assert all("forward" not in part.__dict__ for part in problem.module.modules())


def test_bounds_hold_under_python_o():
    optimised: dict[str, Any] = {}
    exec(compile(Path(bounds.__file__).read_text(), "bounds.py", "exec", optimize=2), optimised)
    one = torch.ones(2)
    with pytest.raises(AssertionError, match=r"x: error 1\.00e\+00"):
        optimised["assert_same"](2 * one, one, one.double(), "x")


@pytest.mark.slow
def test_pytest_benchmark_runs_the_same_cases_checked_first():
    pytest.importorskip("pytest_benchmark")
    command_line = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-q", "-k", "loss or cross_attention"]
    options = ["--benchmark-min-rounds=1", "--benchmark-max-time=0.01"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command_line, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_case[cross_attention-torch]" in done.stdout and "test_case[loss-repaired]" in done.stdout


def test_plain_pytest_does_not_collect_the_benchmarks(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert (ROOT / "bench" / "test_cases.py").is_file()
