"""WordPiece, BERT's way to split sentences, by the optional library ``tokenizers``, and where vocabularies are."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from fastris.models.vocabulary import END, START, read_vocabulary
from fastris.runtime.extras import need


class WordPiece(NamedTuple):
    """A vocabulary in use: ``pieces`` splits a sentence, and the ids of the marks around one."""

    tokenizer: Any
    start: int
    end: int

    def pieces(self, sentence: str) -> list[int]:
        """The ids of a sentence's pieces, in lower case and without accents, without marks around them."""
        return list(self.tokenizer.encode(sentence, add_special_tokens=False).ids)


@lru_cache(maxsize=4)
def word_piece(vocabulary: str) -> WordPiece:
    """WordPiece with the vocabulary of BERT's vocab.txt: a path, a Hugging Face id, or ``built-in``.

    Raises MissingExtra without the library ``tokenizers``, FileNotFoundError where there is neither a file nor a
    connection, ValueError for a file that is no such vocabulary.
    """
    library = need("tokenizers", "alignformer", "for BERT's WordPiece")
    ids = read_vocabulary(vocabulary)
    return WordPiece(library.BertWordPieceTokenizer(ids, lowercase=True), ids[START], ids[END])
