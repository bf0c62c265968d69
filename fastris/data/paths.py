"""Files that a data set names: kept inside the folder that they belong to, and read only if they are regular files.

A folder that the user names may be a link and lie anywhere. The names in it, and those in the data set's own files, are
untrusted: none may lead out of its folder, by its spelling or by a link, and pipes and devices, which never end, are
not opened.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from fastris.data.base import DataError, shown
from fastris.runtime.plain import why_no_file

GONE = "no file"
OUT = "a link that leads out of the folder"
IRREGULAR = "no regular file"
MAX_PART = 255  # bytes of one folder's or file's name, on every usual file system

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_PLAIN = re.compile(r"(?:[\w ()+,@=-][\w ()+,@=.-]*/)*[\w ()+,@=-][\w ()+,@=.-]*", re.ASCII)


def stays(name: str) -> bool:
    """Whether a name is, by its spelling alone, a valid relative path that stays in its folder on every system."""
    if len(name) <= MAX_PART and _PLAIN.fullmatch(name):
        return True
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.is_absolute() or windows.drive or windows.root:
        return False
    if ".." in (*posix.parts, *windows.parts) or "\0" in name or not posix.parts or len(name) > 1000:
        return False
    try:
        return all(len(os.fsencode(part)) <= MAX_PART for part in posix.parts)
    except UnicodeEncodeError:  # half a character
        return False


def safe_name(name: str, where: str, *, key: str = "file_name", folder: str = "the folder of images") -> str:
    """Return `name`, if by its spelling it stays in its folder on every system.

    Raises:
        DataError: it is absolute, contains "..", or cannot be a file's name; the message begins with `where`.
    """
    if not stays(name):
        raise DataError(f"{where} has {key} {shown(name)}, which leaves {folder} or names no file; correct it")
    return name


class Look:
    """Checks the files of images and masks. Results are cached: each name, and each folder, is looked at once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], str] = {}
        self._linked: dict[str, bool] = {}

    def __call__(self, folder: Path, name: str) -> str:
        """What is wrong with `folder / name`: `GONE`, `OUT`, `IRREGULAR` or the system's reason; "" for a file.

        This is the one place that decides whether a file may be opened. Links are followed, and must end inside of
        `folder`.
        """
        key = str(folder), name
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._find(key[0], name)
        return found

    def _find(self, folder: str, name: str) -> str:
        if not stays(name):
            return OUT
        name = os.path.normpath(name)
        path = os.path.join(folder, name)
        try:
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode) or self._through_link(folder, os.path.dirname(name)):
                if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
                    return OUT
                mode = os.stat(path).st_mode
        except OSError as error:
            return GONE if error.errno in _ABSENT else error.strerror or str(error)
        return "" if stat.S_ISREG(mode) else IRREGULAR

    def _through_link(self, root: str, inner: str) -> bool:
        """Whether the folder `inner` of `root` is a link, or lies in one that does; `root` itself may."""
        if not inner:
            return False
        path = os.path.join(root, inner)
        if path not in self._linked:
            self._linked[path] = os.path.islink(path) or self._through_link(root, os.path.dirname(inner))
        return self._linked[path]


def place(folder: Path, name: str, where: str, look: Look, *, key: str, kind: str, prefix: str = "") -> tuple[str, str]:
    """Find `name` in its folder, without `prefix` if there is no file with it: some write paths from the data's root.

    Returns:
        the name in the folder, and what `look` says of it ("" for a file).

    Raises:
        DataError: the name leaves the folder; the message begins with `where`.
    """
    safe_name(name, where, key=key, folder=kind)
    found = look(folder, name)
    if found and prefix and name.startswith(prefix):
        name = safe_name(name.removeprefix(prefix), where, key=key, folder=kind)
        found = look(folder, name)
    return name, found


def is_file(path: Path) -> bool:
    """Whether there is a file.

    Raises:
        DataError: it is no regular file, or the system refuses access, so that it is not known.
    """
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise unreadable(path, error) from error
    regular(path)
    return True


def is_dir(path: Path) -> bool:
    """Whether there is such a folder.

    Raises:
        DataError: the system refuses access.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise unreadable(path, error) from error
    except ValueError:  # not a path at all
        return False


def regular(path: Path) -> int:
    """The size in bytes of a regular file; links are followed.

    Raises:
        DataError: it is a pipe, a device or a folder, or cannot be accessed; the message says why.
    """
    try:
        state = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from error
    why = why_no_file(state.st_mode)
    if why:
        raise DataError(f"{path} {why}; put a regular file there")
    return state.st_size


@contextmanager
def opened(path: Path, max_bytes: int) -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Raises:
        DataError: it is larger than `max_bytes`, is no regular file, or the system refuses to read it.
    """
    size = regular(path)
    if size > max_bytes:
        raise DataError(f"{path} has {size} bytes and was not read; the limit is {max_bytes}")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise unreadable(path, error) from error


def content(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file; errors are those of `opened`."""
    with opened(path, max_bytes) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, max_bytes) + 1)  # read() allocates as much as it is asked for
    if len(data) > size or size > max_bytes:
        raise DataError(f"{path} has more bytes than the {size} that it had when it was opened; try again")
    return data


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file or folder that cannot be read, with the system's reason and the mend."""
    if error.errno in _ABSENT:
        mend = "put it there, or correct its name"
    elif error.errno in (errno.EACCES, errno.EPERM):
        mend = "give this account the right to read it"
    else:
        mend = "check the disk that holds it"
    return DataError(f"{path} cannot be read ({error.strerror or error}); {mend}")
