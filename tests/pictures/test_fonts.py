"""Captions in any script: in a font that has it, or honestly as codes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import ImageFont

from fastris.pictures import fonts
from fastris.pictures.fonts import fitted, missing_in
from fastris.pictures.overlay import add_caption

ARMENIAN, CHINESE = "\u056f\u0561\u0580\u0574\u056b\u0580", "\u7ea2\u8272\u7684\u5706"
DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A system that has the fonts of matplotlib alone: DejaVu, of which some have Armenian and none Chinese."""
    caches = (fonts._files, fonts._best_font)
    monkeypatch.setattr(fonts, "folders", lambda: [DEJAVU])
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def test_a_text_in_ascii_keeps_the_plain_font_and_searches_nothing(system: pytest.MonkeyPatch) -> None:
    system.setattr(fonts, "folders", lambda: pytest.fail("fonts were searched"))
    font, text = fitted("the red circle", 20)
    assert text == "the red circle" and font.getname() == ImageFont.load_default(20).getname()


def test_a_font_of_the_system_shows_what_the_plain_one_lacks(system: pytest.MonkeyPatch) -> None:
    assert missing_in(ImageFont.load_default(20), ARMENIAN) == set(ARMENIAN)
    font, text = fitted(f"a {ARMENIAN}", 20)
    assert text == f"a {ARMENIAN}" and not missing_in(font, text) and font.getname() == ("DejaVu Sans", "Book")


def test_characters_of_no_font_are_shown_as_codes_with_a_warning(system: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=f"no font of .* phrase: '{CHINESE[0]}' is missing, .* such as Noto"):
        font, text = fitted(f"{ARMENIAN} {CHINESE[0]}", 20)
    assert text == f"{ARMENIAN} \\u7ea2" and not missing_in(font, text)
    system.setattr(fonts, "folders", list)
    fonts._files.cache_clear()
    fonts._best_font.cache_clear()
    with pytest.warns(UserWarning, match="no font"):
        assert fitted("\u00e9t\u00e9", 20)[1] == "\\xe9t\\xe9"


def test_a_caption_without_spaces_is_wrapped_within_the_page(system: pytest.MonkeyPatch) -> None:
    picture = np.zeros((100, 400, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = (np.asarray(add_caption(picture, [(0, ARMENIAN * n)])) for n in (2, 10))
    assert two.shape[0] > one.shape[0] and two.shape[1] == 400
    assert (two[100:, -3:] == 255).all() and (two[100:, 200:] < 128).any()
    longest = add_caption(picture, [(0, ARMENIAN * 400), (1, "the red circle")])
    assert longest.height < 2 * two.shape[0]
