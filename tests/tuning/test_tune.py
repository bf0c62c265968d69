"""`fastris tune` on a pretended GPU with a fake clock: prove, then time; keep what wins by more than noise."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from fastris import tuned
from fastris.commands import cli
from fastris.commands import tune as command
from fastris.operators import OPERATORS
from fastris.preflight import Failure
from fastris.preflight.reasons import explain
from fastris.runtime.graph_timing import Timing
from fastris.tuned import files
from fastris.tuned.files import own_file, read
from fastris.tuned.sizes import BUCKETS, LARGE, MIDDLE, SMALL

if importlib.util.find_spec("triton") is None:
    pytest.skip("tuning is of Triton's kernels", allow_module_level=True)

from fastris.kernels.configs import Choice, Config
from fastris.tuning.bench import Arm

GPU = "Made-up GPU 9000"
FAST, SLOW, WRONG, BREAKS = (Config((("BLOCK", size),)) for size in (64, 16, 7, 9))
TABLE = Config((("BLOCK", 32),), alternatives=(SLOW, WRONG, BREAKS, FAST))
WITH_KERNELS = sum(bool(operator.kernels) for operator in OPERATORS.values())
UP = "upsample2x_conv3x3"


class FakeBench:
    """A GPU on which a step of the kernels takes 1 ms, and the rest what the attributes say.

    ``seconds_of`` gives an arm's time, ``wrong`` the (operator, precision) whose kernels fail; ``full`` batches do not
    fit. Every proof and timing takes ``cost`` seconds of the fake ``clock``.
    """

    def __init__(self, cost: float = 0.1):
        self.now, self.cost = 0.0, cost
        self.calls: list[tuple] = []
        self.wrong: set[tuple[str, str]] = set()
        self.full: set[int] = set()
        self.crashing: set[tuple[str, str]] = set()
        self.without_memory: set[tuple[str, str]] = set()
        self.breaking: int | None = None
        self.no_compiler = False
        self.torch_seconds = dict.fromkeys(BUCKETS.values(), 2e-3)
        self.spread = 0.001
        self.interrupt_after: int | None = None

    def clock(self) -> float:
        return self.now

    def _spend(self, *call) -> None:
        self.calls.append(call)
        self.now += self.cost
        if self.interrupt_after is not None and len(self.calls) > self.interrupt_after:
            raise KeyboardInterrupt

    def prove(self, operator, precision, tiles):
        self._spend("prove", operator, precision, *tiles.values())
        if self.no_compiler:
            return Failure("Triton found no C compiler", "install one", everywhere=True)
        if (operator, precision) in self.without_memory:
            return explain(torch.OutOfMemoryError("CUDA out of memory"), torch.device("cpu"))
        if (operator, precision) in self.wrong or WRONG in tiles.values():
            return Failure("their numbers are wrong", "report it")
        return None

    def choices(self, operator, precision, batch):
        dtype = str(tuned.PRECISIONS[precision]).removeprefix("torch.")
        return {Choice(f"{operator} kernel", "", dtype, 1024): TABLE}

    def time(self, operator, precision, batch, arms: dict[str, Arm]):
        self._spend("time", operator, precision, batch)
        if (
            batch == self.breaking
            or (operator, precision) in self.crashing
            or BREAKS in [config for arm in arms.values() for config in arm.tiles.values()]
        ):
            raise RuntimeError("a kernel crashed\nand more")
        if batch in self.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {name: Timing(self._seconds(batch, arm), self.spread, 9, "graph") for name, arm in arms.items()}

    def _seconds(self, batch, arm):
        if arm.path == "torch":
            return self.torch_seconds[batch]
        factors = {FAST: 0.5, SLOW: 2.0, WRONG: 0.1}
        seconds = 1e-3
        for config in arm.tiles.values():
            seconds *= factors.get(config, 1.0)
        return seconds


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The pretended GPU, which `fastris tune` finds."""
    fake = FakeBench()
    monkeypatch.setenv("FASTRIS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(files, "CARDS", tmp_path / "cards")
    monkeypatch.setattr(command, "open_bench", lambda device: (GPU, fake))
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=fake.clock))
    return fake


def kept():
    return read(own_file(GPU))


def test_every_operator_is_proved_before_it_is_timed_and_kept(bench, capsys):
    assert cli.main(["tune"]) == 0
    rows = kept().rows
    assert len(rows) == WITH_KERNELS * len(tuned.PRECISIONS) * len(BUCKETS)
    assert all(
        row.takes_triton and row.gain == pytest.approx(4.0) for row in rows.values() if "TF32" not in row.precision
    )
    proved = set()
    for kind, operator, precision, *_ in bench.calls:
        assert kind == "prove" or (operator, precision) in proved
        proved.add((operator, precision))
    printed = capsys.readouterr().out
    assert printed.startswith(f"measuring {GPU} for about 2 minutes; kept in {own_file(GPU)}")
    assert f"bfloat16         {UP:<31} batch <= 4 4.00x, batch <= 16 4.00x, batch > 16 4.00x; 1 better tiles" in printed


def test_fastest_tiles_that_are_right_are_kept(bench):
    cli.main(["tune"])
    tiles = kept().tiles
    assert tiles[f"{UP} kernel//bfloat16/1024"] == FAST.as_dict()
    assert len(tiles) == WITH_KERNELS * 3, "every operator in three dtypes"
    timed = [call for call in bench.calls if WRONG in call]
    assert timed and all(call[0] == "prove" for call in timed), "wrong tiles are never timed"


def test_gain_within_the_noise_leaves_the_torch_path(bench):
    bench.torch_seconds = {4: 0.4e-3, 16: 0.51e-3, 64: 0.6e-3}
    cli.main(["tune"])
    rows = {row.bucket: row for row in kept().rows.values() if row.key[:2] == (UP, "bfloat16")}
    assert {bucket: row.takes_triton for bucket, row in rows.items()} == {SMALL: False, MIDDLE: False, LARGE: True}
    bench.spread = 0.2
    own_file(GPU).unlink()
    cli.main(["tune"])
    assert not any(row.takes_triton for row in kept().rows.values())


def test_wrong_kernels_are_timed_by_the_torch_path_alone(bench, capsys):
    bench.wrong = {(UP, "float16")}
    assert cli.main(["tune"]) == 0
    row = kept().rows[UP, "float16", LARGE]
    assert row.triton is None and not row.takes_triton and "numbers are wrong" in row.note
    assert "not proved" in capsys.readouterr().out
    assert kept().rows[UP, "bfloat16", LARGE].takes_triton


def test_tiles_that_break_where_there_are_many_pixels_are_told_and_passed_over(bench, capsys):
    assert cli.main(["tune"]) == 0
    told = f"passed over {UP} kernel//bfloat16/1024 {BREAKS.as_dict()}: RuntimeError: a kernel crashed\n"
    assert told in capsys.readouterr().out
    assert kept().tiles[f"{UP} kernel//bfloat16/1024"] == FAST.as_dict(), "those behind it are tried all the same"


def test_an_operator_that_fails_is_told_and_the_others_are_measured(bench, capsys):
    bench.crashing = {(UP, "float16")}
    assert cli.main(["tune"]) == 0
    printed = capsys.readouterr().out
    jobs = WITH_KERNELS * len(tuned.PRECISIONS)
    assert (
        printed.count("failed: RuntimeError: a kernel crashed\n") == 1 and f"{jobs - 1} of {jobs} measured" in printed
    )
    assert (UP, "bfloat16", LARGE) in kept().rows and (UP, "float16", LARGE) not in kept().rows


def test_where_every_operator_fails_one_line_says_so_and_the_exit_status(bench, capsys):
    bench.breaking = 64
    assert cli.main(["tune"]) == 1
    printed, told = capsys.readouterr()
    assert printed.count("failed: RuntimeError: a kernel crashed\n") == WITH_KERNELS * len(tuned.PRECISIONS)
    assert told == "fastris tune: nothing was measured to its end; what failed stands above\n"


def test_a_proof_without_memory_says_nothing_of_the_kernels_and_is_not_kept(bench, capsys):
    bench.without_memory = {(UP, "float16")}
    assert cli.main(["tune"]) == 0
    assert "failed: OutOfMemoryError: there was no memory left on the GPU" in capsys.readouterr().out
    assert not [key for key in kept().rows if key[:2] == (UP, "float16")]
    assert (UP, "bfloat16", LARGE) in kept().rows


def test_a_machine_that_lets_no_kernel_run_is_told_and_nothing_is_kept_against_them(bench, capsys):
    bench.no_compiler = True
    assert cli.main(["tune"]) == 2
    told = capsys.readouterr().err
    assert told == "fastris tune: there is nothing to tune: Triton found no C compiler (to mend it: install one)\n"
    assert not kept().rows and len(bench.calls) == 1


def test_batch_that_does_not_fit_is_left_to_the_table(bench, capsys):
    bench.full = {64}
    assert cli.main(["tune"]) == 0
    assert (UP, "bfloat16", LARGE) not in kept().rows and (UP, "bfloat16", MIDDLE) in kept().rows
    assert "batch > 16 does not fit" in capsys.readouterr().out


def test_time_is_kept_to_and_another_run_goes_on_with_the_rest(bench, capsys):
    bench.cost = 5.0
    assert cli.main(["tune"]) == 0
    printed, first = capsys.readouterr().out, set(kept().rows)
    assert 0 < len(first) < 48 and "run it again to go on with the others" in printed
    assert bench.now < 120 + 60, "what was begun is finished, and nothing more is begun"
    assert first >= {(UP, "bfloat16", bucket) for bucket in BUCKETS}, "what training computes in comes first"
    bench.calls.clear()
    cli.main(["tune"])
    assert bench.calls[0][1:3] not in {key[:2] for key in first}
    assert set(kept().rows) > first


def test_ctrl_c_keeps_what_was_measured(bench, capsys):
    bench.interrupt_after = 25
    assert cli.main(["tune"]) == 130
    assert capsys.readouterr().err == "fastris tune: stopped\n"
    assert 0 < len(kept().rows) < 48
    assert all(row.gain for row in kept().rows.values())


def test_measurements_of_other_versions_are_measured_anew(bench, monkeypatch):
    cli.main(["tune"])
    monkeypatch.setattr(files, "_driver", lambda: "999.9")
    bench.interrupt_after = len(bench.calls)
    cli.main(["tune"])
    assert kept().identity.driver == "999.9" and not kept().rows


def test_show_prints_choices_and_gains(bench, capsys):
    bench.torch_seconds = {4: 0.4e-3, 16: 0.51e-3, 64: 0.6e-3}
    cli.main(["tune"])
    capsys.readouterr()
    assert cli.main(["tune", "--show"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{GPU}\n  {own_file(GPU)}\n")
    lines = [line.split() for line in printed.splitlines() if UP in line and line.split()[0] == "bfloat16"]
    assert [line[-1] for line in lines] == ["0.80x", "1.02x", "1.20x"]
    assert [next(w for w in line if w in ("torch", "triton")) for line in lines] == ["torch", "torch", "triton"]
    assert "not used here" not in printed and "tiles of" in printed


def test_show_tells_files_that_are_damaged_or_hold_elsewhere(bench, monkeypatch, capsys):
    assert cli.main(["tune", "--show"]) == 0
    assert "nothing was measured" in capsys.readouterr().out
    cli.main(["tune"])
    monkeypatch.setattr(files, "_driver", lambda: "999.9")
    (own_file(GPU).parent / "Another.json").write_text("{")
    capsys.readouterr()
    assert cli.main(["tune", "--show"]) == 0
    printed = capsys.readouterr().out
    assert "Another.json is damaged" in printed and "not used here: measured with driver" in printed


def test_machine_without_a_gpu_is_told_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FASTRIS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fastris tune: PyTorch finds no GPU here to measure; ") and printed.count("\n") == 1
    assert cli.main(["tune", "device=cpu"]) == 2
    assert "device=cpu is no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written_to_is_told_before_the_work(bench, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTRIS_CACHE_DIR", str(tmp_path / "file"))
    assert cli.main(["tune"]) == 2
    assert "could not write" in capsys.readouterr().err and not bench.calls
