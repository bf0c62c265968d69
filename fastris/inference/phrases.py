"""Check a user's phrases before anything slow begins."""

from __future__ import annotations

from collections.abc import Sequence


def check_phrases(phrases: str | Sequence[str]) -> tuple[str, ...]:
    """Return the phrases as a tuple. Raises ValueError or TypeError if there is none or one is unusable."""
    checked = (phrases,) if isinstance(phrases, str) else tuple(phrases)
    if not checked:
        raise ValueError("phrases is empty; give at least one, such as 'the red cup on the left'")
    for i, phrase in enumerate(checked):
        if not isinstance(phrase, str):
            raise TypeError(f"phrases[{i}] must be text, got {type(phrase).__name__}")
        if not phrase.strip():
            raise ValueError(f"phrases[{i}] is {phrase!r}, which names nothing; write what to look for")
        if any("\ud800" <= character <= "\udfff" for character in phrase):
            raise ValueError(f"phrases[{i}] is {phrase!r}, which is no text in UTF-8; write it again")
    return checked
