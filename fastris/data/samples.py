"""Turn data sets into the tensors of training and evaluation, and draw the batches of an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from fastris.data.augment import augment
from fastris.data.base import ReferringDataset
from fastris.data.letterbox import to_square
from fastris.data.mirror import mirrored
from fastris.data.tokens import TokenBatch, find_tokenizer
from fastris.models.inputs import CLIP_INPUTS, Inputs

_VARY = 2  # sets what varies an item apart from all else that is drawn for it


def worker_init(worker_id: int) -> None:
    """For `DataLoader(worker_init_fn=worker_init)`: one OpenCV thread in each worker process, as published.

    It is not set at import, so that the process that imports fastris keeps its own setting.
    """
    import cv2

    cv2.setNumThreads(0)


def digest(*numbers: int) -> int:
    """A 64-bit hash of the numbers, the same on every machine and version of Python."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def number_of(image_id: int | str) -> int:
    """A whole number below 2^63 for an image's id, the same for the same id."""
    text = repr(image_id).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _count_truncated(
    dataset: ReferringDataset, tokenize: Callable[[Sequence[str]], TokenBatch], first_only: bool = False
) -> int:
    """Number of sentences of a data set that `tokenize` cuts; tokenises all of them."""
    count = 0
    for index in range(len(dataset)):
        sentences = dataset.reference(index).sentences
        count += sum(tokenize(sentences[:1] if first_only else sentences).truncated)
    return count


class TrainSamples(Dataset[dict[str, Any]]):
    """One item per reference, with one of its sentences, drawn anew each epoch.

    The sentence depends on (seed, epoch, index) alone, not on the number of workers, the order of the items or whether
    the run was resumed. `set_epoch` reaches persistent workers too.

    Args:
        dataset: where references, images and masks come from.
        input_size: side S of the letterboxed square, in pixels.
        word_len: L, tokens per sentence.
        seed: of the choice of sentences.
        inputs: how the model wants pixels normalised and sentences tokenised.
        augment: vary pictures and sentences, see :func:`fastris.data.augment.augment`.
        tells_known: items have `known`, too, which a loss on the background asks for.
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
    ):
        self.dataset = dataset
        self.augment = augment
        self.tells_known = tells_known
        self.inputs = inputs
        self.input_size = input_size
        self.word_len = word_len
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        find_tokenizer(inputs.tokenizer)  # an unknown name fails here, not in a worker

    def tokenize(self, sentences: str | Sequence[str]) -> TokenBatch:
        """Token ids (N, L) of sentences, and which of them were cut."""
        return find_tokenizer(self.inputs.tokenizer)(sentences, self.word_len)

    def sentences(self, index: int) -> tuple[str, ...]:
        """All that :meth:`tokenize` may be given for reference `index`: its sentences, and as they are mirrored."""
        found = self.dataset.reference(index).sentences
        others = [other for sentence in found if (other := mirrored(sentence)) is not None] if self.augment else []
        return tuple(dict.fromkeys([*found, *others]))

    def vary(
        self, position: int, image: np.ndarray, masks: list[np.ndarray], sentences: list[str]
    ) -> tuple[np.ndarray, list[np.ndarray], list[str]]:
        """An item as it is in this epoch: varied if the samples are, by (seed, epoch, position) alone."""
        if not self.augment:
            return image, masks, sentences
        rng = np.random.default_rng(digest(self.seed, int(self._epoch), position, _VARY))
        return augment(image, masks, sentences, rng)

    def set_epoch(self, epoch: int) -> None:
        """Choose the sentences of this epoch; call it before the loader's iterator is made."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch that :meth:`set_epoch` has chosen."""
        return int(self._epoch)

    @cached_property
    def truncated(self) -> int:
        """Number of sentences of the whole data set that are cut to `word_len`.

        Counted at first use by tokenising all of them: seconds for RefCOCO's training split.
        """
        return _count_truncated(self.dataset, self.tokenize)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reference `index`: image (3, S, S) float32, tokens (L,) int64, mask (1, S, S) float32 in [0, 1], index.

        And `image_id`, a number that is the same for references of one image; with `tells_known`, `known` (1, S, S)
        bool, False on the letterbox's border.
        """
        reference = self.dataset.reference(index)
        sentences = reference.sentences
        sentence = sentences[digest(self.seed, int(self._epoch), index) % len(sentences)]
        image, (mask,), (sentence,) = self.vary(
            index, self.dataset.image(index), [self.dataset.mask(index)], [sentence]
        )
        warp = to_square(image.shape[0], image.shape[1], self.input_size, self.inputs)
        return {
            "image": warp.warp_image(image, self.inputs),
            "tokens": self.tokenize(sentence).tokens[0],
            "mask": warp.warp_mask(mask),
            "index": index,
            "image_id": number_of(reference.image_id),
            **({"known": warp.known()} if self.tells_known else {}),
        }


class EvalSamples(Dataset[dict[str, Any]]):
    """One item per image, with every expression about it, so that the image is read and encoded once.

    Args:
        dataset: where references and images come from.
        input_size: side S of the letterboxed square, in pixels.
        word_len: L, tokens per sentence.
        sentences: "all" of each reference, or only its "first".
        inputs: how the model wants pixels normalised and sentences tokenised.

    Raises:
        ValueError: another value of `sentences`.
    """

    def __init__(
        self,
        dataset: ReferringDataset,
        input_size: int = 416,
        word_len: int = 17,
        sentences: Literal["all", "first"] = "all",
        inputs: Inputs = CLIP_INPUTS,
    ):
        if sentences not in ("all", "first"):
            raise ValueError(f"sentences={sentences!r} is unknown; choose 'all' or 'first'")
        self.dataset = dataset
        self.input_size = input_size
        self.word_len = word_len
        self.sentences = sentences
        self.inputs = inputs
        self.groups = dataset.by_image()

    def tokenize(self, sentences: str | Sequence[str]) -> TokenBatch:
        """Token ids (N, L) of sentences, and which of them were cut."""
        return find_tokenizer(self.inputs.tokenizer)(sentences, self.word_len)

    @cached_property
    def truncated(self) -> int:
        """Number of scored sentences that are cut to `word_len`; counted at first use."""
        return _count_truncated(self.dataset, self.tokenize, self.sentences == "first")

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Image number `position`, in order of first appearance in the data set.

        Returns:
            image: (3, S, S) float32.
            letterbox: the `Letterbox` whose `unwarp` leads back to the image's own size.
            items: a list of (index of the reference in the data set, number of the sentence in its reference,
                the sentence, its tokens (L,) int64).
        """
        group = self.groups[position]
        expressions: list[tuple[int, int, str]] = []
        for index in group:
            sentences = self.dataset.reference(index).sentences
            chosen = sentences[:1] if self.sentences == "first" else sentences
            expressions += [(index, number, sentence) for number, sentence in enumerate(chosen)]
        tokens = self.tokenize([sentence for *_, sentence in expressions]).tokens
        image = self.dataset.image(group[0])
        warp = to_square(image.shape[0], image.shape[1], self.input_size, self.inputs)
        return {
            "image": warp.warp_image(image, self.inputs),
            "letterbox": warp,
            "items": [(*expression, row) for expression, row in zip(expressions, tokens, strict=True)],
        }


class EpochSampler(Sampler[list[int]]):
    """Batches of indices, for `DataLoader(batch_sampler=...)`: a permutation that depends on (seed, epoch) alone.

    An epoch can start at any batch, so a run that was interrupted inside one continues with exactly the batches that
    it would have seen. Several processes draw the same batches, and each yields its own share of every batch.

    Args:
        n: number of samples.
        seed: of the permutations.
        batch_size: samples per batch, over all processes.
        drop_last: leave the last batch out if it is not full; with `n` below `batch_size` there is none then.
        processes, rank: how many processes share each batch, and which of them this is, from 0.
        parts: into how many parts each process divides its share (gradient accumulation); the parts p of all processes
            together are part p of the whole batch.

    Raises:
        ValueError: `batch_size` below 1, or it does not split into equal shares and parts.
    """

    def __init__(
        self,
        n: int,
        seed: int,
        batch_size: int,
        drop_last: bool = True,
        *,
        processes: int = 1,
        rank: int = 0,
        parts: int = 1,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if batch_size % (processes * parts):
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of {processes * parts}: it is the whole batch, which "
                f"{processes} process(es) share equally, each in {parts} part(s) (accumulate)"
            )
        if processes > 1 and not drop_last:
            raise ValueError("drop_last must be true where several processes share the batches")
        self.n = n
        self.seed = seed
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.processes, self.rank, self.parts = processes, rank, parts
        self.epoch = 0
        self.start_batch = 0

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch, wherever this one starts."""
        full, rest = divmod(self.n, self.batch_size)
        return full + bool(rest and not self.drop_last)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch, and the batch of it to begin with; call it before the loader's iterator is made.

        Raises:
            ValueError: `start_batch` is not in 0..`batches_per_epoch`.
        """
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"start_batch={start_batch} must lie in 0..{self.batches_per_epoch}, an epoch's batches")
        self.epoch = epoch
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for batch in range(self.start_batch, self.batches_per_epoch):
            yield self._share(self._slice(order, batch))

    def whole_batch(self, batch: int) -> list[int]:
        """The samples of batch number `batch` of the epoch, those of the other processes included."""
        return self._slice(self._order(), batch)

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(digest(self.seed, self.epoch) >> 1)
        return torch.randperm(self.n, generator=generator).tolist()

    def _slice(self, order: list[int], batch: int) -> list[int]:
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _share(self, batch: list[int]) -> list[int]:
        if self.processes == 1:
            return batch
        size = self.batch_size // (self.processes * self.parts)
        starts = ((part * self.processes + self.rank) * size for part in range(self.parts))
        return [index for start in starts for index in batch[start : start + size]]

    def __len__(self) -> int:
        """Batches that iterating yields: those of the epoch from `start_batch` on."""
        return self.batches_per_epoch - self.start_batch
