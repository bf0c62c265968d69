"""The files in the folder, each written as a whole, and what makes a finished step stale.

summary.md         what to read first
results.json       everything that was measured, step by step, and the end of what each step printed
results.old.json   what results.json held before code, versions or device changed, if they did
log.txt            what the steps printed
now.json           the step under way and its items so far; gone when the step has ended
trace.json.gz      the profile, to open in Perfetto
tuned/GPU.json     what ``fastris tune`` chose, to ship with the package
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastris.runtime.storage import replacing

FORMAT = 1
RESULTS, OLD, LOG, NOW, SUMMARY = "results.json", "results.old.json", "log.txt", "now.json", "summary.md"
TUNED = "tuned"

PACKAGE = __package__  # bench.hour in a checkout, fastris.bench.hour where it is installed
TOP = Path(__file__).absolute().parents[len(PACKAGE.split("."))]
"""The folder from which the package is imported."""

PROBE = """
import json, platform, sys
import torch
from fastris.runtime.device import choose_device
device = choose_device(sys.argv[1])
found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
found["type"] = device.type
if device.type == "cuda":
    found["name"] = torch.cuda.get_device_name(device)
    found["capability"] = list(torch.cuda.get_device_capability(device))
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    found["triton"] = None
print(json.dumps(found))
"""


def environment(**extra: str) -> dict[str, str]:
    """The variables of a process: this package is importable, and what it prints comes at once."""
    path = os.pathsep.join(filter(None, [str(TOP), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **extra}


def probe(device: str) -> dict[str, Any]:
    """Versions and device, asked of a process of its own: this one never touches the GPU. ValueError where it fails."""
    command = [sys.executable, "-c", PROBE, device]
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        raise ValueError("PyTorch did not start within 180 s; see whether `nvidia-smi` answers") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"PyTorch or the device does not start: {last.removeprefix('ValueError: ')}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found["driver"] = _driver() if found["type"] == "cuda" else None
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def source_digest(folders: Sequence[str]) -> str:
    """Of every Python file in these folders of the checkout, as it is on disk; all of fastris where it is installed."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((TOP / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(TOP)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def fingerprint(found: dict[str, Any]) -> dict[str, Any]:
    """What a finished step depends on: if any of it changes, the step is done anew. ``tests`` matters to that step."""
    return {**found, "source": source_digest(("fastris", "kernels", "bench")), "tests": source_digest(("tests",))}


def is_current(step: str, entry: dict[str, Any], mark: dict[str, Any]) -> bool:
    """Whether a step's entry was made by this code, with these versions, on this device."""
    then = entry.get("fingerprint", {})
    return all(then.get(key) == mark[key] for key in mark if key != "tests" or step == "tests")


def new_content(mark: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "begun": now(), "fingerprint": mark, "starts": [], "steps": {}}


def load(folder: Path) -> dict[str, Any] | None:
    """What results.json holds; None where there is none. ValueError where it is no such file."""
    path = folder / RESULTS
    if not path.exists():
        return None
    content = read_json(path)
    kinds = {"starts": list, "steps": dict, "fingerprint": dict}
    own = isinstance(content, dict) and content.get("format") == FORMAT
    if not own or not all(isinstance(content.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path} was not written by this command; choose another folder")
    return content


def read_json(path: Path) -> Any:
    """What a JSON file holds, None where it is none or is missing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole, so that whoever reads it sees the old or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
