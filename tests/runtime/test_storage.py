"""Files that are never half there, and files that are read without running them."""

from __future__ import annotations

import errno
import os
import posix
import resource
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from fastris.runtime.storage import load_torch, replacing, save_atomic

PUBLISHED = {"epoch": 7, "best_iou": np.float64(0.625), "prec": {"Pr@50": np.float32(0.5)}, "count": np.int64(3)}


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def files_limited_to(size: int):
    """No file of this process may grow beyond ``size`` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_training_state_comes_back_as_it_was_saved(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[35])
    saved = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "rng": torch.get_rng_state()}
    save_atomic({**PUBLISHED, **saved}, tmp_path / "last.pth")
    read = load_torch(tmp_path / "last.pth")
    assert read["best_iou"] == 0.625 and read["prec"]["Pr@50"] == 0.5 and read["count"] == 3
    assert read["scheduler"]["milestones"] == {35: 1}
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], saved["optimizer"]["state"][0]["exp_avg"])
    assert torch.equal(read["rng"], saved["rng"])
    assert names_in(tmp_path) == ["last.pth"]


def test_missing_folders_are_created(tmp_path):
    save_atomic({"epoch": 1}, tmp_path / "runs" / "first" / "last.pth")
    assert load_torch(tmp_path / "runs" / "first" / "last.pth") == {"epoch": 1}


def test_full_disk_is_one_clear_error_and_the_old_checkpoint_survives(tmp_path):
    path = tmp_path / "last.pth"
    save_atomic({"epoch": 1}, path)
    with pytest.raises(OSError, match=r"could not write .*last\.pth.*untouched") as caught, files_limited_to(100_000):
        save_atomic({"weights": torch.ones(100_000)}, path)
    assert caught.value.errno == errno.EFBIG
    assert load_torch(path) == {"epoch": 1} and names_in(tmp_path) == ["last.pth"]


def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "last.pth"
    save_atomic({"epoch": 1}, path)
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"half a checkpoint")
        raise KeyboardInterrupt
    assert load_torch(path) == {"epoch": 1} and names_in(tmp_path) == ["last.pth"]


def test_killed_process_never_leaves_half_a_checkpoint(tmp_path):
    program = (
        "import itertools, sys, torch\n"
        "from fastris.runtime.storage import save_atomic\n"
        "for step in itertools.count():\n"
        "    save_atomic({'step': step, 'weights': torch.full((300_000,), float(step))}, sys.argv[1])\n"
    )
    path = tmp_path / "last.pth"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)])
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(np.random.default_rng().uniform(0.05, 0.3))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    read = load_torch(path)
    assert torch.equal(read["weights"], torch.full((300_000,), float(read["step"])))


def test_content_is_on_disk_before_it_takes_the_name_and_the_name_before_the_write_ends(tmp_path, monkeypatch):
    done, replace = [], os.replace

    def sync(descriptor: int) -> None:
        posix.fsync(descriptor)  # the real one, which other tests go without
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *paths: (replace(*paths), done.append(str(paths[1]))))
    save_atomic({"step": 1}, tmp_path / "last.pth")
    content, name, folder = done
    assert content.endswith(".tmp") and (name, folder) == (str(tmp_path / "last.pth"), str(tmp_path))


def test_leftovers_of_killed_processes_go_after_an_hour(tmp_path):
    fresh, stale, other = (tmp_path / name for name in (".last.pth.aa.tmp", ".last.pth.bb.tmp", ".best.pth.cc.tmp"))
    for leftover in (fresh, stale, other):
        leftover.write_bytes(b"half")
    for leftover in (stale, other):
        os.utime(leftover, (time.time() - 7200,) * 2)
    save_atomic({"epoch": 1}, tmp_path / "last.pth")
    assert names_in(tmp_path) == sorted([fresh.name, other.name, "last.pth"])


def test_leftovers_under_the_name_that_the_old_file_gets_go_after_an_hour_too(tmp_path):
    fresh, stale = (tmp_path / name for name in (".previous.pth.aa.tmp", ".previous.pth.bb.tmp"))
    for leftover in (fresh, stale):
        leftover.write_bytes(b"half")
    os.utime(stale, (time.time() - 7200,) * 2)
    save_atomic({"epoch": 1}, tmp_path / "last.pth", keep=tmp_path / "previous.pth")
    assert names_in(tmp_path) == sorted([fresh.name, "last.pth"])


def test_old_file_that_cannot_be_kept_leaves_no_second_name_behind(tmp_path, monkeypatch):
    path, keep, replace = tmp_path / "last.pth", tmp_path / "previous.pth", os.replace
    save_atomic({"epoch": 1}, path)

    def refuse(source, target):
        if target == keep:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"could not write .*last\.pth"):
        save_atomic({"epoch": 2}, path, keep=keep)
    assert load_torch(path) == {"epoch": 1} and names_in(tmp_path) == ["last.pth"]


def test_symlinked_checkpoint_stays_a_link_to_the_new_content(tmp_path):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "real.pth", tmp_path / "last.pth"
    save_atomic({"epoch": 1}, target)
    link.symlink_to(target)
    save_atomic({"epoch": 2}, link)
    assert link.is_symlink() and load_torch(target) == {"epoch": 2}


def test_saved_file_is_as_readable_as_any_other(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    save_atomic({"epoch": 1}, tmp_path / "last.pth")
    assert (tmp_path / "last.pth").stat().st_mode == plain.stat().st_mode


def test_objects_that_could_not_be_read_back_are_refused_when_saving(tmp_path):
    save_atomic({"epoch": 1}, tmp_path / "last.pth")
    with pytest.raises(TypeError, match=r"numpy\.ndarray.*could not be read back"):
        save_atomic({"rng": np.arange(3)}, tmp_path / "last.pth")
    assert load_torch(tmp_path / "last.pth") == {"epoch": 1} and names_in(tmp_path) == ["last.pth"]


def test_folder_in_place_of_a_file_is_refused_before_writing(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder; give the name of a file"):
        save_atomic({}, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not write"):
        save_atomic({}, tmp_path / "file" / "last.pth")


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_truncated_checkpoint_is_one_error_that_names_the_file_and_the_mend(tmp_path, keep):
    path = tmp_path / "cut.pth"
    save_atomic({"weights": torch.arange(10_000.0)}, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"cut\.pth is damaged or no PyTorch checkpoint .*copy or download it again"):
        load_torch(path)


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html>", b"version https://git-lfs", b"\x80\x02garbage", b"PK\3\4"]
)
def test_file_that_is_no_checkpoint_is_one_error(tmp_path, content):
    path = tmp_path / "page.pth"
    path.write_bytes(content * 5)
    with pytest.raises(ValueError, match=r"page\.pth is damaged or no PyTorch checkpoint"):
        load_torch(path)


def test_one_flipped_bit_in_the_weights_is_noticed(tmp_path):
    path = tmp_path / "flipped.pth"
    save_atomic({"weights": torch.arange(10_000.0)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.pth is damaged"):
        load_torch(path)


def test_file_saved_without_checksums_is_read(tmp_path):
    path = tmp_path / "plain.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"epoch": 3}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_torch(path) == {"epoch": 3}


class RunsCode:
    """Pickled, it asks the reader to create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused_by_name_and_not_run(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "extra": RunsCode(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"evil\.pth holds a Python object \(posix\.mkdir\).*save it again"):
        load_torch(path)
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        load_torch(path)
    assert not (tmp_path / "ran").exists()


def test_numpy_arrays_are_refused_but_numpy_numbers_of_both_numpy_generations_are_read(tmp_path):
    path = tmp_path / "old.pth"
    torch.save(OrderedDict(PUBLISHED), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
    for generation in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        renamed = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        path.write_bytes(renamed.replace(b"numpy.core.multiarray", generation))
        assert load_torch(path) == PUBLISHED
    torch.save({"array": np.arange(3)}, path)
    with pytest.raises(ValueError, match="holds a Python object"):
        load_torch(path)


def test_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth does not exist"):
        load_torch(tmp_path / "gone.pth")
