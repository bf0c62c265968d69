"""Read untrusted PyTorch files: archives of ``torch.save`` and ``torch.jit.save``, and ``torch.save``'s older format.

No code from the file is executed, nothing compressed is unpacked, and memory stays within the file's size.
:mod:`.torch_pickle` reads the pickle; this module reads the tensors' bytes for it, each once, and verifies checksums.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from fastris.runtime.torch_pickle import MAX_BYTES, Machine
from fastris.runtime.torch_values import Malformed, Record, Refused, Storage

_ZIP = b"PK\3\4"
_MAX_DIRECTORY = 4 << 20  # bytes; 1000 tensors take 0.1 MB
_CHUNK = 8 << 20
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_STORE_PLAIN = "torch.save stores tensors as they are: save it again with it, where the file was made"


def read_pytorch(path: Path, *, values: bool = True) -> Any:
    """Read what ``torch.save`` wrote, on the CPU; for a TorchScript archive its outermost :class:`Record`.

    ``values=False`` skips the tensors' values, which shows quickly whether the file can be read.

    Raises Refused for content that is not read; the message continues after the file's name. A damaged file raises one
    of several errors: Malformed, zipfile.BadZipFile, EOFError, ...
    """
    with path.open("rb") as file:
        return _Archive.open(file, values).read() if file.read(4) == _ZIP else _Legacy(file).read()


def script_weights(module: Record) -> dict[str, Tensor]:
    """The state dict of a TorchScript module: its tensors and those of its submodules, by dotted name.

    A module is recognised by the ``training`` flag, which all of them have. Raises Refused for a module with a
    ``__setstate__`` of its own, which would have to be executed.
    """
    weights = dict(_tensors_of(module, ""))
    if not weights:
        raise Refused("holds a TorchScript module without weights; give CLIP's archive, such as RN50.pt")
    return weights


def _tensors_of(record: Record, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of a module and its submodules. The machine has already refused cycles and deep nesting."""
    if not isinstance(record.state, dict):
        raise Refused(
            f"holds a TorchScript module ({prefix.rstrip('.') or record.kind}) with a __setstate__ of its own, which "
            "would have to be run; load it where it was made and save its state_dict() with torch.save"
        )
    for name, value in record.state.items():
        if not isinstance(name, str):
            raise Malformed("an attribute without a name")
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Record) and (not isinstance(value.state, dict) or "training" in value.state):
            yield from _tensors_of(value, f"{prefix}{name}.")


@dataclass
class _Archive:
    """A zip archive that PyTorch wrote."""

    file: IO[bytes]
    length: int
    entries: dict[str, zipfile.ZipInfo]
    root: str
    values: bool = True
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, file: IO[bytes], values: bool) -> _Archive:
        length = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(_Listing(file)) as archive:  # type: ignore[arg-type]
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise Malformed("two entries of one name")
        roots = {name.partition("/")[0] for name in entries}
        if len(roots) == 1 and f"{next(iter(roots))}/model.json" in entries:
            raise Refused(
                "is a TorchScript archive of PyTorch before 1.4, which is not read; load it there with "
                "torch.jit.load and save its state_dict() with torch.save"
            )
        found = sorted(name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl"))
        if len(found) != 1:
            raise Malformed("a zip file without PyTorch's data.pkl")
        self = cls(file, length, entries, found[0].removesuffix("data.pkl"), values)
        self._check_sizes()
        return self

    def _check_sizes(self) -> None:
        """Raise Refused unless all entries that will be read are uncompressed and together fit into the file."""
        read = {name: entry for name, entry in self.entries.items() if not name.startswith(f"{self.root}code/")}
        for name, entry in read.items():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                how = "encrypted" if entry.flag_bits & 1 else "compressed"
                raise Refused(
                    f"is damaged, or holds {how} entries ({name[:99]}), which are not unpacked; {_STORE_PLAIN}"
                )
        total = sum(max(entry.file_size, entry.compress_size) for entry in read.values())
        if total > self.length:
            raise Refused(
                f"is damaged, or packed: it claims to hold {total} bytes, but is {self.length} bytes long, so it is "
                f"not read; {_STORE_PLAIN}"
            )

    def read(self) -> Any:
        order = self.root + "byteorder"
        if order in self.entries and self._bytes(order) != sys.byteorder.encode():
            raise Refused(
                f"is damaged, or was written on a machine of another byte order than this one; {_STORE_PLAIN}"
            )
        pickle = self._bytes(self.root + "data.pkl")
        return Machine(self._storage).run(io.BytesIO(pickle))

    def _storage(self, dtype: torch.dtype, key: str, count: int) -> Storage:
        name = f"{self.root}data/{key}"
        if name not in self.entries:
            raise Malformed(f"no bytes for the tensor {key[:40]!r}")
        if self.entries[name].file_size != count * dtype.itemsize:
            held = self.entries[name].file_size
            raise Malformed(f"{count} values of {dtype} are announced, {held} bytes are there")
        if key not in self.buffers:
            entry = self.entries[name]
            self.buffers[key] = self._tensor(entry) if self.values else torch.empty(entry.file_size, dtype=torch.uint8)
        return Storage(self.buffers[key], dtype)

    def _bytes(self, name: str) -> bytes:
        if self.entries[name].file_size > MAX_BYTES:
            raise Refused(
                f"is damaged, or holds over {MAX_BYTES >> 20} MB beside its tensors: not read; {_STORE_PLAIN}"
            )
        return self._tensor(self.entries[name]).numpy().tobytes()

    def _tensor(self, entry: zipfile.ZipInfo) -> Tensor:
        """The entry's bytes, checked against its checksum; 0 means that it was saved without one."""
        self.file.seek(entry.header_offset)
        header = self.file.read(30)
        if len(header) != 30 or header[:4] != _ZIP:
            raise Malformed(f"no entry where {entry.filename[:100]!r} should be")
        names, extra = struct.unpack("<HH", header[26:])
        self.file.seek(names + extra, os.SEEK_CUR)
        buffer = torch.empty(entry.file_size, dtype=torch.uint8)
        checksum = _read_into(self.file, buffer)
        if entry.CRC and checksum != entry.CRC:
            raise Malformed(f"checksum of {entry.filename[:100]!r} is wrong")
        return buffer


class _Listing:
    """A file for zipfile that limits how much of it can be read at once, and so the size of the zip directory."""

    def __init__(self, file: IO[bytes]):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        data = self.file.read(_MAX_DIRECTORY + 1 if count < 0 else min(count, _MAX_DIRECTORY + 1))
        if len(data) > _MAX_DIRECTORY:
            raise Refused(f"is damaged, or holds a directory of more than {_MAX_DIRECTORY >> 20} MB; {_STORE_PLAIN}")
        return data

    def seekable(self) -> bool:
        return True


def _read_into(file: IO[bytes], buffer: Tensor) -> int:
    """Fill the buffer (uint8) from the file's position on; returns the CRC-32 of the bytes."""
    view, checksum = memoryview(cast(Any, buffer.numpy())), 0
    while len(view):
        count = file.readinto(view[:_CHUNK])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"the file ends {len(view)} bytes before the end of a tensor")
        checksum = zlib.crc32(view[:count], checksum)
        view = view[count:]
    return checksum


class _Legacy:
    """``torch.save``'s format before PyTorch 1.6: five pickles, then for every storage its length and its bytes."""

    def __init__(self, file: IO[bytes]):
        self.file, self.left = file, os.fstat(file.fileno()).st_size
        self.storages: dict[str, Storage] = {}

    def read(self) -> Any:
        self.file.seek(0)
        machine = Machine(self._storage)
        if machine.run(self.file) != _LEGACY_MAGIC or machine.run(self.file) != _LEGACY_VERSION:
            raise Malformed("no PyTorch file")
        system = machine.run(self.file)
        if not isinstance(system, dict) or system.get("little_endian", True) != (sys.byteorder == "little"):
            raise Refused(
                f"is damaged, or was written on a machine of another byte order than this one; {_STORE_PLAIN}"
            )
        content, keys = machine.run(self.file), machine.run(self.file)
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(self.storages):
            raise Malformed("tensors without bytes")
        for key in keys:
            self._fill(self.storages[key])
        return content

    def _storage(self, dtype: torch.dtype, key: str, count: int) -> Storage:
        """Memory for a storage's bytes, which come later in the file; in total no more than the file's size."""
        if key not in self.storages:
            size = count * dtype.itemsize
            self.left -= size
            if self.left < 0:
                raise Malformed(f"{count} values of {dtype} are announced, which the file is too short for")
            self.storages[key] = Storage(torch.empty(size, dtype=torch.uint8), dtype)
        return self.storages[key]

    def _fill(self, storage: Storage) -> None:
        count = struct.unpack("<q", self.file.read(8))[0]
        if count * storage.dtype.itemsize != len(storage.buffer):
            raise Malformed(f"{count} values where {len(storage.buffer)} bytes are announced")
        _read_into(self.file, storage.buffer)
