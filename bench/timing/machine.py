"""What the numbers were measured on: versions, device, threads, float32 precision, and the exact source."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastris.runtime.float32_precision import float32_precision
from fastris.runtime.host_memory import keep_freed_memory
from fastris.version import __version__

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def prepare(device: torch.device, threads: int | None = None) -> dict[str, Any]:
    """Make this process ready to measure: its threads, and on a CPU freed memory that is kept for all arms alike.

    Returns everything that a reader needs to measure the same again, as it goes into a result file. ``float32`` is what
    products of float32 tensors are computed in while steps are timed.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": {"type": device.type, "name": device_name(device)},
        "threads": torch.get_num_threads(),
        "float32": float32_precision(device),
        "keeps_freed_memory": device.type == "cpu" and keep_freed_memory(),
        "clocks": clocks(device),
        "system": platform.platform(),
        "versions": {
            "fastris": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _installed("triton"),
        },
        "git": git_state(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's as Linux knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return next(iter(_processor("model name")), "") or platform.processor() or platform.machine()


def _processor(field: str) -> list[str]:
    """What Linux says of each core; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(field)]


def clocks(device: torch.device) -> dict[str, str] | None:
    """Clock rates now and at most, and the power limit, as nvidia-smi or Linux gives them; None where neither does."""
    if device.type == "cuda":
        place = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
        answer = _output("nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", place)
        return None if answer is None else dict(zip(CLOCKS, answer.split(", "), strict=False))
    rates = [float(rate) for rate in _processor("cpu MHz")]
    return {"cpu": f"{min(rates):.0f} to {max(rates):.0f} MHz"} if rates else None


def git_state() -> dict[str, Any]:
    """The revision of this checkout, and whether anything but result files differs from it; None where unknown.

    An installed package has none: the repository that its environment may lie in is somebody else's.
    """
    if not (ROOT / "kernels").is_dir() or not (ROOT / "pyproject.toml").is_file():
        return {"revision": None, "dirty": None}
    revision = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def _output(*command: str) -> str | None:
    """What a command prints; None where it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
