"""A font that has a text's characters, in any script, or a text that the font at hand can show.

Pillow's own font has ASCII alone. For other texts the system's fonts are searched for the one that lacks the fewest of
their characters; those that it lacks are written as their codes, such as ``\\u7ea2``, with a warning.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

MOST = 400
"""Fonts that are looked into."""

_SUFFIXES = (".ttf", ".otf", ".ttc")
_FIRST = ("notosanscjk", "notosans", "dejavusans", "unicode", "wqy", "pingfang", "hiragino", "msyh", "yugoth", "malgun")
"""Beginnings of names, in lower case and without spaces, of fonts that have many scripts."""
_STYLES = ("bold", "italic", "oblique", "black", "light", "thin", "medium", "mono", "condensed", "serif")
_SHOWS_NONE = ("lastresort", "adobeblank")
"""Beginnings of names of fonts that have a sign for every character, but not the character's own."""
_NOTHING = "\uffff"  # which is no character, so that a font shows what it shows for one that it lacks


def folders() -> list[Path]:
    """Where this system keeps fonts."""
    home = Path.home()
    found = {
        "darwin": [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"],
        "win32": [Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts"],
    }.get(sys.platform, [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".local/share/fonts"])
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin:  # it brings DejaVu Sans
        found = [*found, Path(matplotlib.origin).parent / "mpl-data/fonts/ttf"]
    return found


def fitted(text: str, size: int) -> tuple[Any, str]:
    """A font of ``size`` pixels, and ``text``, of which characters that it lacks are codes."""
    from PIL import ImageFont

    font: Any = ImageFont.load_default(size)
    missing = missing_in(font, text)
    if missing and (path := _best_font(frozenset(text), len(missing))):
        font = ImageFont.truetype(path, size)
        missing = missing_in(font, text)
    if not missing:
        return font, text
    named = "".join(sorted(missing))[:20]
    warnings.warn(
        f"no font of this system has all of a phrase: {named!r} is missing, so captions show codes of these "
        "characters; install one such as Noto Sans CJK",
        stacklevel=3,
    )
    return font, "".join(_code(each) if each in missing else each for each in text)


def missing_in(font: Any, text: str) -> set[str]:
    """The characters of a text that a font lacks; white space and ASCII are in all."""
    nothing = _drawn(font, _NOTHING)
    rare = {each for each in text if not (each.isascii() or each.isspace())}
    return {each for each in rare if _drawn(font, each) in (nothing, None)}


def _drawn(font: Any, character: str) -> tuple[tuple[int, int], bytes] | None:
    try:
        mask = font.getmask(character)
    except (OSError, ValueError, UnicodeError):
        return None
    return mask.size, bytes(mask)


def _code(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode("ascii")


@lru_cache(maxsize=256)
def _best_font(characters: frozenset[str], most: int) -> str:
    """The path of the font that lacks the fewest of these characters; empty where none lacks fewer than ``most``."""
    from PIL import ImageFont

    text, best = "".join(characters), ""
    for path in _files()[:MOST]:
        try:
            missing = len(missing_in(ImageFont.truetype(path, 20), text))
        except (OSError, ValueError):
            continue
        if missing < most:
            best, most = path, missing
        if not missing:
            break
    return best


@lru_cache(maxsize=1)
def _files() -> list[str]:
    """The paths of the system's fonts, those with many scripts first, in a fixed order."""

    def rank(path: str) -> tuple[int, bool, int, str]:
        name = _bare(path)
        place = next((place for place, first in enumerate(_FIRST) if name.startswith(first)), len(_FIRST))
        return place, any(style in name for style in _STYLES), len(name), path

    return sorted((path for path in _walk() if not _bare(path).startswith(_SHOWS_NONE)), key=rank)


def _bare(path: str) -> str:
    return Path(path).stem.lower().replace(" ", "").replace("-", "")


def _walk() -> Iterator[str]:
    for folder in folders():
        for root, _, names in os.walk(folder):
            yield from (os.path.join(root, name) for name in names if name.lower().endswith(_SUFFIXES))
