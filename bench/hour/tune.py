"""Step 5: ``fastris tune``, whose file stays beside the results: the steps after it run by it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .problems import Place, Skip
from .record import TUNED

LEAST_MINUTES = 0.5


def items(place: Place) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "tune", lambda: tune(place)


def tune(place: Place) -> dict[str, Any]:
    """Run the command for as long as is left; the runner has pointed its cache at the folder of the results."""
    if not place.is_gpu:
        raise Skip("fastris tune measures a GPU")
    command = [sys.executable, "-m", "fastris", "tune"]
    if subprocess.run([*command, "--help"], capture_output=True).returncode:
        raise Skip("this version has no `fastris tune`")
    minutes = max(LEAST_MINUTES, 0.85 * place.left / 60)
    done = subprocess.run([*command, f"device={place.device}", f"minutes={minutes:.2f}"])
    return kept(place.folder, done.returncode)


def kept(folder: Path, code: int) -> dict[str, Any]:
    """The files that tuning left. Raises RuntimeError where it failed or left none."""
    files = sorted(str(path.relative_to(folder)) for path in (folder / TUNED).glob("*.json"))
    if code or not files:
        raise RuntimeError(f"fastris tune ended with exit code {code}" + ("" if files else " and left no file"))
    return {"files": files}
