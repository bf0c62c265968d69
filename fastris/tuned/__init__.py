"""Which path is faster on which GPU: what `fastris tune` measured there, and what is assumed where nobody has."""

from fastris.tuned.choices import Preference, forget, on_tiles, preference, tuning_of
from fastris.tuned.sizes import BUCKETS, LARGE, PRECISIONS, bucket_of, precision_of, precisions_of

__all__ = [
    "BUCKETS",
    "LARGE",
    "PRECISIONS",
    "Preference",
    "bucket_of",
    "forget",
    "on_tiles",
    "precision_of",
    "precisions_of",
    "preference",
    "tuning_of",
]
