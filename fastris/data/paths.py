"""File names that a data set's own files give, kept inside the folder that they belong to."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from fastris.data.base import DataError


def safe_name(name: str, where: str, *, key: str = "file_name", folder: str = "the folder of images") -> str:
    """The name, if by its spelling it stays inside of its folder on every system.

    Raises:
        DataError: it is absolute, climbs with "..", or is no name at all; the message begins with `where`.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leaves = posix.is_absolute() or windows.is_absolute() or windows.drive or ".." in (*posix.parts, *windows.parts)
    if leaves or "\0" in name or not posix.parts or len(name) > 1000:
        shown = repr(name if len(name) <= 200 else name[:200] + "...")
        raise DataError(f"{where} has {key} {shown}, which leaves {folder}; correct it")
    return name


def leaves_by_link(root: Path, name: str) -> bool:
    """Whether a safe name leads out of `root` through a symbolic link below it.

    `root` itself may be a link, and lie anywhere: whoever lays out the files chose it, the data set did not.
    """
    path = root
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            return not Path(os.path.realpath(root / name)).is_relative_to(os.path.realpath(root))
    return False
