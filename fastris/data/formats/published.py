"""The published numbers of references, which show whether a data set is complete."""

from __future__ import annotations

REFERENCES = {
    "refcoco": {"train": 42404, "val": 3811, "testA": 1975, "testB": 1810},
    "refcoco+": {"train": 42278, "val": 3805, "testA": 1975, "testB": 1798},
    "refcocog_u": {"train": 42226, "val": 2573, "test": 5023},
    "refcocog_g": {"train": 44822, "val": 5000},
}
"""Data set -> split -> references. Source: `info` in CRIS's `utils/dataset.py`. gRefCOCO's authors state none."""


def compare(name: str, split: str, count: int) -> str:
    """Compare `count` with the published number of references, in words."""
    published = REFERENCES.get(name, {}).get(split)
    if published is None:
        return "no published count"
    if count == published:
        return "equals the published count"
    return f"{abs(published - count)} {'fewer' if count < published else 'more'} than the published {published}"
