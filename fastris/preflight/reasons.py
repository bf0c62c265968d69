"""What an error of Triton, its compiler or the GPU means, and what its reader can do about it."""

from __future__ import annotations

import errno
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastris.testing import WrongNumber

COMPILER = "install one (apt install gcc, dnf install gcc, conda install gcc_linux-64) or name it in the variable CC"
HEADERS = "install them (apt install python3-dev, dnf install python3-devel), or take a Python that brings them"
DRIVER = "update the NVIDIA driver, or install PyTorch and Triton for the CUDA version that it knows (nvidia-smi)"
REPORT = "nothing in your code; please report it with what `fastris doctor` prints"
RESTART = "start again with FASTRIS_IMPL=torch: after this error the process cannot use the GPU any more"
LIBRARY = "run ldconfig as root, or set TRITON_LIBCUDA_PATH to the folder that holds libcuda.so.1"

UNWRITABLE = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
"""Errors of a folder that cannot be written to, or that is none."""


@dataclass(frozen=True)
class Failure:
    """Why kernels are not used, and what mends it, as parts of a sentence.

    ``everywhere``: of this GPU, whatever the operator and the dtype. ``passing``: it says nothing of the kernels, and
    another moment may answer otherwise.
    """

    reason: str
    mend: str
    everywhere: bool = False
    passing: bool = False

    def in_process(self, number: int) -> Failure:
        """The same, as the other processes of a run tell it."""
        return replace(self, reason=f"in process {number} of the run {self.reason}")

    def __str__(self) -> str:
        return f"{self.reason} (to mend it: {self.mend})"


_TEXTS = (
    (
        "failed to find c compiler",
        Failure("Triton found no C compiler, which it needs on every machine", COMPILER, True),
    ),
    ("libcuda.so cannot found", Failure("Triton did not find the driver's library libcuda.so.1", LIBRARY, True)),
    ("active drivers", Failure("Triton found no driver, or more than one", DRIVER, True)),
    ("unsupported toolchain", Failure("the driver is older than Triton's compiler", DRIVER, True)),
    ("driver version is insufficient", Failure("the driver is older than Triton needs", DRIVER, True)),
    ("device kernel image is invalid", Failure("the driver cannot load what Triton compiles", DRIVER, True)),
    ("no kernel image is available", Failure("what was compiled is not for this GPU", DRIVER, True)),
    ("illegal memory access", Failure("a kernel read or wrote outside its memory", RESTART, True)),
    ("illegal instruction", Failure("a kernel held an instruction that this GPU does not know", RESTART, True)),
    ("misaligned address", Failure("a kernel read or wrote at a misaligned address", RESTART, True)),
    ("unspecified launch failure", Failure("a kernel crashed", RESTART, True)),
)
"""What errors without a type of their own say, in small letters, and what it means."""


def explain(error: BaseException, device: torch.device) -> Failure:
    """What went wrong in a proof on ``device``."""
    chain = list(_chain(error))
    for each in chain:
        if (found := _by_type(each, device)) is not None:
            return found
    for each in chain:
        text = str(each).lower()
        for words, found in _TEXTS:
            if words in text:
                return found
    if any("ptxas" in str(each).lower() or type(each).__name__ == "PTXASError" for each in chain):
        return Failure(f"Triton's assembler failed ({_line(error)})", DRIVER)
    return Failure(f"they failed to compile or to run ({type(error).__name__}: {_line(error)})", REPORT)


def _by_type(error: BaseException, device: torch.device) -> Failure | None:
    name = type(error).__name__
    if isinstance(error, WrongNumber):
        return Failure(f"their numbers are wrong ({_line(error)})", REPORT)
    if name == "OutOfResources":  # triton.runtime.errors
        required, limit, kind = (getattr(error, field, "?") for field in ("required", "limit", "name"))
        return Failure(f"one needs {required} of the GPU's {kind}, which has {limit}", REPORT)
    if isinstance(error, torch.OutOfMemoryError):
        mend = "free memory on it and start again; the proof itself needs a few MiB"
        return Failure("there was no memory left on the GPU to prove them", mend, passing=True)
    if isinstance(error, subprocess.CalledProcessError):
        return _compiler_failed(error)
    if isinstance(error, FileNotFoundError) and "ldconfig" in str(error.filename):
        return Failure("Triton found no ldconfig, by which it looks for libcuda.so.1", LIBRARY, True)
    compiler = os.environ.get("CC")
    if isinstance(error, FileNotFoundError) and compiler and error.filename == compiler:
        return Failure(f"there is no C compiler {compiler}, which the variable CC names", COMPILER, True)
    if isinstance(error, OSError) and compiler and error.filename == compiler:
        why = f"the C compiler {compiler}, which the variable CC names, cannot be run ({error.strerror})"
        return Failure(why, COMPILER, True)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        told = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        mend = "set TRITON_CACHE_DIR to a folder that can be written to and has space"
        return Failure(f"Triton cannot write what it compiles ({told})", mend, True)
    if isinstance(error, ImportError) and "failed to map segment" in str(error):
        mend = "set TRITON_CACHE_DIR to a folder of a file system that is not mounted noexec"
        return Failure(f"what Triton compiles cannot be loaded from where it keeps it ({_line(error)})", mend, True)
    if isinstance(error, ImportError) and "libcuda" in str(error):
        return Failure("the driver's library libcuda.so.1 cannot be loaded", LIBRARY, True)
    if isinstance(error, ImportError):
        return Failure(f"Triton cannot be imported ({_line(error)})", "pip install --force-reinstall triton", True)
    return None


def _compiler_failed(error: subprocess.CalledProcessError) -> Failure:
    """What it said went to the terminal and is lost; that Python's headers are missing can be seen."""
    command = error.cmd if isinstance(error.cmd, str) else str(error.cmd[0])
    if "ldconfig" in command:
        return Failure("ldconfig failed, by which Triton looks for libcuda.so.1", LIBRARY, True)
    folder = Path(sysconfig.get_paths(scheme=_scheme())["include"])
    if not (folder / "Python.h").exists():
        return Failure(f"Python.h, which Triton compiles against, is not in {folder}", HEADERS, True)
    return Failure(
        f"the C compiler {command} failed (exit status {error.returncode}; what it said stands above)",
        "mend what it says, or name another one in the variable CC",
        True,
    )


def _scheme() -> str:
    """Where Triton looks for Python's headers."""
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it, the last one first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
