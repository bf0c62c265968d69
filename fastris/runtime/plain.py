"""Print untrusted text safely, and check paths and counts that users give."""

from __future__ import annotations

import json
import re
import stat
import unicodedata
from pathlib import Path
from typing import Any

_HARMLESS = "\u200c\u200d"  # join letters or keep them apart, in Persian or in emoji
_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = {
    stat.S_IFREG: "",
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a pipe and no file",
    stat.S_IFSOCK: "is a socket and no file",
    stat.S_IFCHR: "is a device and no file",
    stat.S_IFBLK: "is a device and no file",
}


def printable(text: object) -> str:
    """``text`` on one line, without characters that control a terminal or that UTF-8 cannot encode.

    Control characters (such as line feeds and the start of terminal codes), characters that change the direction of
    text, and lone surrogates (with which Python represents odd bytes of a file's name) are escaped, as in ``\\x1b``.
    """
    plain = str(text)
    return plain if plain.isascii() and plain.isprintable() else "".join(map(_escaped, plain))


def _escaped(character: str) -> str:
    if character.isprintable() or character in _HARMLESS:
        return character
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape").decode("ascii")
    return character


def json_text(value: Any, indent: int | None = 2) -> str:
    """``value`` as JSON that can be encoded as UTF-8: lone surrogates become JSON escapes.

    ``indent``: spaces a level; None for all on one line.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def why_no_file(mode: int) -> str:
    """Why what has this ``st_mode`` is no file to read, as in "is a folder"; empty for a regular file."""
    return _KINDS.get(stat.S_IFMT(mode), "is no file")


def check_file(name: str, path: Path, mend: str) -> None:
    """Raise an error unless ``path`` is a regular file that can be read; the message is ``name``, the reason, ``mend``.

    FileNotFoundError: there is nothing, or a folder, pipe or device. PermissionError or OSError: it cannot be read.
    Never waits: a pipe is not opened.
    """
    try:
        why = why_no_file(path.stat().st_mode)
        if not why:
            path.open("rb").close()
            return
    except (FileNotFoundError, NotADirectoryError):
        why = "does not exist"
    except ValueError:  # a null byte
        why = "is no name that a file can have"
    except OSError as error:
        kind = PermissionError if isinstance(error, PermissionError) else OSError
        raise kind(f"{name} cannot be read: {error.strerror or error}; {mend}") from None
    raise FileNotFoundError(f"{name} {why}; {mend}")


def check_at_least(least: int, **counts: int | None) -> None:
    """Raise ValueError, naming the first of ``counts`` that is smaller than ``least``; None is not checked."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{name}={count} must be at least {least}")
