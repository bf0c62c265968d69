"""Read and write safetensors files with checksums, which other programs read like any other.

The format itself has no checksums. fastris stores in the metadata the CRC-32 of every tensor's dtype, shape and bytes,
as PyTorch's own files do. It detects accidents, not attacks, and takes a fifth of a second for 600 MB, half of what
SHA-256 takes. Files from other programs, without checksums, are read as they are.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fastris.runtime.storage import damaged, first_line, replacing

CHECKSUMS = "fastris_crc32"
"""Name of the metadata entry: a JSON object, tensor's name -> CRC-32 in hexadecimal digits."""

_MAX_HEADER = 16 << 20  # bytes; CRIS on RN101 takes 0.2 MB, checksums and card included
_THREADS = min(8, os.cpu_count() or 1)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read (tensors on the CPU, metadata) from a file; checksums are verified if it has any.

    Raises ValueError for a damaged file, and where tensors do not match their checksums.
    """
    from safetensors import safe_open

    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # SafetensorError, and whatever PyTorch says to an unknown dtype
        raise damaged(path, "safetensors file", error) from error
    recorded = metadata.pop(CHECKSUMS, None)
    if recorded is not None:
        _verify(path, tensors, recorded)
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file, checksums included, without its tensors. Raises ValueError for a damaged file."""
    from safetensors import safe_open

    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except OSError:
        raise
    except Exception as error:
        raise damaged(path, "safetensors file", error) from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file in one step, with checksums in its metadata. After an OSError the old file is still there."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    sums = json.dumps(_checksums(whole), separators=(",", ":"))
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # that of any new file here; safetensors makes files of its owner alone
        try:
            save_file(whole, temporary, metadata={"format": "pt", **metadata, CHECKSUMS: sums})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            reason = os.strerror(int(number[1])) if number else first_line(error)
            raise OSError(int(number[1]) if number else 0, reason) from error
        if temporary.stat().st_mode != mode:
            with suppress(OSError):  # a file system whose files have no modes of their own
                temporary.chmod(stat.S_IMODE(mode))


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(tensors, threads.map(_checksum, tensors.values()), strict=True))


def _checksum(tensor: Tensor) -> str:
    kind = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(cast(Any, content), kind):08x}"


def _verify(path: Path, tensors: Mapping[str, Tensor], recorded: str) -> None:
    try:
        expected = json.loads(recorded)
    except (ValueError, RecursionError) as error:
        raise damaged(path, "safetensors file", error) from error
    if not isinstance(expected, dict):
        raise damaged(path, "safetensors file", ValueError(f"its {CHECKSUMS} is no JSON object"))
    found = _checksums(tensors)
    names = [name for name in found if found[name] != expected.get(name)]
    names += [name for name in expected if name not in found]
    if names:
        shown = ", ".join(name[:80] for name in names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(
            f"{path}: {len(names)} of {len(found)} tensors ({shown}) are not those that were written with its "
            "checksums. If nobody changed them, the file is damaged: copy or download it again. If another program "
            f"did, and kept the metadata: save its tensors without the metadata entry {CHECKSUMS}"
        )


def _check_header(path: Path) -> None:
    """Raise ValueError if the JSON header at the beginning is too large to be parsed."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER and path.stat().st_size > _MAX_HEADER:
        raise ValueError(
            f"{path} announces a header of {length} bytes, and at most {_MAX_HEADER} are read; "
            "copy or download it again, or take another file"
        )
