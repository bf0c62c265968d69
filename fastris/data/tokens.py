"""Tokenizers: sentences to token ids, CLIP's or another model's, cut to the model's length as published."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import torch

from fastris.data import wordpiece
from fastris.data.base import MAX_CHARACTERS
from fastris.models.vocabulary import PUBLISHED

START, END, PAD = 49406, 49407, 0
CONTEXT_LENGTH = 77
_SHOWN_WORDS = 12


class TokenBatch(NamedTuple):
    """Token ids of N sentences.

    Attributes:
        tokens: (N, L) int64: start, the sentence's pieces, end, zeros.
        truncated: per sentence, whether it was longer than L and lost its last pieces.
    """

    tokens: torch.Tensor
    truncated: list[bool]


@cache
def _tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@lru_cache(maxsize=1 << 16)
def _encode(sentence: str) -> tuple[int, ...]:
    return tuple(_tokenizer().encode(sentence))


def token_ids(words: Sequence[str]) -> set[int]:
    """The ids of CLIP's vocabulary that these words are made of."""
    return {token for word in words for token in _encode(word)}


@lru_cache(maxsize=8)
def _kept(vocabulary: str) -> dict[int, int]:
    """CLIP's id -> the model's, of the ids in ``vocabulary``, which commas separate."""
    return {int(token): number for number, token in enumerate(vocabulary.split(","))}


def tokenize(sentences: str | Sequence[str], word_len: int, vocabulary: str = "") -> TokenBatch:
    """Encode sentences with CLIP's byte-pair vocabulary.

    Every row is the start token 49406, the sentence, the end token 49407, then zeros. A sentence that does not fit
    is cut so that the last of the `word_len` tokens is the end token, and flagged in `truncated`. (0 is also the id of
    "!" glued to rarer punctuation; the model takes that for padding, as published.)

    Args:
        sentences: one sentence or N of them.
        word_len: L, the number of tokens per row, 3 to 77; published are 17 (RefCOCO, RefCOCO+) and 22 (RefCOCOg).
        vocabulary: the ids that the model has embeddings of, in order, with commas between them; all if empty. The
            rows hold their places in it. A word that is not of them is passed over, and a warning names it.

    Returns:
        TokenBatch: tokens (N, L) int64 on the CPU, and the flags of the sentences that were cut.

    Raises:
        ValueError: `word_len` is out of range, or a sentence is empty or only white space, longer than 1000
            characters, spells one of the vocabulary's marks, holds half of a character, or has no word that the
            `vocabulary` has; the message quotes it.
        TypeError: a sentence is not a string.

    Source: `tokenize` in the published `utils/dataset.py`, which is CLIP's own with truncation.
    """
    if isinstance(sentences, str):
        sentences = [sentences]
    if not 3 <= word_len <= CONTEXT_LENGTH:
        raise ValueError(f"word_len={word_len} must lie in 3..{CONTEXT_LENGTH}: start, one or more words, end")
    tokens = torch.full((len(sentences), word_len), PAD, dtype=torch.int64)
    truncated = []
    kept = _kept(vocabulary) if vocabulary else {}
    unknown: dict[str, None] = {}
    for row, sentence in enumerate(sentences):
        words = _checked_words(f"sentences[{row}]", sentence)
        if kept:
            words, strange = _known_words(words, kept)
            if not words:
                raise ValueError(f"sentences[{row}]={sentence!r} has no word that this model knows; {_knows(kept)}")
            unknown |= dict.fromkeys(strange)
        ids = [START, *words[: word_len - 2], END]
        tokens[row, : len(ids)] = torch.tensor([kept[token] for token in ids] if kept else ids)
        truncated.append(len(words) > word_len - 2)
    if unknown:
        named = ", ".join(repr(word) for word in unknown)
        warnings.warn(f"this model does not know {named}, and passes over it; {_knows(kept)}", stacklevel=2)
    return TokenBatch(tokens, truncated)


def _known_words(tokens: Sequence[int], kept: dict[int, int]) -> tuple[tuple[int, ...], list[str]]:
    """The tokens of the words of which all tokens are kept, and the other words."""
    known: list[int] = []
    strange: list[str] = []
    word: list[int] = []
    for token in tokens:
        word.append(token)
        if not _ends_word(token):
            continue
        if kept.keys() >= set(word) and PAD not in word:
            known += word
        else:
            strange.append(_tokenizer().decode(word).strip())
        word = []
    return tuple(known), strange


def _ends_word(token: int) -> bool:
    return _tokenizer().decoder[token].endswith("</w>")


def _knows(kept: dict[int, int]) -> str:
    whole = sorted(_tokenizer().decode([token]).strip() for token in kept if _ends_word(token))
    return f"it knows few words: {', '.join(whole[:_SHOWN_WORDS])}{', ...' * (len(whole) > _SHOWN_WORDS)}"


def tokenize_wordpiece(
    sentences: str | Sequence[str], word_len: int, vocabulary: str = PUBLISHED, keeps_end: bool = False
) -> TokenBatch:
    """Encode sentences with BERT's WordPiece; arguments, result and errors as for :func:`tokenize`.

    Every row is [CLS], the sentence's pieces, [SEP], then zeros, cut at `word_len` as AlignFormer and MagNet were
    released: a sentence of `word_len - 1` pieces loses its [SEP] and no word. With `keeps_end` pieces are cut so that
    [SEP] is always there. `vocabulary` as for :func:`fastris.data.wordpiece.word_piece`.
    """
    if isinstance(sentences, str):
        sentences = [sentences]
    if word_len < 3:
        raise ValueError(f"word_len={word_len} must be 3 or more: start, one or more words, end")
    splitter = wordpiece.word_piece(vocabulary)
    tokens = torch.full((len(sentences), word_len), PAD, dtype=torch.int64)
    truncated = []
    for row, sentence in enumerate(sentences):
        name = f"sentences[{row}]"
        _check_text(name, sentence)
        pieces = splitter.pieces(sentence)
        _check_pieces(name, sentence, pieces, (PAD, splitter.start, splitter.end))
        room = word_len - 2 if keeps_end else word_len - 1
        ids = [splitter.start, *pieces[:room], splitter.end][:word_len]
        tokens[row, : len(ids)] = torch.tensor(ids)
        truncated.append(len(pieces) > room)
    return TokenBatch(tokens, truncated)


Tokenizer: TypeAlias = Callable[[str | Sequence[str], int], TokenBatch]
"""(sentences, L) -> tokens (N, L) padded with 0, and the flags of those that were cut, as :func:`tokenize`."""

TOKENIZERS: dict[str, Callable[..., TokenBatch]] = {
    "clip": tokenize,
    "wordpiece": tokenize_wordpiece,
    "wordpiece_ended": partial(tokenize_wordpiece, keeps_end=True),
}
"""Tokenizers by name; a model names its own in :class:`fastris.models.inputs.Inputs`."""


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer ``name``; of ``name:vocabulary``, with that vocabulary as its argument.

    Raises ValueError, listing the known names, for an unknown one.
    """
    kind, _, vocabulary = name.partition(":")
    if kind not in TOKENIZERS:
        raise ValueError(f"tokenizer {kind!r} is unknown; known are {', '.join(TOKENIZERS)}: add it to TOKENIZERS")
    return partial(TOKENIZERS[kind], vocabulary=vocabulary) if vocabulary else TOKENIZERS[kind]


def check_sentence(sentence: str) -> None:
    """Raise the error that `tokenize` raises for a sentence that it does not take."""
    _checked_words("sentence", sentence)


def _checked_words(name: str, sentence: str) -> tuple[int, ...]:
    _check_text(name, sentence)
    words = _encode(sentence)
    _check_pieces(name, sentence, words, (START, END))
    return words


def _check_text(name: str, sentence: str) -> None:
    if not isinstance(sentence, str):
        raise TypeError(f"{name} is {type(sentence).__name__}, but must be a string")
    if len(sentence) > MAX_CHARACTERS:
        raise ValueError(f"{name} has {len(sentence)} characters, but may have {MAX_CHARACTERS}; give a short phrase")
    if any("\ud800" <= character <= "\udfff" for character in sentence):
        raise ValueError(f"{name}={sentence!r} holds half of a character (a lone surrogate); write it anew")


def _check_pieces(name: str, sentence: str, pieces: Sequence[int], marks: Sequence[int]) -> None:
    if not pieces:
        raise ValueError(f"{name}={sentence!r} holds no word; give an expression that names the object")
    if not set(marks).isdisjoint(pieces):
        raise ValueError(f"{name}={sentence!r} spells a mark of the vocabulary (start or end of text); leave it out")
