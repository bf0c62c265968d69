"""Several expressions per image in training: `fastris train expressions_per_image=4`.

The image encoder, more than a third of a step's work, runs once for an image and the rest once for each expression
about it (:meth:`fastris.CRIS.encode_image`, :meth:`fastris.CRIS.segment`). What else this changes:

- A batch of `batch_size` expressions holds `batch_size / expressions_per_image` images, and an epoch is one pass over
  the images. (RefCOCO's training split has 16,994 images for 42,404 references.) Each epoch draws other expressions.
- The loss stays the mean over all expressions and pixels. Every image weighs the same in it, where an epoch with one
  expression per item counts an image as often as it has references.
- Gradients are those of the batch in which each image is repeated for each of its expressions, with BatchNorm frozen
  and, because all images are repeated alike, in training too. (BatchNorm's running variance alone differs: its unbiased
  estimate divides by fewer samples.) Compared to a batch of `batch_size` different images, BatchNorm in the image
  encoder sees fewer of them and its statistics are noisier, as with a smaller batch; and the batch is less varied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastris.data.base import ReferringDataset
from fastris.data.letterbox import to_square
from fastris.data.samples import TrainSamples, number_of
from fastris.models.inputs import CLIP_INPUTS, Inputs, inputs_of

if TYPE_CHECKING:
    from fastris.models.config import ModelConfig


class ImageSamples(TrainSamples):
    """One item per image, with K expressions about it; takes the place of :class:`TrainSamples`.

    Which expressions is decided by (seed, epoch, image) alone, as there. They are of as many different objects as the
    image offers, and of one object as many different sentences; where the image has fewer than K expressions, they come
    again, so that every image weighs the same.

    Args:
        dataset, input_size, word_len, seed, inputs, augment, tells_known: as for :class:`TrainSamples`.
        expressions: K.
        references: only the first so many of the data set; None for all.

    Raises:
        ValueError: K below 1.
    """

    def __init__(
        self,
        dataset: ReferringDataset,
        input_size: int = 416,
        word_len: int = 17,
        seed: int = 0,
        inputs: Inputs = CLIP_INPUTS,
        augment: bool = False,
        tells_known: bool = False,
        *,
        expressions: int,
        references: int | None = None,
    ):
        super().__init__(dataset, input_size, word_len, seed, inputs, augment, tells_known)
        if expressions < 1:
            raise ValueError(f"expressions={expressions} must be at least 1")
        self.expressions = expressions
        limit = len(dataset) if references is None else references
        groups = ([index for index in group if index < limit] for group in dataset.by_image())
        self.groups = [group for group in groups if group]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.groups)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Image `position`: image (3, S, S), tokens (K, L), mask (K, 1, S, S), index (K,) of the references.

        And `image_id`, and with `tells_known` `known` (1, S, S), as :class:`TrainSamples` has them.
        """
        chosen = self.choose(position)
        objects = list({index for index, _ in chosen})
        image, found, sentences = self.vary(
            position,
            self.dataset.image(chosen[0][0]),
            [self.dataset.mask(index) for index in objects],
            [sentence for _, sentence in chosen],
        )
        warp = to_square(image.shape[0], image.shape[1], self.input_size, self.inputs)
        masks = {index: warp.warp_mask(mask) for index, mask in zip(objects, found, strict=True)}
        return {
            "image": warp.warp_image(image, self.inputs),
            "tokens": self.tokenize(sentences).tokens,
            "mask": torch.stack([masks[index] for index, _ in chosen]),
            "index": torch.tensor([index for index, _ in chosen]),
            "image_id": torch.tensor(number_of(self.dataset.reference(chosen[0][0]).image_id)),
            **({"known": warp.known()} if self.tells_known else {}),
        }

    def choose(self, position: int) -> list[tuple[int, str]]:
        """(reference, sentence) of the image's K expressions in this epoch."""
        rng = np.random.default_rng((self.seed % 2**64, int(self._epoch), position))
        rounds: list[tuple[int, int, str]] = []
        for index in rng.permutation(self.groups[position]).tolist():
            sentences = self.dataset.reference(index).sentences
            rounds += [(turn, index, sentences[number]) for turn, number in enumerate(rng.permutation(len(sentences)))]
        rounds.sort(key=lambda entry: entry[0])  # stable: the first sentence of each object, then the second of each
        return [rounds[number % len(rounds)][1:] for number in range(self.expressions)]


def training_samples(
    dataset: ReferringDataset,
    model: ModelConfig,
    seed: int,
    *,
    several: int,
    batch_size: int,
    references: int | None,
    augment: bool = False,
    tells_known: bool = False,
) -> TrainSamples:
    """The items of a training run: references with one sentence each, or images with `several` expressions.

    Args:
        batch_size: expressions in a batch. references: only the first so many of the data set; None for all.
        augment: vary pictures and sentences. tells_known: tell where a letterbox's border is.

    Raises:
        ValueError: fewer images than a batch holds.
    """
    common = (dataset, model.input_size, model.word_len, seed, inputs_of(model), augment, tells_known)
    if several == 1:
        return TrainSamples(*common)
    samples = ImageSamples(*common, expressions=several, references=references)
    if len(samples) < batch_size // several:
        raise ValueError(
            f"batch_size={batch_size} with expressions_per_image={several} needs "
            f"{batch_size // several} images, but the training references are of {len(samples)}; give at most "
            f"batch_size={len(samples) * several}"
        )
    return samples


def references_of(samples: TrainSamples, positions: list[int]) -> list[int]:
    """The references (indices in the data set) that the items at these positions hold in this epoch, in order."""
    if not isinstance(samples, ImageSamples):
        return positions
    return [index for position in positions for index, _ in samples.choose(position)]
