from __future__ import annotations

import pytest
import torch

from fastris.data.tokens import END, START, tokenize

SENTENCES = [
    "a red circle",
    "The person on the LEFT, holding an umbrella",
    "giraffe's  neck &amp; head",
    "zweite größte Uhr",
]


def test_known_ids_of_clips_vocabulary() -> None:
    tokens, truncated = tokenize("a photo of a cat", 17)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 10]
    assert truncated == [False]


@pytest.mark.parametrize("word_len", [3, 5, 17, 22, 77])
def test_rows_are_those_of_open_clips_own_tokenizer(word_len: int) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    assert torch.equal(tokenize(SENTENCES, word_len).tokens, SimpleTokenizer()(SENTENCES, context_length=word_len))


def test_a_long_sentence_is_cut_so_that_the_end_token_is_last_and_flagged() -> None:
    fits, cut = "a red circle", "a red circle left of it"
    tokens, truncated = tokenize([fits, cut], 5)
    assert truncated == [False, True]
    assert tokens[0].tolist() == tokens[1].tolist() == [START, 320, 736, 7117, END]


def test_the_end_token_is_the_largest_id_of_every_row() -> None:
    tokens = tokenize(SENTENCES, 7).tokens
    assert (tokens.max(1).values == END).all()
    assert ((tokens == END).sum(1) == 1).all()


def test_letter_case_and_white_space_make_no_difference() -> None:
    rows = tokenize(["the Red  circle", " the red circle\n"], 9).tokens
    assert torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("blank", ["", " ", "\t\n ", "\u00a0", "&nbsp;", "\x00"])
def test_a_blank_sentence_is_an_error_that_quotes_it(blank: str) -> None:
    with pytest.raises(ValueError, match=r"sentences\[1\]=.* holds no word"):
        tokenize(["a cat", blank], 17)


@pytest.mark.parametrize("mark", ["<end_of_text>", "a <Start_Of_Text> cat"])
def test_a_sentence_cannot_spell_the_end_token(mark: str) -> None:
    with pytest.raises(ValueError, match="spells a mark of the vocabulary"):
        tokenize(mark, 17)


def test_a_text_that_is_no_phrase_is_refused() -> None:
    with pytest.raises(ValueError, match="5000 characters, but may have 1000"):
        tokenize("x" * 5000, 17)


def test_a_sentence_that_is_no_string_is_named() -> None:
    with pytest.raises(TypeError, match=r"sentences\[0\] is int"):
        tokenize([3], 17)  # type: ignore[list-item]


@pytest.mark.parametrize("word_len", [-1, 0, 2, 78])
def test_a_length_that_clip_cannot_take_is_refused(word_len: int) -> None:
    with pytest.raises(ValueError, match=rf"word_len={word_len} must lie in 3\.\.77"):
        tokenize("a cat", word_len)


def test_no_sentences_are_no_rows() -> None:
    assert tokenize([], 17).tokens.shape == (0, 17)
