"""Text and files that others named: what may be printed of a text, and why a path is no file that one can read."""

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
    stat.S_ISDIR: "is a folder",
    stat.S_ISFIFO: "is a pipe and no file",
    stat.S_ISSOCK: "is a socket and no file",
    stat.S_ISCHR: "is a device and no file",
    stat.S_ISBLK: "is a device and no file",
}


def printable(text: object) -> str:
    """``text`` in one line that does nothing to a terminal and that every encoding of Unicode can hold.

    Control characters (line feeds and the start of terminal codes among them), characters that turn the direction of
    what follows, and lone surrogates (as Python reads odd bytes of a file's name) come escaped, as in ``\\x1b``.
    """
    plain = str(text)
    return plain if plain.isascii() and plain.isprintable() else "".join(map(_escaped, plain))


def _escaped(character: str) -> str:
    if character.isprintable() or character in _HARMLESS:
        return character
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape").decode("ascii")
    return character


def json_text(value: Any) -> str:
    """``value`` as JSON of one name a line that can be written as UTF-8: lone surrogates come as JSON's own escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def check_file(name: str, path: Path, mend: str) -> None:
    """Raise the error that says why ``path`` is no file that can be read: ``name``, the reason, and ``mend``.

    FileNotFoundError: nothing is there, or a folder, a pipe, a device. PermissionError, or OSError: it cannot be read.
    Never waits: a pipe is not opened.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
            return
        why = next((text for is_kind, text in _KINDS.items() if is_kind(mode)), "is no file")
    except (FileNotFoundError, NotADirectoryError):
        why = "does not exist"
    except ValueError:  # a null byte
        why = "is no name that a file can have"
    except OSError as error:
        kind = PermissionError if isinstance(error, PermissionError) else OSError
        raise kind(f"{name} cannot be read: {error.strerror or error}; {mend}") from None
    raise FileNotFoundError(f"{name} {why}; {mend}")


def check_at_least(least: int, **counts: int | None) -> None:
    """Raise a ValueError that names the first of ``counts`` that is smaller than ``least``; None is none to check."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{name}={count} must be at least {least}")
