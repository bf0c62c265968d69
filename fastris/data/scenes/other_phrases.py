"""The synthetic scenes with wrong phrases, on which a model that ignores the phrase scores as high as before."""

from __future__ import annotations

import numpy as np

from fastris.data.base import Reference, ReferringDataset
from fastris.data.scenes.dataset import REFERENCES, SyntheticExpressions


class OtherPhrases(ReferringDataset):
    """The same objects and masks, each with the phrases of the next object of its scene."""

    def __init__(self, dataset: SyntheticExpressions):
        self.dataset = dataset
        self.name, self.split, self.skipped = f"{dataset.name}, another object's phrases", dataset.split, {}

    def __len__(self) -> int:
        return len(self.dataset)

    def reference(self, index: int) -> Reference:
        own = self.dataset.reference(index)
        other = self.dataset.reference(index - index % REFERENCES + (index + 1) % REFERENCES)
        return Reference(own.ref_id, own.image_id, other.sentences)

    def image(self, index: int) -> np.ndarray:
        return self.dataset.image(index)

    def mask(self, index: int) -> np.ndarray:
        return self.dataset.mask(index)

    def by_image(self) -> list[list[int]]:
        return self.dataset.by_image()
