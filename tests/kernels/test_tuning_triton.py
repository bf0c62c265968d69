"""The measuring itself, on a GPU or interpreted: every operator's step by both paths, and with other tiles."""

from __future__ import annotations

import os

import pytest
import torch

from fastris.operators import OPERATORS

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.commands import cli  # noqa: E402
from fastris.kernels import configs  # noqa: E402
from fastris.runtime import graph_timing  # noqa: E402
from fastris.tuned.files import Tuning, identity_of, read  # noqa: E402
from fastris.tuned.sizes import BUCKETS, MIDDLE  # noqa: E402
from fastris.tuning import bench as benches  # noqa: E402
from fastris.tuning import measure as measuring  # noqa: E402
from fastris.tuning.bench import Arm, DeviceBench  # noqa: E402
from fastris.tuning.problems import Sizes  # noqa: E402

DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
TINY = Sizes(side=2, channels=16, heads=1, words=5)
WITH_KERNELS = [name for name, operator in OPERATORS.items() if operator.kernels]


@pytest.fixture
def bench(monkeypatch):
    """As few rounds as there can be."""
    monkeypatch.setattr(graph_timing, "MIN_ROUNDS", 2)
    monkeypatch.setattr(benches, "buffers_needed", lambda device, count: 1)
    return DeviceBench(DEVICE, TINY, seconds=0.0)


@pytest.mark.parametrize("operator", WITH_KERNELS)
def test_step_runs_by_both_paths_and_tells_its_tiles(bench, operator):
    chosen = bench.choices(operator, "float32", 1)
    assert len(chosen) >= 2, "forward and backward"
    found = bench.time(operator, "float32", 1, {"torch": Arm("torch"), "triton": Arm("triton", dict(chosen))})
    assert found["torch"].seconds > 0 and found["triton"].seconds > 0
    assert found["triton"].how == ("graph" if HAS_GPU else "clock")
    assert not configs._replacements, "what was tried is taken back"


def test_tiles_that_are_tried_are_those_that_launch_and_are_proved(bench, monkeypatch):
    chosen = bench.choices("text_to_pixel_similarity", "float32", 1)
    choice = next(each for each in chosen if "shift" in each.kernel)
    other = configs.Config((("BLOCK", 64),), num_warps=4, num_stages=1)
    assert bench.prove("text_to_pixel_similarity", "float32", {choice: other}) is None
    nonsense = configs.Config((("BLOCK_OF", 64),))
    failure = bench.prove("text_to_pixel_similarity", "float32", {choice: nonsense})
    assert failure is not None and "BLOCK_OF" in failure.reason
    with pytest.raises(ValueError, match="BLOCK_OF"):
        bench.time("text_to_pixel_similarity", "float32", 1, {"other": Arm("triton", {choice: nonsense})})


def test_whole_tuning_of_an_operator_ends_in_a_file_that_can_be_read(bench, monkeypatch, tmp_path):
    job, clock = ("text_to_pixel_similarity", "float32"), iter(range(10**6))
    monkeypatch.setattr(measuring, "jobs", lambda tuning: [job])
    monkeypatch.setattr(measuring, "BUCKETS", dict.fromkeys(BUCKETS, 1))
    tuning, said = Tuning(identity_of("a card")), []

    def save() -> None:
        tuning.write(tmp_path / "card.json")

    plan = measuring.Plan(bench, tuning, 12, said.append, save, lambda: next(clock))
    assert measuring.measure(plan) == []
    assert read(tmp_path / "card.json") == tuning
    assert [row.key for row in tuning.rows.values()] == [(*job, bucket) for bucket in BUCKETS]
    assert all(row.gain for row in tuning.rows.values()) and len(said) == 1


@pytest.mark.skipif(HAS_GPU, reason="the rehearsal is for machines without a GPU")
def test_the_command_rehearses_itself_where_there_is_no_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FASTRIS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(graph_timing, "MIN_ROUNDS", 2)
    monkeypatch.setattr(benches, "buffers_needed", lambda device, count: 1)
    jobs = [("cross_attention", "bfloat16"), ("text_to_pixel_similarity", "float32")]
    monkeypatch.setattr(measuring, "jobs", lambda tuning: list(jobs))
    assert cli.main(["tune", "device=cpu", "minutes=1"]) == 0
    out = capsys.readouterr().out
    assert "a rehearsal, which no GPU goes by" in out and "wrong numbers in bfloat16" in out
    (file,) = (tmp_path / "tuned").glob("*.json")
    rows = read(file).rows
    assert rows["text_to_pixel_similarity", "float32", MIDDLE].gain
    assert rows["cross_attention", "bfloat16", MIDDLE].triton is None
