"""The published numbers of references, which show whether a data set is complete."""

from __future__ import annotations

REFERENCES = {
    "refcoco": {"train": 42404, "val": 3811, "testA": 1975, "testB": 1810},
    "refcoco+": {"train": 42278, "val": 3805, "testA": 1975, "testB": 1798},
    "refcocog_u": {"train": 42226, "val": 2573, "test": 5023},
    "refcocog_g": {"train": 44822, "val": 5000},
    "refcoco-m": {"val": 2080},
}
"""Data set -> split -> references. Source: `info` in CRIS's `utils/dataset.py`; for RefCOCO-M its card on the Hugging
Face hub, moondream/refcoco-m. gRefCOCO's authors state none."""

IMAGES_AND_SENTENCES = {"refcoco-m": {"val": (1190, 5598)}}
"""Data set -> split -> images and sentences, where the same source states them."""


def compare(name: str, split: str, count: int, images: int | None = None, sentences: int | None = None) -> str:
    """Compare `count` with the published number of references, in words; the others, too, where they are published."""
    published = REFERENCES.get(name, {}).get(split)
    if published is None:
        return "no published count"
    if count == published:
        stated = IMAGES_AND_SENTENCES.get(name, {}).get(split, (None, None))
        for what, number, wanted in zip(("images", "sentences"), (images, sentences), stated, strict=True):
            if None not in (number, wanted) and number != wanted:
                return f"equals the published count, but of {what} {wanted} are published"
        return "equals the published count"
    return f"{abs(published - count)} {'fewer' if count < published else 'more'} than the published {published}"
