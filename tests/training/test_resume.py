from __future__ import annotations

import contextlib
import os
import random
import signal

import numpy as np
import pytest
import torch
import yaml
from training_helpers import MODEL, rows, train_config, train_set, val_set

from fastris import CRIS
from fastris.commands import assemble
from fastris.commands.train import TrainConfig, run, train
from fastris.data.samples import TrainSamples
from fastris.data.scenes.dataset import SyntheticExpressions
from fastris.options.declare import load_options
from fastris.runtime.device import layout_for
from fastris.runtime.interrupt import StopSignal
from fastris.training import validation
from fastris.training.log import CsvLog, RunLog, StepRecord
from fastris.training.run import restore_rng, rng_state
from fastris.weights.load import load_torch, save_atomic


def run_to_the_end(folder, **changes):
    return train(train_config(folder, **changes), train_set(), val_set())


def assert_same_run(folder, expected):
    """Same steps, losses and validations, bit for bit, and the same weights and optimizer state."""
    for log in ("log.csv", "val.csv"):
        assert rows(folder / log) == rows(expected / log)
    ours, theirs = load_torch(folder / "last.pth"), load_torch(expected / "last.pth")
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    for key, value in theirs["optimizer"]["state"].items():
        assert torch.equal(ours["optimizer"]["state"][key]["exp_avg_sq"], value["exp_avg_sq"])
    assert torch.equal(ours["rng"]["torch"], theirs["rng"]["torch"])
    assert {k: ours[k] for k in ("epoch", "batch", "step", "best_iou")} == {
        k: theirs[k] for k in ("epoch", "batch", "step", "best_iou")
    }


@pytest.fixture
def interrupt_at(monkeypatch):
    """Ctrl-C when the log gets the row of a given step."""

    def arm(step: int, number: int = signal.SIGINT) -> None:
        write = RunLog.step

        def write_and_interrupt(log, record):
            write(log, record)
            if record.step == step:
                monkeypatch.setattr(RunLog, "step", write)
                os.kill(os.getpid(), number)

        monkeypatch.setattr(RunLog, "step", write_and_interrupt)

    return arm


@pytest.mark.parametrize(
    ("workers", "step", "number"),
    [(0, 3, signal.SIGHUP), pytest.param(2, 6, signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_run_interrupted_inside_an_epoch_goes_on_exactly(tmp_path, uninterrupted, interrupt_at, workers, step, number):
    interrupt_at(step, number)
    stopped = run_to_the_end(tmp_path, workers=workers)
    assert (stopped.interrupted, stopped.step) == (True, step)
    assert load_torch(tmp_path / "last.pth")["batch"] == step % 4
    resumed = run_to_the_end(tmp_path, workers=workers, resume=True)
    assert not resumed.interrupted
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_layout_of_gpus_trains_saves_and_goes_on_exactly(tmp_path, interrupt_at, monkeypatch):
    assert layout_for(torch.device("cuda")) is torch.channels_last
    monkeypatch.setattr(assemble, "layout_for", lambda device: torch.channels_last)
    whole, parts, saved = (tmp_path / name for name in ("whole", "parts", "saved"))
    model = run_to_the_end(whole).model
    convolution = model.backbone.visual.layer1[0].conv2.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last) and not convolution.is_contiguous()
    interrupt_at(3)
    run_to_the_end(parts)
    run_to_the_end(parts, resume=True)
    assert_same_run(parts, whole)
    model.save_pretrained(saved)
    for name, value in CRIS.from_pretrained(saved).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_run_interrupted_in_validation_goes_on_exactly(tmp_path, uninterrupted, monkeypatch):
    evaluate = validation.evaluate

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(validation, "evaluate", evaluate)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(validation, "evaluate", interrupted)
    assert run_to_the_end(tmp_path).interrupted
    assert load_torch(tmp_path / "last.pth")["step"] == 4
    run_to_the_end(tmp_path, resume="auto")
    assert_same_run(tmp_path, uninterrupted)


def test_run_that_died_goes_on_from_its_last_checkpoint_and_logs_each_step_once(tmp_path, uninterrupted, monkeypatch):
    write = RunLog.step

    def die(log, record):
        write(log, record)
        if record.step == 7:
            raise SystemError("power cut")

    monkeypatch.setattr(RunLog, "step", die)
    with pytest.raises(SystemError):
        run_to_the_end(tmp_path, save_every_steps=3)
    monkeypatch.setattr(RunLog, "step", write)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("8,2,4,0.1")  # and the next row was half written
    assert load_torch(tmp_path / "last.pth")["step"] == 6
    run_to_the_end(tmp_path, resume=True, save_every_steps=3)
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == [str(step) for step in range(1, 9)]
    assert_same_run(tmp_path, uninterrupted)


def test_max_steps_ends_the_run_and_more_of_them_continue_it(tmp_path, uninterrupted):
    first = run_to_the_end(tmp_path, max_steps=2)
    assert (first.step, first.interrupted) == (2, False)
    assert first.scores is not None and (tmp_path / "best.pth").exists()
    second = run_to_the_end(tmp_path, max_steps=2, resume=True)
    assert second.step == 2
    run_to_the_end(tmp_path, resume=True)
    assert rows(tmp_path / "log.csv") == rows(uninterrupted / "log.csv")


def test_new_run_never_overwrites_one(uninterrupted):
    before = (uninterrupted / "log.csv").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; go on with it by --resume, or choose another"):
        run_to_the_end(uninterrupted)
    assert (uninterrupted / "log.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 4}, "batch_size=3, now 4"),
        ({"base_lr": 1e-4, "manual_seed": 1}, "base_lr=0.001, now 0.0001; manual_seed=0, now 1"),
        ({"input_size": 96}, "input_size=64, now 96"),
        ({"limit_train": 9}, "references=12, now 9"),
    ],
)
def test_resuming_with_other_settings_names_them(uninterrupted, changes, named):
    with pytest.raises(ValueError, match=named):
        run_to_the_end(uninterrupted, resume=True, **changes)


def test_resuming_with_other_data_of_the_same_size_is_refused(uninterrupted):
    other = SyntheticExpressions("train", scenes=4, size=64, seed=5)
    with pytest.raises(ValueError, match="text_digest"):
        train(train_config(uninterrupted, resume=True), other, val_set())


def test_resuming_what_is_not_there_or_no_training_state_says_so(uninterrupted, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        run_to_the_end(tmp_path / "new", resume=True)
    with pytest.raises(ValueError, match=r"lacks optimizer, .*give weight="):
        run_to_the_end(tmp_path / "new", resume=str(uninterrupted / "best.pth"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.csv").write_text("step\n1\n")
    with pytest.raises(ValueError, match="belongs to another run"):
        run_to_the_end(tmp_path / "other", resume=str(uninterrupted / "last.pth"))


def test_more_epochs_may_follow_and_in_another_folder(uninterrupted, tmp_path):
    result = run_to_the_end(tmp_path, resume=str(uninterrupted), epochs=3, evaluate=False)
    assert (result.epoch, result.step) == (3, 12)
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == ["9", "10", "11", "12"]


def test_all_random_generators_come_back():
    np.random.normal()  # leaves a cached second value, which belongs to the state
    state = rng_state()
    first = (random.random(), np.random.normal(), torch.rand(1).item())
    restore_rng(state)
    assert (random.random(), np.random.normal(), torch.rand(1).item()) == first


def same_generators(ours, theirs) -> bool:
    numpys = [(state["numpy"][1].tolist(), state["numpy"][2:]) for state in (ours, theirs)]
    return ours["python"] == theirs["python"] and numpys[0] == numpys[1] and torch.equal(ours["torch"], theirs["torch"])


class Noisy(SyntheticExpressions):
    """A data set that augments its images, from all global generators."""

    def image(self, index):
        drawn = random.random() + random.gauss(0, 0.1) + np.random.normal() + torch.rand(()).item()
        return (super().image(index) * (0.5 + abs(drawn) % 0.5)).astype(np.uint8)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_data_set_draws_at_random_resumes_exactly_for_any_number_of_workers(tmp_path, interrupt_at, workers):
    data = Noisy("train", scenes=4, size=64)
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder, steps in zip(folders, (None, 3), strict=True):
        if steps:
            interrupt_at(steps)
            assert train(train_config(folder, evaluate=False, workers=0), data).interrupted
        train(train_config(folder, evaluate=False, workers=workers, resume="auto"), data)
    (whole, parts), states = folders, [load_torch(folder / "last.pth") for folder in folders]
    assert len(rows(parts / "log.csv")) == 8 and rows(parts / "log.csv") == rows(whole / "log.csv")
    assert same_generators(*(state["rng"] for state in states))


def test_data_set_draws_other_numbers_in_each_epoch_and_for_each_sample(tmp_path):
    from fastris.training.feed import _Reported

    class Drawing(SyntheticExpressions):
        def image(self, index):
            drawn.append((random.random(), np.random.random(), torch.rand(()).item()))
            return super().image(index)

    drawn: list[tuple[float, float, float]] = []
    samples = TrainSamples(Drawing("train", scenes=4, size=64), 64, seed=3)
    before = rng_state()
    for indices in ((2, 5), (5, 2)):
        for epoch in range(2):
            samples.set_epoch(epoch)
            for index in indices:
                _Reported(samples)[index]
    assert same_generators(rng_state(), before)
    assert len({number for numbers in drawn[:4] for number in numbers}) == 12
    assert sorted(drawn[:4]) == sorted(drawn[4:])


@pytest.mark.slow
@pytest.mark.long
def test_checkpoint_whose_generators_are_not_all_on_record_still_resumes(tmp_path, uninterrupted):
    run_to_the_end(tmp_path, max_steps=4)
    state = load_torch(tmp_path / "last.pth")
    del state["rng"]["python"], state["rng"]["numpy"], state["rng"]["cuda"]
    save_atomic(state, tmp_path / "last.pth")
    run_to_the_end(tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_hangup_asks_to_stop_however_often_it_comes(capfd):
    with StopSignal("finishing") as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested and capfd.readouterr().err.count("SIGHUP: finishing") == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopSignal("finishing") as stop, pytest.raises(KeyboardInterrupt), stop.at_once():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_hangup_that_is_ignored_as_under_nohup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal("finishing") as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_log_goes_on_where_its_terminal_is_gone(tmp_path):
    reader, writer = os.openpty()
    with os.fdopen(writer, "w", encoding="utf-8") as terminal:
        with RunLog(tmp_path, print_freq=1, stream=terminal) as log:
            log.start_epoch(1, 1, 3, 0)
            os.close(reader)
            log.step(StepRecord(1, 1, 1, 0.5, 0.5, 1e-3, 1e-4, 1.0, 1))
            log.note("nobody reads this")
        with contextlib.suppress(OSError):
            terminal.close()
    assert len(rows(tmp_path / "log.csv")) == 1


def test_second_signal_stops_at_once_and_handlers_come_back(capfd):
    before = signal.getsignal(signal.SIGINT)
    with StopSignal("finishing") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and "SIGINT: finishing" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopSignal("finishing") as stop, pytest.raises(KeyboardInterrupt), stop.at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_csv_log_of_another_version_is_left_alone(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,other\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        CsvLog(path, ("step", "time"), 1)
    assert path.read_text() == "step,other\n1,2\n"


def test_command_says_how_to_go_on_and_where_things_are(tmp_path, interrupt_at, capsys):
    folder = tmp_path / "my run"
    options = yaml.safe_dump(
        {k: v for k, v in MODEL.items() if k not in ("input_size", "word_len")} | {"clip": _plain_clip()}
    )
    (tmp_path / "tiny.yaml").write_text(options)
    options = "dataset=synthetic input_size=64 word_len=12 batch_size=4 epochs=2 limit_train=8 evaluate=false workers=0"
    args = [str(tmp_path / "tiny.yaml"), *options.split(), "device=cpu", f"output_folder={folder}"]
    interrupt_at(1)
    assert run(load_options(TrainConfig, args)) == 130
    command = capsys.readouterr().out.splitlines()[-1].strip()
    assert command == f"fastris train '{folder / 'config.yaml'}' --resume"
    assert run(load_options(TrainConfig, [str(folder / "config.yaml"), "--resume"])) == 0
    printed = capsys.readouterr().out
    assert "done: 2 epochs, 4 steps" in printed
    assert f"fastris eval model='{folder / 'last.pth'}' dataset=synthetic split=val" in printed


def _plain_clip():
    return {name: list(value) if isinstance(value, tuple) else value for name, value in MODEL["clip"].items()}


def test_log_holds_the_learning_rates_of_each_step(uninterrupted):
    log = rows(uninterrupted / "log.csv")
    assert [float(row["lr"]) for row in log] == pytest.approx([1e-3] * 4 + [1e-4] * 4)
    assert [float(row["lr_backbone"]) for row in log] == pytest.approx([1e-4] * 4 + [1e-5] * 4)
