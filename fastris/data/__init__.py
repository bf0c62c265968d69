"""Data sets of referring expressions: their readers, and the conversion to a model's input tensors."""

from __future__ import annotations

from fastris.data.base import DataError, Reference, ReferringDataset
from fastris.data.load import DATASETS, load_dataset
from fastris.data.options import load_split

__all__ = ["DATASETS", "DataError", "Reference", "ReferringDataset", "load_dataset", "load_split"]
