"""Find what tells of one's machine in texts that are about to be published."""

from __future__ import annotations

import re

_PATHS = (
    re.compile(r"(?<![\w:/.<)\]}*])/(?:home|Users|root|mnt|media|data|scratch|tmp|var|opt|srv|work|workspace|storage|"
               r"gpfs|lustre|nfs|export|private|Volumes|content|kaggle)/[^\s\"'`<>|)\],;]+"),
    re.compile(r"(?<![\w:/.<)\]}*])(?:/[\w.~+@-]+){3,}"),
    re.compile(r"(?<!\w)~\w*/[^\s\"'`<>|)\],;]+"),
    re.compile(r"(?<!\w)[A-Za-z]:\\[^\s\"'`<>|)\],;]+"),
    re.compile(r"\\\\[\w.-]+\\[^\s\"'`<>|)\],;]+"),
    re.compile(r"\bfile://[^\s\"'`<>|)\],;]+"),
)  # fmt: skip
_SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def private_words(text: str) -> list[tuple[int, str]]:
    """(number of the line, what it says) of paths of a machine and of access tokens; a token's text is not repeated."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if _SECRETS.search(line):
            found.append((number, "an access token"))
        if match := next(filter(None, (pattern.search(line) for pattern in _PATHS)), None):
            found.append((number, match[0].rstrip(".:")))
    return found


def check_public(name: str, text: str) -> None:
    """Raise ValueError, with the first such line, for a text that names paths of a machine or a token."""
    if found := private_words(text):
        number, word = found[0]
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"{name}, line {number}, would publish {word}{more}; write it without what tells of your machine, then "
            "push again"
        )
