"""Write files atomically, and read PyTorch files without executing code from them."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastris.runtime.plain import check_file
from fastris.runtime.torch_files import read_pytorch
from fastris.runtime.torch_values import Record, Refused

_STALE_AFTER = 3600.0  # seconds


def save_atomic(obj: Any, path: str | Path, keep: str | Path | None = None) -> None:
    """``torch.save`` that never leaves half a file: the old file stays until the new one is complete and on disk.

    With ``keep`` the old file is then moved to that path and replaces what was there; at no time are both missing.
    The folder is created if it does not exist. Raises OSError when the disk is full or not writable, and TypeError when
    ``obj`` holds something that :func:`load_torch` would refuse to read back; both leave the old file untouched.
    """
    with replacing(path, keep) as temporary:
        with temporary.open("wb") as file:
            torch.save(obj, file)
        with _numpy_scalars_allowed():
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(str(temporary))
        if refused:
            raise TypeError(
                f"obj holds {', '.join(sorted(refused))}, which could not be read back safely; "
                "put tensors, numbers, strings, or lists and dicts of them in its place"
            )
        try:
            read_pytorch(temporary, values=False)
        except Refused as error:
            raise TypeError(f"obj {error}") from None


@contextmanager
def replacing(path: str | Path, keep: str | Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; on success it replaces ``path``, after fsync, in one step.

    If ``keep`` is given, a path on the same file system, the old file is moved there.

    On any error, Ctrl-C included, the temporary file is removed and ``path`` is unchanged. Temporary files that killed
    processes left for the same ``path`` or ``keep`` are removed once they are an hour old. Raises OSError, naming
    ``path``.
    """
    path = _real(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it, such as {path / 'last.pth'}")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for written in (path,) if keep is None else (path, Path(keep).expanduser()):
            _remove_stale(written, _STALE_AFTER)
        yield temporary
        _sync(temporary)
        if keep is not None and path.exists():
            _keep(path, Path(keep).expanduser())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        failure = _os_error(error)
        if failure is None:
            raise
        raise OSError(
            failure.errno,
            f"could not write {path}: {failure.strerror or failure}; what was there before is untouched; "
            "free some space or choose another folder",
        ) from error
    with suppress(OSError):
        _sync(path.parent)


def load_torch(path: str | Path) -> Any:
    """Read a file that ``torch.save`` wrote, on the CPU, without executing any code from it.

    It may hold tensors, numbers (NumPy's too: a ``best_iou`` of ``numpy.float64``), strings, and lists and dicts of
    them. Unlike ``torch.load``, this bounds work and memory by the file's size and verifies checksums. Raises
    FileNotFoundError, or ValueError for a file that is damaged, is no checkpoint, is compressed, or holds Python
    objects or tensors that are not plain.
    """
    path = existing_file(path)
    content = read_torch(path)
    if isinstance(content, Record):
        raise ValueError(
            f"{path} is a TorchScript archive, a program and no checkpoint; CLIP's archives are read as weights of "
            "CLIP (clip_pretrain, fastris.weights.load.load_clip)"
        )
    return content


def read_torch(path: Path) -> Any:
    """As :func:`load_torch`; a TorchScript archive gives its outermost :class:`fastris.runtime.torch_values.Record`."""
    try:
        return read_pytorch(path)
    except Refused as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # a damaged file can fail anywhere, with any type
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: it points to before its beginning
            raise
        raise damaged(path, "PyTorch checkpoint", error) from error


def existing_file(path: str | Path) -> Path:
    """``path`` with ``~`` expanded. Raises FileNotFoundError or PermissionError unless it is a readable file."""
    path = Path(path).expanduser()
    check_file(str(path), path, "give the path of a checkpoint")
    return path


def damaged(path: Path, kind: str, error: Exception) -> ValueError:
    """The error for a damaged file, or for one that is no ``kind``."""
    reason = first_line(error).split(". This is")[0][:200]
    return ValueError(f"{path} is damaged or no {kind} ({reason}); copy or download it again, or take another file")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _numpy_scalars_allowed() -> AbstractContextManager[Any]:
    """A context in which ``weights_only`` allows NumPy's numbers, by NumPy 1's and 2's names, but no arrays."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return torch.serialization.safe_globals([np.dtype, *kinds, *((scalar, name) for name in names)])


def _keep(path: Path, keep: Path) -> None:
    """Link the file at ``path`` to the name ``keep`` as well; move it there on a file system without hard links."""
    link = keep.with_name(f".{keep.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        os.link(path, link)
    except OSError:
        os.replace(path, keep)
        return
    try:
        os.replace(link, keep)
    except BaseException:
        with suppress(OSError):
            link.unlink()
        raise


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(path: str | Path) -> None:
    """Remove temporary files that killed processes left when they wrote ``path``.

    Call it only where no other process can be writing ``path``. :func:`replacing` removes those that are an hour old.
    """
    _remove_stale(_real(path), 0.0)
    _remove_stale(Path(path).expanduser(), 0.0)  # as ``keep`` is written, beside a link


def _remove_stale(path: Path, age: float) -> None:
    """Remove temporary files of ``path`` that were last written ``age`` seconds ago, or earlier."""
    if not path.parent.is_dir():
        return
    for leftover in path.parent.iterdir():
        if leftover.name.startswith(f".{path.name}.") and leftover.suffix == ".tmp":
            with suppress(OSError):
                if not age or time.time() - leftover.stat().st_mtime > age:
                    leftover.unlink()


def _real(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path.resolve() if path.is_symlink() else path


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind ``error``: PyTorch's zip writer hides a full disk behind its own RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
