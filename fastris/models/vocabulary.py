"""BERT's vocabularies: which file or id a name stands for, and the pieces in it. Needs no optional library."""

from __future__ import annotations

from pathlib import Path

BUILT_IN = "built-in"
"""Names the vocabulary of the built-in scenes, which needs no file."""
PUBLISHED = "google-bert/bert-base-uncased"
PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
MARKS = (PAD, UNKNOWN, START, END)
MASK = "[MASK]"
"""Stands for a hidden word; no sentence has it, and not every vocabulary."""
CONTINUES = "##"
"""What a piece begins with that goes on with a word."""

_MAX_BYTES = 16 << 20  # BERT's vocab.txt has 0.2 MB, that of 104 languages 1 MB
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_WORDS = (
    "above at below big blue bottom box centre circle closest corner cross disc down far furthest green higher "
    "highest huge in large left leftmost little lower lowest middle nearest next object of on one over plus "
    "purple red right rightmost shape sign small square star than the thing tiny to top topmost triangle under "
    "upper very yellow"
)


def read_vocabulary(vocabulary: str) -> dict[str, int]:
    """The pieces of a vocab.txt and their ids, its line numbers: of a path, a Hugging Face id, or ``built-in``.

    Raises FileNotFoundError where there is neither a file nor a connection, ValueError for a file that is no such
    vocabulary.
    """
    if vocabulary == BUILT_IN:
        listed = [*MARKS, *_LETTERS, *(f"##{letter}" for letter in _LETTERS), *".,'-!?&", *_WORDS.split(), MASK]
    else:
        path = Path(vocabulary).expanduser()
        listed = _lines(path if path.exists() or path.suffix == ".txt" else _download(vocabulary), vocabulary)
    ids = {piece: number for number, piece in enumerate(listed)}
    absent = [mark for mark in MARKS if mark not in ids]
    if absent or ids[PAD] != 0:
        what = f"lacks {', '.join(absent)}" if absent else f"has {PAD} in line {ids[PAD] + 1}, not in its first"
        raise ValueError(f"vocabulary {vocabulary} {what}; give the vocab.txt of a BERT model")
    return ids


def _lines(path: Path, vocabulary: str) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"vocabulary: there is no file {vocabulary}; give the path of BERT's vocab.txt, the Hugging Face id "
            f"{PUBLISHED}, or {BUILT_IN} for the words of the built-in scenes"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"vocabulary {vocabulary} is larger than {_MAX_BYTES >> 20} MB; give the vocab.txt of BERT")
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"vocabulary {vocabulary} is no UTF-8 text; give the vocab.txt of a BERT model") from error


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, "vocab.txt"))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise FileNotFoundError(
            f"vocabulary: there is no file {name} here, and Hugging Face gave no vocab.txt of that id ({reason}); "
            "without a network, fetch BERT's vocab.txt elsewhere and give its path as vocabulary=PATH"
        ) from error
