"""BERT's WordPiece: known ids, where the cut falls, and vocabularies that are none."""

from __future__ import annotations

import sys

import pytest

from fastris.data import wordpiece
from fastris.data.scenes.dataset import SyntheticExpressions
from fastris.data.tokens import find_tokenizer, tokenize_wordpiece
from fastris.models.alignformer.config import AlignFormerConfig

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "giraffe", "##s", "left", "-", "red"]


@pytest.fixture
def vocabulary(tmp_path) -> str:
    pytest.importorskip("tokenizers", reason="WordPiece needs pip install 'fastris[alignformer]'")
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return str(path)


def test_rows_are_marks_pieces_and_zeros_in_lower_case_without_accents(vocabulary):
    tokens, truncated = find_tokenizer(f"wordpiece:{vocabulary}")(["The GIRÄFFES left-red", "red zebra"], 10)
    assert tokens.tolist() == [[2, 4, 5, 6, 7, 8, 9, 3, 0, 0], [2, 9, 1, 3, 0, 0, 0, 0, 0, 0]]
    assert truncated == [False, False]


def test_cut_may_take_the_end_mark_and_is_told_only_where_a_word_is_lost(vocabulary):
    phrases = ["red red red", "red red red red", "red red red red red"]
    tokens, truncated = tokenize_wordpiece(phrases, 5, vocabulary)
    assert tokens.tolist() == [[2, 9, 9, 9, 3], [2, 9, 9, 9, 9], [2, 9, 9, 9, 9]]
    assert truncated == [False, False, True]
    tokens, truncated = find_tokenizer(f"wordpiece_ended:{vocabulary}")(phrases, 5)
    assert tokens.tolist() == [[2, 9, 9, 9, 3]] * 3 and truncated == [False, True, True]


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("  ", "holds no word"),
        ("red [SEP] giraffe", "spells a mark of the vocabulary"),
        ("red \ud800", "half of a character"),
        ("red " * 300, "characters, but may have 1000"),
    ],
)
def test_sentence_without_words_with_marks_or_without_end_is_refused(vocabulary, sentence, message):
    with pytest.raises(ValueError, match=message):
        tokenize_wordpiece(sentence, 20, vocabulary)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the\n[UNK]\n[CLS]\n[SEP]\n[PAD]\n", r"has \[PAD\] in line 5, not in its first"),
        (b"a picture\n", r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
        (b"\xff\xfe\x00", "is no UTF-8 text"),
    ],
)
def test_file_that_is_no_vocabulary_is_one_line_with_its_name(content, message, tmp_path):
    pytest.importorskip("tokenizers", reason="WordPiece needs pip install 'fastris[alignformer]'")
    (tmp_path / "odd.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"vocabulary .*odd\.txt {message}"):
        tokenize_wordpiece("red", 5, str(tmp_path / "odd.txt"))


def test_vocabulary_that_is_not_there_says_what_to_give(tmp_path):
    pytest.importorskip("tokenizers", reason="WordPiece needs pip install 'fastris[alignformer]'")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.txt; give the path of BERT's vocab\.txt"):
        tokenize_wordpiece("red", 5, str(tmp_path / "missing.txt"))


def test_built_in_vocabulary_has_every_word_of_the_scenes_and_spells_others():
    pytest.importorskip("tokenizers", reason="WordPiece needs pip install 'fastris[alignformer]'")
    config = AlignFormerConfig.preset("alignformer_tiny")
    tokenize = find_tokenizer(config.inputs.tokenizer)
    scenes = SyntheticExpressions("train", scenes=40)
    phrases = [s for index in range(len(scenes)) for s in scenes.reference(index).sentences]
    tokens, truncated = tokenize(phrases, config.word_len)
    words = [len(phrase.replace("-", " - ").split()) for phrase in phrases]
    assert (tokens != 0).sum(1).tolist() == [count + 2 for count in words] and not any(truncated)
    assert 1 not in tokens and int(tokens.max()) < config.bert.vocab_size
    spelled = tokenize("zebra", 10).tokens[0].tolist()
    assert len([token for token in spelled if token]) == 7 and 1 not in spelled


def test_missing_extra_is_one_line_with_the_command_that_brings_it(monkeypatch):
    wordpiece.word_piece.cache_clear()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = r"^tokenizers is needed for BERT's WordPiece, and is not installed: pip install 'fastris\[alignformer\]'$"
    with pytest.raises(ImportError, match=message):
        tokenize_wordpiece("red", 5)
