"""Live bytes are what autograd and checkpoints keep, each storage once; forecasts follow from them by arithmetic."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_helpers import model_config

from fastris import CRISConfig
from fastris.bench import memory
from fastris.bench.cases import alignformer
from fastris.bench.cases.arms import ARMS
from fastris.bench.counter import LiveStorages, saved_storages
from fastris.bench.memory import STAGES, StepCount, count_step, count_whole, lines_through, model_and_batch
from fastris.bench.report import pages as report
from fastris.bench.report.pages import CONTEXT, GIB, WHOLE_GOALS, WORKSPACE, WholeCell
from fastris.bench.report.results import MIB
from fastris.bench.timing.harness import Step, kept_bytes
from fastris.models import registry

CPU = torch.device("cpu")


def test_freed_results_do_not_count_and_views_count_once():
    x = torch.randn(10, 4)
    with LiveStorages([], [x]) as counter:
        with counter.stage("first"):
            kept = x * 2
            (kept + 1).exp()
        with counter.stage("second"):
            also = kept.T.reshape(2, 20).clone()
        views = kept[1:], kept.view(-1)
    assert {name: stage.total for name, stage in counter.kept().items()} == {"first": 160, "second": 160}
    del kept, views, also
    assert counter.kept() == {} and counter.alive() == 0


def test_peak_of_a_stage_includes_what_others_keep():
    x = torch.randn(100)
    with LiveStorages([], [x]) as counter:
        with counter.stage("first"):
            kept = x * 2
        with counter.stage("second"):
            (x + 1).exp()
            x + kept
    assert counter.peaks["first"] == 400 and counter.peaks["second"] == 1200
    assert counter.alive() == 400


def test_what_a_checkpoint_holds_is_counted_where_hooks_see_nothing():
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)

    def kept(forward):
        with LiveStorages(layers.parameters(), [x]) as counter:
            output = forward(2 * x).sum()
        return counter.alive() - output.nbytes

    assert kept(layers) == 5 * (8 + 16) * 4  # inputs of both products; ReLU keeps the second
    assert kept(lambda x: checkpoint(layers, x, use_reentrant=False)) == 5 * 8 * 4


@pytest.mark.parametrize("arm", ["reference", "torch"])
def test_live_count_agrees_with_what_autograd_saves(arm):
    model, data = model_and_batch(CRISConfig.preset("tiny"), "none", CPU, 2)
    with ARMS[arm].active():
        resident = [*model.parameters(), *model.buffers(), *data]
        with torch.autocast("cpu", torch.bfloat16), saved_storages(resident) as saved:
            model(*data)
        live = count_step(CRISConfig.preset("tiny"), "none", CPU).kept.values()
    expected, actual = sum(saved.values()), sum(kept.total for kept in live)
    # A table of positions stays cached, the sentence's padding with the tokens; autograd saves neither.
    assert expected <= actual <= 1.02 * expected


def test_each_setting_keeps_less_than_the_one_before_it():
    totals = []
    for setting in ("none", "pointwise", "stages"):
        kept = count_step(model_config(), setting, CPU).kept
        assert list(kept) == list(STAGES)
        totals.append(sum(stage.total for stage in kept.values()))
    assert totals == sorted(set(totals), reverse=True)


def test_gradients_and_optimizer_state_are_in_the_forecast():
    model, data = model_and_batch(model_config(), "none", CPU, 2)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    step = count_step(model_config(), "none", CPU)
    assert step.fixed == 3 * weights + sum(buffer.nbytes for buffer in model.buffers())
    unused = model.backbone.logit_scale.nbytes
    assert step.peaks["backward of stem"] >= weights - unused + sum(tensor.nbytes for tensor in data)


def test_lines_pass_through_both_counts():
    small, large = StepCount(2, 0, {}, {"a": 10, "b": 8}), StepCount(4, 0, {}, {"a": 16, "b": 8})
    assert lines_through(small, large) == {"a": (4.0, 3.0), "b": (8.0, 0.0)}


def test_largest_batch_is_the_last_that_fits():
    cell = WholeCell("torch", fixed=GIB, lines={"early": (0.0, 100.0 * MIB), "late": (GIB, 50.0 * MIB)})
    batch = cell.largest_batch(12)
    assert CONTEXT + cell.step_bytes(batch) <= 12 * GIB < CONTEXT + cell.step_bytes(batch + 1)
    assert WholeCell("torch", fixed=12 * GIB, lines={"all": (0.0, 1.0)}).largest_batch(12) == 0
    assert cell.step_bytes(1) == GIB + WORKSPACE + GIB + 50 * MIB


def test_a_failing_arm_is_named_and_the_others_are_counted(monkeypatch):
    def failing(config, setting, device, batch, dtype):
        if setting == "pointwise":
            raise MemoryError("no room")
        return StepCount(batch, 0, {}, {"a": batch})

    monkeypatch.setattr("fastris.bench.memory.count_step", failing)
    cells: list[WholeCell] = []
    count_whole([ARMS["reference"], ARMS["torch"]], CPU, lambda text: None, cells, model_config())
    assert [(c.arm, c.recompute, c.status) for c in cells] == [
        ("reference", "none", "measured"),
        ("torch", "none", "measured"),
        ("torch", "pointwise", "out of memory"),
        ("torch", "stages", "measured"),
    ]
    assert "no room" in report.kept_table(cells) and "no room" not in report.fits_table(cells)


def test_alignformers_step_keeps_half_of_what_the_published_formulas_do():
    pytest.importorskip("transformers", reason="AlignFormer's text encoder is BERT")
    tiny = registry.preset("alignformer_tiny")
    widths = {"embed_dim": 32, "num_heads": (1, 2, 4, 8), "window": 12, "conv_dim": 64, "pixel_ffn": 256}
    config = dataclasses.replace(tiny, **widths, word_ffn=512, depths=(1, 1, 6, 1), pixel_layers=2, input_size=240)
    problem = alignformer.step(config, 240, 1, 20)  # Swin-B's proportions at a quarter of its width
    kept = {name: kept_bytes(Step(problem, ARMS[name])) for name in ("reference", "torch")}
    assert kept["torch"] <= 0.5 * kept["reference"], {name: bytes_ / MIB for name, bytes_ in kept.items()}


@pytest.mark.parametrize("system", ["alignformer", "magnet"])
def test_another_systems_count_is_by_its_own_stages_and_held_to_a_share_of_the_baselines(
    monkeypatch, tmp_path, capsys, system
):
    pytest.importorskip("transformers", reason="the text encoder is BERT")
    tiny = dataclasses.replace(registry.preset(f"{system}_tiny"), input_size=64)
    monkeypatch.setattr(memory.registry, "preset", lambda name: {f"{system}_tiny": tiny}[name])
    monkeypatch.setattr(memory, "RECOMPUTE_SETTINGS", ("none",))
    monkeypatch.setattr(memory.count_whole, "__defaults__", (("none",), torch.bfloat16))
    path = tmp_path / "memory.json"
    options = [f"model={system}_tiny", "counted=float32", "arms=torch", "device=cpu", f"json={path}"]
    assert memory.main(options) == 0
    printed, found = capsys.readouterr().out, report.load_counts(path)
    kept = {cell["arm"]: sum(k["activations"] for k in cell["stages"].values()) for cell in found["cells"]}
    assert all(list(cell["stages"]) == list(memory.SYSTEMS[system][0]) for cell in found["cells"])
    assert all(kept["activations"] > 0 for cell in found["cells"] for kept in cell["stages"].values())
    assert f"at most 0.5x reference (is {kept['torch'] / kept['reference']:.2f}x)" in printed
    assert "64x64, B=2, float32, 20 words" in printed and "B=32 needs GiB" in printed
    assert ("Goal for the pixel decoder: at most 0.15x reference. torch, none: 0." in printed) == (system == "magnet")
    assert report.kept_table([WholeCell(**cell) for cell in found["cells"]], found["of"]) in printed
    assert printed.split("\n\n")[1] in report.memory_page(found, "memory.json")


def test_magnets_pixel_decoder_keeps_a_small_share_of_what_stored_samples_take():
    pytest.importorskip("transformers", reason="MagNet's text encoder is BERT")
    widths = {"conv_dim": 64, "decoder_heads": 2, "pixel_ffn": 256, "pixel_layers": 4, "query_layers": 1}
    config = dataclasses.replace(registry.preset("magnet_tiny"), **widths)  # the decoder's proportions as released
    model, kept = registry.create(config), {}
    owners = [path.rpartition(".")[0] for paths in memory.MAGNET.values() for path in paths]
    assert all(memory.submodules(model, owner) for owner in owners)
    for arm, setting in (("reference", "none"), ("torch", "none"), ("torch", "stages")):
        with ARMS[arm].active():
            parts = count_step(config, setting, CPU, dtype=torch.float32).kept
        assert list(parts) == list(memory.MAGNET)
        kept[arm, setting] = parts["pixel decoder"].total
    whole = kept["reference", "none"]
    assert kept["torch", "none"] <= memory.PART_GOALS["magnet"]["pixel decoder"] * whole, kept
    assert kept["torch", "stages"] <= 0.1 * whole, kept


@pytest.mark.slow
def test_command_prints_the_tables_and_writes_the_counts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory.registry, "preset", lambda name: model_config())
    path = tmp_path / "memory.json"
    assert memory.main(["--arms", "torch", "--device=cpu", "rounds=1", f"json={path}"]) == 0
    printed = capsys.readouterr().out
    assert "| torch | stages |" in printed and "B=64 in 12 GB" in printed and "times none" in printed
    block = report.memory_page(report.load_counts(path), "memory.json")
    assert all(f"{table}\n" in block for table in printed.split("\n\n") if table.startswith("| arm"))
    assert "Raw data: `memory.json`" in block


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--arms=fast"], "no arm 'fast'"), (["rounds=-1"], "rounds must be at least 0"), (["batch=1"], "at least 2")],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    assert memory.main([*arguments, "--device=cpu"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "setting", "most"),
    [
        pytest.param(arm, name, goal, marks=() if name == "stages" else pytest.mark.long)
        for arm, name, goal in (("reference", "none", 476), *(("torch", *each) for each in WHOLE_GOALS.items()))
    ],
)
def test_cris_r50_keeps_no_more_than_its_goal(arm, setting, most):
    with ARMS[arm].active():
        kept = count_step(CRISConfig.preset("cris_r50"), setting, CPU).kept
    assert sum(stage.total for stage in kept.values()) / 2 / MIB <= most
