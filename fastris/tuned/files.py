"""The file of one GPU's measurements: what it holds, whether it may be believed, where it lies.

JSON. It is believed where it was measured: on the same GPU model, with the same PyTorch, Triton, driver and kernels.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastris.operators import OPERATORS
from fastris.runtime.plain import json_text, why_no_file
from fastris.runtime.storage import replacing
from fastris.tuned.sizes import BUCKETS, PRECISIONS

FORMAT = 1
MOST_BYTES = 2**20
CARDS = Path(__file__).parent / "cards"
"""Files that come with fastris, one for each GPU model."""


@dataclass(frozen=True)
class Identity:
    """What a measurement depends on."""

    gpu: str
    torch: str
    triton: str
    driver: str
    kernels: str

    def differences(self, here: Identity, names: Iterable[str]) -> list[str]:
        """Where this, a file's, is another than ``here``, each as "PyTorch 2.11 and not 2.15"."""
        spelled = {"gpu": "GPU", "torch": "PyTorch", "triton": "Triton", "driver": "driver", "kernels": "kernels"}
        pairs = {name: (getattr(self, name), getattr(here, name)) for name in names}
        return [f"{spelled[name]} {was} and not {now}" for name, (was, now) in pairs.items() if was != now]


@dataclass(frozen=True)
class Row:
    """One measurement: seconds of a forward and backward pass by either path, and the spread of each, a fraction.

    ``triton`` is None where the kernels were not timed, and ``note`` says why.
    """

    operator: str
    precision: str
    bucket: str
    torch: float
    torch_spread: float
    triton: float | None
    triton_spread: float
    takes_triton: bool
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.operator, self.precision, self.bucket

    @property
    def gain(self) -> float | None:
        """How many times faster the kernels are."""
        return self.torch / self.triton if self.triton else None


@dataclass
class Tuning:
    """One GPU's file: rows by (operator, precision, bucket), and the tiles that won, in kernels/configs.py's words."""

    identity: Identity
    rows: dict[tuple[str, str, str], Row] = field(default_factory=dict)
    tiles: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """In one step: a reader finds the old file or the new one. Raises OSError that names the path."""
        rows = [asdict(row) for row in self.rows.values()]
        content = {"format": FORMAT, "identity": asdict(self.identity), "rows": rows, "tiles": self.tiles}
        with replacing(path) as temporary:
            temporary.write_text(json_text(content) + "\n", encoding="utf-8")


def read(path: Path) -> Tuning:
    """The file's content. Raises OSError, or ValueError for anything that :meth:`Tuning.write` would not write."""
    if why := why_no_file(path.stat().st_mode):  # a pipe would be waited for
        raise ValueError(f"it {why}")
    with path.open("rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError("it is too large")
    try:
        content = json.loads(text.decode("utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
        identity = Identity(**{name: _text(value) for name, value in content["identity"].items()})
        rows = [_row(**values) for values in content["rows"]]
        return Tuning(identity, {row.key: row for row in rows}, dict(map(_tile, content["tiles"].items())))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except OverflowError:
        raise ValueError("it holds a number that is too large") from None
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"something is missing or of another kind ({error})") from None


def _row(**values: Any) -> Row:
    row = Row(**values)
    if row.operator not in OPERATORS or row.precision not in PRECISIONS or row.bucket not in BUCKETS:
        raise ValueError(f"it knows {row.key}, which fastris does not")
    for name in ("torch", "triton"):
        seconds, spread = getattr(row, name), getattr(row, f"{name}_spread")
        timed = [spread] if seconds is None and name == "triton" else [seconds, spread]
        if not all(type(value) in (int, float) and math.isfinite(value) and value >= 0 for value in timed):
            raise ValueError(f"the {name} time of {row.operator} is no number of seconds")
    if row.torch <= 0 or row.triton == 0 or type(row.takes_triton) is not bool:
        raise ValueError(f"the row of {row.operator} is no measurement")
    _text(row.note)
    return row


def _tile(item: tuple[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    name, config = item
    numbers = [config["num_warps"], config["num_stages"], *config["blocks"].values()]
    if set(config) != {"blocks", "num_warps", "num_stages"} or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(f"the tiles of {name} are none")
    return _text(name), dict(config)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def own_file(gpu: str) -> Path:
    """Where the user's measurements of a GPU model lie."""
    return cache_folder() / "tuned" / file_name(gpu)


def file_name(gpu: str) -> str:
    """A file's name for a GPU model: "NVIDIA H100 80GB HBM3" becomes NVIDIA_H100_80GB_HBM3.json."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", gpu).strip("_") + ".json"


def cache_folder() -> Path:
    """FASTRIS_CACHE_DIR, or the folder "fastris" where the platform keeps what can be made again.

    Raises ValueError where the folder is a user's without one, as a container may run it.
    """
    try:
        return _cache_folder()
    except RuntimeError as error:
        mend = "name a folder, without ~, in the variable FASTRIS_CACHE_DIR"
        raise ValueError(f"there is no home folder to keep measurements in ({error}); {mend}") from None


def _cache_folder() -> Path:
    if own := os.environ.get("FASTRIS_CACHE_DIR"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path("~/AppData/Local").expanduser()) / "fastris"
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(usual).expanduser()) / "fastris"


def identity_of(gpu: str) -> Identity:
    """What measurements on a GPU of that name depend on here."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return Identity(gpu, str(torch.__version__), triton, _driver(), _kernels())


@functools.cache
def _driver() -> str:
    """The NVIDIA driver's version where Linux tells it, else the CUDA version that it knows."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
        if found := re.search(r"Kernel Module\D*?(\d+[\d.]+)", text):
            return found[1]
    except OSError:
        pass
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"CUDA {ask()}" if ask is not None else "unknown"


@functools.cache
def _kernels() -> str:
    """A digest of the kernels' source."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parents[1] / "kernels").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
