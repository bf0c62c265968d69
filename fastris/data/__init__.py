"""Data sets of referring expressions, and what turns them into the model's input."""

from __future__ import annotations

from fastris.data.base import DataError, Reference, ReferringDataset
from fastris.data.load import DATASETS, load_dataset
from fastris.data.options import load_split

__all__ = ["DATASETS", "DataError", "Reference", "ReferringDataset", "load_dataset", "load_split"]
