"""The errors that Triton, its compiler and a GPU really raise are told by their reason, with what mends them."""

from __future__ import annotations

import errno
import subprocess
import sys
import sysconfig
from collections.abc import Callable

import pytest
import torch

from fastris.preflight.reasons import Failure, explain
from fastris.testing import WrongNumber

GPU = torch.device("cuda", 0)


def explained(call: Callable[[], object]) -> Failure:
    """What is made of the error that ``call`` raises."""
    with pytest.raises(Exception) as raised:
        call()
    return explain(raised.value, GPU)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Triton's own build of a C file against Python's headers, as its driver's first use makes it."""
    module = pytest.importorskip("triton.runtime.build")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    find = getattr(module, "_find_compiler", None)  # remembers what it found
    if find is not None:
        find.cache_clear()
    yield lambda: module.compile_module_from_src("#include <Python.h>", "driver")
    if find is not None:
        find.cache_clear()


def test_missing_c_compiler(build, monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = explained(build)
    assert found.everywhere and "no C compiler" in found.reason and "apt install gcc" in found.mend


def test_compiler_that_cc_names_in_vain(build, monkeypatch):
    monkeypatch.setenv("CC", "/no/such/gcc")
    found = explained(build)
    assert found.everywhere and "/no/such/gcc, which the variable CC names" in found.reason


def test_compiler_that_may_not_be_run(build, monkeypatch, tmp_path):
    (tmp_path / "gcc").write_text("no program")
    monkeypatch.setenv("CC", str(tmp_path / "gcc"))
    found = explained(build)
    assert found.everywhere and f"{tmp_path}/gcc, which the variable CC names, cannot be run" in found.reason
    assert "CC" in found.mend and "CACHE" not in found.mend


def test_missing_headers_of_python(build, monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme=None: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "false")  # fails as gcc does without the header
    found = explained(build)
    assert found.everywhere and f"Python.h, which Triton compiles against, is not in {tmp_path}" in found.reason
    assert "python3-dev" in found.mend


def test_compiler_that_fails_otherwise(build, monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme=None: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "false")
    found = explained(build)
    assert found.everywhere and "the C compiler false failed (exit status 1" in found.reason


def test_shared_memory_that_the_card_does_not_have():
    errors = pytest.importorskip("triton.runtime.errors")

    def launch():
        raise errors.OutOfResources(131072, 101376, "shared memory")

    found = explained(launch)
    assert found == Failure(found.reason, found.mend) and not found.everywhere
    assert "one needs 131072 of the GPU's shared memory, which has 101376" in found.reason


@pytest.mark.parametrize(
    ("error", "reason", "mend"),
    [
        (RuntimeError("0 active drivers ([]). There should only be one."), "no driver", "update the NVIDIA driver"),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "cannot load", "update the NVIDIA"),
        (
            RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."),
            "older than Triton's compiler",
            "update the NVIDIA driver",
        ),
        (AssertionError("libcuda.so cannot found!\nPossible files"), "libcuda.so.1", "ldconfig"),
        (subprocess.CalledProcessError(1, ["/sbin/ldconfig", "-p"]), "ldconfig failed", "TRITON_LIBCUDA_PATH"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/sbin/ldconfig"), "no ldconfig", "TRITON_LIBCUDA_PATH"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/.triton"), "/root/.triton", "TRITON_CACHE_DIR"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left", "TRITON_CACHE_DIR"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/file/x"), "/a/file/x", "TRITON_CACHE_DIR"),
        (FileExistsError(errno.EEXIST, "File exists", "/a/file"), "/a/file", "TRITON_CACHE_DIR"),
        (
            ImportError("/home/me/.triton/cache/x/driver.so: failed to map segment from shared object"),
            "cannot be loaded",
            "noexec",
        ),
        (ImportError("libcuda.so.1: cannot open shared object file"), "libcuda.so.1", "ldconfig"),
        (ImportError("libtriton.so: cannot open"), "cannot be imported", "pip install"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "no memory left", "free memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "outside its memory", "FASTRIS_IMPL"),
        (WrongNumber("output 0: error 1e-1 of scale 1"), "numbers are wrong (output 0", "report"),
        (KeyError("BLOCK_N"), "KeyError: 'BLOCK_N'", "report"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_error_has_its_reason_and_its_mend(error, reason, mend):
    def fail():
        raise error

    found = explained(fail)
    assert reason in found.reason and mend in found.mend, found
    assert "\n" not in str(found)


def test_assembler_that_fails():
    errors = pytest.importorskip("triton.runtime.errors")

    def compile_():
        raise errors.PTXASError("`ptxas` failed with error code 255")

    assert "assembler failed" in explained(compile_).reason


def test_cause_counts_where_another_error_hides_it():
    def wrapped():
        try:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
        except RuntimeError as error:
            raise ValueError("while compiling") from error

    assert "no C compiler" in explained(wrapped).reason


@pytest.mark.slow
def test_reasons_need_no_triton():
    code = "import sys; sys.modules['triton'] = None; import fastris.preflight, fastris.ops"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
