"""Whether `auto` takes an operator's kernels: by the GPU's file, read once, or by the conservative table."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastris.runtime.processes import is_main
from fastris.tuned import files
from fastris.tuned.files import Identity, Tuning
from fastris.tuned.unmeasured import expected_loss


class Preference(NamedTuple):
    """Whether the kernels are taken, and why, as the end of a sentence."""

    triton: bool
    why: str


Tiles = Mapping[str, Mapping[str, Any]]

_preferences: dict[tuple[str, int, str, str], Preference] = {}
_tunings: dict[int, Tuning | None] = {}
_capabilities: dict[int, tuple[int, int]] = {}
_lock = threading.RLock()
_use_tiles: Callable[[int, Tiles], None] | None = None


def on_tiles(use: Callable[[int, Tiles], None]) -> None:
    """Let ``use(index, tiles)`` make the kernels on GPU ``index`` launch with measured tiles, once its file is read."""
    global _use_tiles
    _use_tiles = use


def preference(operator: str, index: int, precision: str, bucket: str) -> Preference:
    """Whether ``auto`` takes the kernels of ``operator`` on GPU ``index``: the file's answer, or the table's."""
    key = operator, index, precision, bucket
    if key not in _preferences:
        _preferences[key] = _preference(*key)
    return _preferences[key]


def _preference(operator: str, index: int, precision: str, bucket: str) -> Preference:
    tuning = tuning_of(index)
    row = None if tuning is None else tuning.rows.get((operator, precision, bucket))
    if row is None:
        loss = expected_loss(operator, precision, bucket, _capabilities[index])
        return Preference(loss is None, f"{loss}; not measured here (fastris tune)" if loss else "not measured here")
    if row.gain is None:
        return Preference(False, row.note or "the kernels could not be measured")
    ratio = f"{row.gain:.2f}x as fast as the torch path"
    return Preference(row.takes_triton, f"measured: {ratio}" + ("" if row.takes_triton else ", no more than noise"))


def tuning_of(index: int) -> Tuning | None:
    """What was measured of GPU ``index``, or None: the user's own file, or the one that comes with fastris."""
    if index in _tunings:
        return _tunings[index]
    with _lock:
        if index not in _tunings:
            properties = torch.cuda.get_device_properties(index)
            number = properties.major, properties.minor
            _capabilities[index] = number if torch.version.hip is None else (0, 0)  # AMD's numbers mean other cards
            tuning = find_tuning(properties.name)
            _tunings[index] = tuning if tuning is None or _tiles_are_used(index, tuning) else None
    return _tunings[index]


def _tiles_are_used(index: int, tuning: Tuning) -> bool:
    if not tuning.tiles or _use_tiles is None:
        return True
    try:
        _use_tiles(index, tuning.tiles)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        path = _own_file(tuning.identity.gpu) or files.CARDS
        _tell(path, f"is damaged: its tiles are not those of these kernels ({error})")
        return False
    return True


def find_tuning(gpu: str) -> Tuning | None:
    """The measurements of a GPU model that hold here. A file of the user's that does not is told once."""
    here = files.identity_of(gpu)
    path = _own_file(gpu)
    own = path and _believed(path, here, ("gpu", "torch", "triton", "driver", "kernels"), told=True)
    return own or _believed(files.CARDS / files.file_name(gpu), here, ("gpu", "kernels"), told=False)


def _own_file(gpu: str) -> Path | None:
    """The user's file; None for a user without a home folder, who has none."""
    try:
        return files.own_file(gpu)
    except ValueError:
        return None


def forget() -> None:
    """Read the files anew when they are next asked for."""
    with _lock:
        _tunings.clear()
        _preferences.clear()


def _believed(path: Path, here: Identity, names: tuple[str, ...], *, told: bool) -> Tuning | None:
    try:
        tuning = files.read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        why = f"is damaged or no file of `fastris tune` ({error})"
    else:
        other = tuning.identity.differences(here, names)
        if not other:
            return tuning
        why = f"was measured with {', '.join(other)}"
    if told:
        _tell(path, why)
    return None


def _tell(path: Path, why: str) -> None:
    if is_main():
        warnings.warn(
            f"{path} {why}, so it is not used; the choices fall back on a conservative table. Run `fastris tune`",
            stacklevel=2,
        )
