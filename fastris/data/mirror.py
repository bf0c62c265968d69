"""What a phrase becomes when its picture is mirrored, and whether it speaks of colours: English, by tables of words.

A table is exact where it knows a word, and where it does not, or a word has several senses, the answer is that nothing
is known: :func:`mirrored` is None then, and the picture stays as it is. So a wrong phrase is never made, at the price
of some that could have been mirrored and are not.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LEFT = ("left", "leftmost", "lefthand", "lefthanded", "leftside", "leftward", "leftwards")
SWAPS = {a: b for word in _LEFT for a, b in ((word, "right" + word[4:]), ("right" + word[4:], word))}
"""Words that change places; all others that begin like them (leftover, rights) have other senses."""


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Written text and numbers read backwards in a mirror; directions of a compass, a clock, a ship and a car turn round.
_NEVER = _set(
    "say says said saying read reads reading written writing writes word words wording letter letters "
    "lettering text number numbers numbered numeral numerals digit digits spell spells spelled spelling "
    "initials inscription titled entitled caption east west eastern western northeast northwest southeast "
    "southwest o'clock oclock clockwise counterclockwise anticlockwise port starboard lhs rhs lft rgt rght rt "
    "lt lef letf leftt elft rigth righ riht rihgt rigt izquierda izquierdo derecha derecho gauche droite "
    "droit links rechts linke linken rechte rechten sinistra destra esquerda esquerdo direita direito"
)
_CAR = _set("driver driver's drivers passenger passenger's passengers")  # with "side"
_CLEAR_BEFORE = _set(
    "on to the at in from toward towards facing far upper lower top bottom front back rear middle center "
    "centre extreme furthest farthest very most first second third his her their its my your"
)
_CLEAR_AFTER = _set("of side hand handed most corner edge half end part")
_UNCLEAR_AFTER = _set(
    "behind next above below under underneath beneath beside besides near nearest by at before after there "
    "here now away in inside into on onto over up down through across against around along between outside "
    "where when out off past about opposite alone open unattended empty standing untouched unfinished the a an "
    "his her their it its with for to"
)
_OTHER_SENSE = {  # by what follows, whatever comes before
    "left": _set("over overs field fielder"),
    "right": _set(
        "way angle angled angles answer size kind choice place time amount stuff order thing enough now away "
        "there here field fielder person word"
    ),
}
_UNCLEAR_BEFORE = {
    "left": _set(
        "who that which he she they it we just has have had been being was were is are got one ones only "
        "nothing someone everyone what what's whats not stage house"
    ),
    "right": _set("all is are was were just that's thats it's its not stage house who that which"),
}
_ORDINAL = re.compile(r"\d+(?:st|nd|rd|th)")
_WORD = re.compile("[A-Za-z0-9]+(?:['\u2019][A-Za-z0-9]+)*")
_QUOTES = re.compile("[\"\u201c\u201d\u00ab\u00bb#]|(?<![A-Za-z])['\u2018\u2019]|['\u2019](?![A-Za-z])")

COLOURS = _set(
    "red redder reddest reddish redhead redheaded green greener greenish blue bluer bluish blueish yellow "
    "yellowish orange orangish purple purplish violet pink pinkish brown brownish brunette black blackish "
    "white whiter whitish gray grey grayish greyish silver silvery gold golden beige tan tanned cream maroon "
    "navy teal turquoise cyan magenta olive khaki lavender lilac burgundy crimson scarlet indigo ivory "
    "charcoal bronze copper peach salmon coral mustard rust aqua lime mint blond blonde color colors colored "
    "colour colours coloured colorful colourful multicolor multicolored multicoloured dark darker darkest "
    "light lighter lightest bright brighter brightest brightly pale paler shade shades tinted hue neon pastel "
    "rainbow monochrome sepia"
)
"""Words that name a colour or how light it is. Some have other senses, too (an orange, a light)."""


class _Word(NamedTuple):
    text: str
    start: int
    end: int


def mirrored(phrase: str) -> str | None:
    """The phrase for the mirrored picture, left and right in each other's places; None where that is unclear."""
    if _is_foreign(phrase) or _QUOTES.search(phrase):
        return None
    words = [_Word(found[0].lower().replace("\u2019", "'"), *found.span()) for found in _WORD.finditer(phrase)]
    texts = [word.text for word in words]
    if any(_is_unclear(texts, position) for position in range(len(texts))):
        return None
    parts, done = [], 0
    for position, word in enumerate(words):
        if word.text not in SWAPS:
            continue
        if word.text in ("left", "right") and not _is_direction(phrase, words, position):
            return None
        parts += [phrase[done : word.start], _spelled(SWAPS[word.text], phrase[word.start : word.end])]
        done = word.end
    return "".join([*parts, phrase[done:]])


def names_colour(phrase: str) -> bool:
    """Whether the phrase may speak of a colour, which changing the picture's colours could make wrong."""
    return _is_foreign(phrase) or not COLOURS.isdisjoint(found[0].lower() for found in _WORD.finditer(phrase))


def _is_foreign(phrase: str) -> bool:
    """Whether there are letters that English does not have."""
    return any(letter.isalpha() and not letter.isascii() for letter in phrase)


def _is_unclear(words: list[str], position: int) -> bool:
    """Whether one of the words makes it unclear what a mirrored picture shows, whatever its left and right mean."""
    word, following = words[position], words[position + 1] if position + 1 < len(words) else ""
    if any(letter.isdigit() for letter in word):
        return _ORDINAL.fullmatch(word) is None
    if len(word) == 1:
        return word not in ("a", "i") and (word, following) not in (("t", "shirt"), ("t", "shirts"))
    if word in _CAR and following == "side":
        return True
    return word in _NEVER or (word.startswith(("left", "right")) and word not in SWAPS)


def _is_direction(phrase: str, words: list[_Word], position: int) -> bool:
    """Whether the word, "left" or "right", is certainly a direction here."""
    word = words[position]
    before = words[position - 1] if position else _Word("", 0, 0)
    after = words[position + 1] if position + 1 < len(words) else _Word("", len(phrase), len(phrase))
    second = words[position + 2].text if position + 2 < len(words) else ""
    ends = phrase[word.end : after.start]
    previous = before.text if phrase[before.end : word.start].strip(" -") == "" else ""
    following = after.text if ends.strip(" -") == "" else ""
    if "?" in ends or following in _OTHER_SENSE[word.text] or (following, second) == ("side", "up"):
        return False
    if previous in ("stage", "house"):
        return False
    if following in _CLEAR_AFTER or previous in _CLEAR_BEFORE:
        return True
    return following not in _UNCLEAR_AFTER and previous not in _UNCLEAR_BEFORE[word.text]


def _spelled(word: str, like: str) -> str:
    """The word in capitals, with one, or without, as another is spelled."""
    if like.isupper():
        return word.upper()
    return word.capitalize() if like[0].isupper() else word
