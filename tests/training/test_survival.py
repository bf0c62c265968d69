"""What machines do to a run: each mishap gets one message, and the run goes on as if it had not happened."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from training_helpers import parts_of, rows, train_config, train_set

from fastris.commands import cli, fitting
from fastris.commands.train import train
from fastris.data import DataError
from fastris.data.samples import EpochSampler, TrainSamples
from fastris.data.scenes.dataset import SyntheticExpressions
from fastris.training import checkpoints
from fastris.training import loop as training
from fastris.training.log import RunLog
from fastris.weights.load import load_torch, save_atomic


def run(folder: Path, data: SyntheticExpressions | None = None, **changes):
    return train(train_config(folder, evaluate=False, **changes), data or train_set())


def assert_same_run(folder: Path, expected: Path) -> None:
    assert rows(folder / "log.csv") == rows(expected / "log.csv")
    ours, theirs = load_torch(folder / "last.pth"), load_torch(expected / "last.pth")
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())
    assert torch.equal(ours["rng"]["torch"], theirs["rng"]["torch"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_damaged_checkpoint_is_noticed_and_the_one_before_is_used(stopped, uninterrupted):
    flip(stopped / "last.pth")
    with pytest.warns(UserWarning, match=r"last\.pth is damaged .* Going on from the checkpoint before it, .*previous"):
        run(stopped, resume=True)
    assert_same_run(stopped, uninterrupted)


def test_damaged_checkpoint_never_takes_the_place_of_the_one_before(stopped, monkeypatch):
    empty(stopped / "last.pth")
    before = (stopped / "previous.pth").read_bytes()
    replace = os.replace

    def killed(source, target):
        if Path(target).name == "last.pth":
            raise SystemError("killed")
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(SystemError):
        run(stopped, resume=True)
    assert (stopped / "previous.pth").read_bytes() == before


def test_two_damaged_checkpoints_are_an_error_that_names_them(stopped):
    empty(stopped / "last.pth")
    cut(stopped / "previous.pth")
    with pytest.raises(ValueError, match=r"last\.pth is damaged.*previous\.pth is damaged.*start a new run in another"):
        run(stopped, resume=True)


def test_run_killed_between_the_two_checkpoints_goes_on_from_the_one_that_is_there(stopped, uninterrupted):
    (stopped / "last.pth").rename(stopped / "previous.pth")
    with pytest.raises(ValueError, match="already holds a run"):
        run(stopped)
    run(stopped, resume="auto")
    assert_same_run(stopped, uninterrupted)


def test_no_flipped_bit_or_lost_end_goes_unnoticed(tmp_path):
    path, generator = tmp_path / "last.pth", random.Random(0)
    whole = {"weights": torch.arange(300.0), "step": 7, "name": "a run", "rng": (1, 2.5, None)}
    save_atomic(whole, path)
    content, noticed = path.read_bytes(), 0
    for _ in range(400):
        damaged = bytearray(content)
        if generator.random() < 0.2:
            del damaged[generator.randrange(len(damaged)) :]
        else:
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            read = load_torch(path)
        except ValueError as error:
            assert "is damaged" in str(error)
            noticed += 1
        else:  # the bit was in padding, or in a time stamp
            assert str(read) == str(whole)
    assert noticed > 100


def fill_the_disk(monkeypatch, at_step: int) -> None:
    save = torch.save

    def full(content, file, **options):
        if content["step"] == at_step:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file, **options)

    monkeypatch.setattr(torch, "save", full)


def test_full_disk_ends_the_run_with_both_checkpoints_whole(tmp_path, uninterrupted, monkeypatch, capsys):
    fill_the_disk(monkeypatch, at_step=5)
    with pytest.raises(OSError, match=r"could not write .*last\.pth: No space left on device.*free some space"):
        run(tmp_path, save_every_steps=1)
    assert [load_torch(tmp_path / name)["step"] for name in ("last.pth", "previous.pth")] == [4, 4]
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    run(tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_log_on_a_full_disk_is_one_error_that_names_it(tmp_path, uninterrupted, monkeypatch):
    write = RunLog.step

    def full(log, record):
        if record.step == 3:
            log.steps._file.close()
            log.steps._file = open("/dev/full", "a")  # noqa: SIM115
            log.steps._writer.writer = __import__("csv").writer(log.steps._file)
        write(log, record)

    monkeypatch.setattr(RunLog, "step", full)
    with pytest.raises(OSError, match=r"could not write .*log\.csv: No space left on device; free some space"):
        run(tmp_path, save_every_steps=1)
    monkeypatch.undo()
    run(tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_folder_that_cannot_be_written_to_is_an_error_before_any_work(tmp_path, monkeypatch):
    def refuse(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(fitting, "load_split", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"output_folder: nothing can be written into .* \(Read-only file system\)"):
        train(train_config(tmp_path / "new" / "run"))
    monkeypatch.setattr(tempfile, "TemporaryFile", checkpoints.tempfile.NamedTemporaryFile)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"output_folder: nothing can be written into .*file \(Not a directory\)"):
        train(train_config(tmp_path / "file" / "run"))


class Vanishing(SyntheticExpressions):
    """The training set, but the image of one reference is gone, or kills who reads it."""

    def __init__(self, reference: int, killing: bool = False):
        super().__init__("train", scenes=4, size=64)
        self.gone, self.killing = reference, killing

    def image(self, index):
        if index == self.gone:
            if self.killing:
                os.kill(os.getpid(), signal.SIGKILL)
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", f"{index}.jpg")
        return super().image(index)


ORDER = [index for batch in EpochSampler(12, 0, 3) for index in batch]


@pytest.mark.parametrize(("workers", "place", "step"), [(0, 0, 0), (2, 11, 3)])
def test_vanished_image_ends_the_run_saved_and_it_goes_on_when_it_is_back(
    tmp_path, uninterrupted, workers, place, step
):
    with pytest.raises(DataError) as told:
        run(tmp_path, Vanishing(ORDER[place]), workers=workers)
    message = str(told.value)
    assert message.startswith(f"[Errno 2] No such file or directory: '{ORDER[place]}.jpg'. The next batch needs refer")
    assert f"last.pth is from step {step}. Mend it, then go on with fastris train" in message and "\n" not in message
    assert load_torch(tmp_path / "last.pth")["step"] == step
    run(tmp_path, workers=workers, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_killed_worker_is_one_message_and_the_run_goes_on_after_its_last_step(tmp_path, uninterrupted):
    with pytest.raises(RuntimeError) as told:
        run(tmp_path, Vanishing(ORDER[10], killing=True), workers=2)
    message = str(told.value)
    assert "which reads training images, " in message and "memory was full" in message and "workers=" in message
    steps = len(rows(tmp_path / "log.csv"))
    assert f"last.pth is from step {steps}; go on with fastris train" in message
    assert "--resume" in message and "\n" not in message
    assert load_torch(tmp_path / "last.pth")["step"] == steps
    run(tmp_path, workers=2, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_worker_that_is_killed_in_the_middle_of_a_step_lets_it_finish(tmp_path, uninterrupted, monkeypatch):
    step, done = torch.optim.Adam.step, []
    of_earlier_tests = {child.pid for child in multiprocessing.active_children()}

    def killing(optimizer, *args, **kwargs):
        done.append(optimizer)
        if len(done) == 2:
            (worker,) = {child.pid for child in multiprocessing.active_children()} - of_earlier_tests
            os.kill(worker, signal.SIGKILL)
            while not os.waitid(os.P_PID, worker, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.01)
            time.sleep(0.05)  # SIGCHLD is here, in the middle of the update
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", killing)
    with pytest.raises(
        RuntimeError, match=r"which reads training images, is killed by signal: Killed.*from step 3; go"
    ):
        run(tmp_path, workers=1)
    monkeypatch.undo()
    assert load_torch(tmp_path / "last.pth")["step"] == 3
    run(tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


@pytest.fixture
def nan_in(monkeypatch):
    """Put NaN into the images of some references."""

    def arm(references: set[int]) -> None:
        sample = TrainSamples.__getitem__

        def item(samples, index):
            found = sample(samples, index)
            return found | {"image": found["image"] * (float("nan") if index in references else 1)}

        monkeypatch.setattr(TrainSamples, "__getitem__", item)

    return arm


def test_batch_whose_loss_is_nan_is_left_out_counted_and_kept(tmp_path, nan_in, capsys):
    nan_in({ORDER[4]})
    result = run(tmp_path)
    assert result.step == 6  # one batch of each epoch is left out
    kept = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert kept[0]["references"] == ORDER[3:6] and (kept[0]["epoch"], kept[0]["batch"]) == (1, 2)
    assert kept[0]["ref_ids"] == [str(train_set().reference(index).ref_id) for index in ORDER[3:6]]
    assert all(ORDER[4] in row["references"] and row["loss"] == "nan" for row in kept) and len(kept) == 2
    state = load_torch(tmp_path / "last.pth")["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())  # BatchNorm's statistics too
    printed = capsys.readouterr().err
    assert "the loss is nan in epoch 1, batch 2" in printed and "1 of its batches were left out" in printed
    assert "mean loss nan" not in printed


def test_batch_that_is_left_out_changes_no_weight_and_no_statistic(tmp_path, nan_in):
    parts = parts_of(train_config(tmp_path))
    made, samples = parts.run, parts.batches.samples
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    nan_in({1})
    items = [samples[index] for index in range(3)]
    batch = {name: torch.stack([item[name] for item in items]) for name in ("image", "tokens", "mask")}
    made.model.train()
    assert not training.train_step(parts.plan, made, batch).applied
    for name, value in made.model.state_dict().items():
        assert "num_batches" in name or torch.equal(value, before[name]), name
    assert not made.optimizer.state


def test_gradient_that_is_not_finite_is_no_step_either(tmp_path):
    parts = parts_of(train_config(tmp_path))
    made, batches = parts.run, parts.batches
    batch = next(iter(torch.utils.data.DataLoader(batches.samples, batch_sampler=batches.sampler)))
    made.model.train()
    made.model.proj.txt.weight.register_hook(lambda gradient: gradient * float("inf"))
    result = training.train_step(parts.plan, made, batch)
    assert torch.isfinite(torch.tensor(result.loss)) and not result.applied
    assert not made.optimizer.state


def test_run_in_which_only_nan_comes_ends_with_the_ids_and_the_last_good_checkpoint(tmp_path, nan_in):
    nan_in(set(ORDER[6:]))
    with pytest.raises(RuntimeError) as told:
        run(tmp_path, max_skipped=2, save_every_steps=1)
    message = str(told.value)
    assert f"the loss is nan in epoch 1, batch 4 (references {ORDER[9:]})" in message
    assert "the last 2 in a row (max_skipped)" in message and "last.pth is from step 2" in message
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2
    assert load_torch(tmp_path / "last.pth")["step"] == 2


def test_streak_of_left_out_batches_goes_on_over_a_resume(tmp_path, nan_in):
    nan_in(set(range(12)))
    assert run(tmp_path, epochs=1, max_skipped=5).step == 0
    with pytest.raises(RuntimeError, match="the last 5 in a row"):
        run(tmp_path, epochs=2, max_skipped=5, resume=True)


def test_failure_is_one_line_on_the_command_line(tmp_path, monkeypatch, capsys):
    fill_the_disk(monkeypatch, at_step=0)
    (tmp_path / "options.yaml").write_text("{model: tiny, dataset: synthetic, batch_size: 4, limit_train: 8}")
    options = ["evaluate=false", "device=cpu", "input_size=64", f"output_folder={tmp_path / 'run'}"]
    assert cli.main(["train", str(tmp_path / "options.yaml"), *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastris train: ") and "No space left on device" in last
