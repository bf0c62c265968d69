from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refer_tree import make_refer_tree
from torch.utils.data import DataLoader

from fastris.data import DataError, Reference, ReferringDataset, load_dataset
from fastris.data.samples import EpochSampler, EvalSamples, TrainSamples, worker_init
from fastris.data.tokens import tokenize

L = 9


class Blocks(ReferringDataset):
    """Images with a bright block per reference; reference i belongs to image i // 2 and has i % 3 + 1 sentences."""

    name, split = "blocks", "train"
    words = ("red", "green", "blue", "small", "big", "left", "right", "round")

    def __init__(self, count: int = 8):
        self.count = count
        self.skipped = {}

    def __len__(self) -> int:
        return self.count

    def reference(self, index: int) -> Reference:
        return Reference(index, index // 2, tuple(f"{self.words[index % 8]} {k}" for k in range(index % 3 + 1)))

    def image(self, index: int) -> np.ndarray:
        return np.full((20, 30 + index // 2, 3), index // 2, np.uint8)

    def mask(self, index: int) -> np.ndarray:
        mask = np.zeros((20, 30 + index // 2), bool)
        mask[5:15, 5 + 5 * (index % 2) :] = True
        return mask


class Broken(Blocks):
    def image(self, index: int) -> np.ndarray:
        raise DataError("image 3 is broken; mend it")


def _chosen(samples: TrainSamples, epoch: int) -> list[list[int]]:
    samples.set_epoch(epoch)
    return [samples[i]["tokens"].tolist() for i in range(len(samples))]


def _loaded(samples: TrainSamples, workers: int, **options: Any) -> list[list[int]]:
    loader = DataLoader(samples, batch_size=3, num_workers=workers, worker_init_fn=worker_init, **options)
    return [row for batch in loader for row in batch["tokens"].tolist()]


def test_a_training_item_has_the_promised_tensors() -> None:
    item = TrainSamples(Blocks(), 32, L)[3]
    assert item["image"].shape == (3, 32, 32)
    assert item["mask"].shape == (1, 32, 32)
    assert item["image"].dtype == item["mask"].dtype == torch.float32
    assert item["tokens"].shape == (L,)
    assert item["tokens"].dtype == torch.int64
    assert item["index"] == 3
    assert item["mask"].max() == 1


def test_the_sentence_is_one_of_the_references_own() -> None:
    samples = TrainSamples(Blocks(), 32, L)
    for epoch in range(3):
        for index, row in enumerate(_chosen(samples, epoch)):
            own = tokenize(samples.dataset.reference(index).sentences, L).tokens.tolist()
            assert row in own


def test_sentences_differ_between_epochs_and_seeds_and_repeat_for_the_same() -> None:
    samples = TrainSamples(Blocks(60), 32, L, seed=0)
    first = _chosen(samples, 0)
    assert _chosen(samples, 1) != first
    assert _chosen(TrainSamples(Blocks(60), 32, L, seed=1), 0) != first
    assert _chosen(TrainSamples(Blocks(60), 32, L, seed=0), 0) == first


def test_every_sentence_of_a_reference_comes_up_about_equally_often() -> None:
    samples = TrainSamples(Blocks(3), 8, L)
    counts: Counter[int] = Counter()
    for epoch in range(600):
        samples.set_epoch(epoch)
        counts[int(samples[2]["tokens"][2])] += 1
    assert len(counts) == 3
    assert min(counts.values()) > 150


def test_the_sentence_does_not_depend_on_workers() -> None:
    samples = TrainSamples(Blocks(12), 8, L)
    samples.set_epoch(4)
    assert _loaded(samples, 0) == _loaded(samples, 2)


def test_persistent_workers_see_the_epoch_change() -> None:
    samples = TrainSamples(Blocks(12), 8, L)
    loader = DataLoader(samples, batch_size=12, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 5):
        expected = _chosen(samples, epoch)
        assert next(iter(loader))["tokens"].tolist() == expected


def test_samples_survive_pickling_so_that_workers_can_be_spawned(tmp_path: Path) -> None:
    samples = TrainSamples(load_dataset("refcoco", "val", make_refer_tree(tmp_path)), 32, L, seed=3)
    samples.set_epoch(2)
    copy = pickle.loads(pickle.dumps(samples))
    for name in ("image", "tokens", "mask"):
        assert torch.equal(copy[1][name], samples[1][name])


def test_a_data_error_in_a_worker_stays_a_data_error_with_its_message() -> None:
    with pytest.raises(DataError, match="image 3 is broken; mend it"):
        _loaded(TrainSamples(Broken(), 8, L), 1)


def test_cut_sentences_are_counted() -> None:
    data = Blocks(6)  # sentences of two words: 1 + 2 + 3 + 1 + 2 + 3 of them
    assert TrainSamples(data, 8, 4).truncated == 0
    assert TrainSamples(data, 8, 3).truncated == 12
    assert EvalSamples(data, 8, 3).truncated == 12
    assert EvalSamples(data, 8, 3, "first").truncated == 6


def test_evaluation_gives_each_image_once_with_all_its_expressions_in_order() -> None:
    data = Blocks(5)
    samples = EvalSamples(data, 32, L)
    assert len(samples) == 3
    seen = []
    for item in (samples[i] for i in range(len(samples))):
        assert item["image"].shape == (3, 32, 32)
        for index, number, sentence, tokens in item["items"]:
            assert sentence == data.reference(index).sentences[number]
            assert torch.equal(tokens, tokenize(sentence, L).tokens[0])
            assert (item["letterbox"].height, item["letterbox"].width) == data.mask(index).shape
            seen.append((index, number))
    assert seen == [(i, k) for i in range(5) for k in range(i % 3 + 1)]


def test_evaluation_of_first_sentences_takes_one_per_reference() -> None:
    samples = EvalSamples(Blocks(5), 32, L, sentences="first")
    assert [(i, k) for item in samples for i, k, _, _ in item["items"]] == [(i, 0) for i in range(5)]
    with pytest.raises(ValueError, match="sentences='some' is unknown"):
        EvalSamples(Blocks(5), 32, L, sentences="some")  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "size", "drop_last", "batches"), [(10, 3, True, 3), (10, 3, False, 4), (9, 3, False, 3)])
def test_an_epoch_is_a_permutation_in_batches(n: int, size: int, drop_last: bool, batches: int) -> None:
    sampler = EpochSampler(n, 0, size, drop_last)
    taken = list(sampler)
    assert len(taken) == len(sampler) == sampler.batches_per_epoch == batches
    indices = [index for batch in taken for index in batch]
    assert len(set(indices)) == len(indices) == (min(n, batches * size))
    assert set(indices) <= set(range(n))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = EpochSampler(50, seed, 5)
        torch.manual_seed(len(sampler) + epoch)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_an_epoch_entered_in_the_middle_goes_on_with_the_same_batches() -> None:
    sampler = EpochSampler(23, 7, 4, drop_last=False)
    sampler.set_epoch(3)
    whole = list(sampler)
    for start in range(len(whole) + 1):
        sampler.set_epoch(3, start)
        assert list(sampler) == whole[start:]
        assert len(sampler) == len(whole) - start
        assert sampler.batches_per_epoch == len(whole)


def test_the_loader_takes_the_sampler() -> None:
    sampler = EpochSampler(8, 0, 3)
    loader = DataLoader(TrainSamples(Blocks(8), 8, L), batch_sampler=sampler)
    assert [batch["index"].tolist() for batch in loader] == list(sampler)


def test_wrong_batch_sizes_and_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        EpochSampler(8, 0, 0)
    with pytest.raises(ValueError, match=r"start_batch=3 must lie in 0\.\.2"):
        EpochSampler(8, 0, 3).set_epoch(0, 3)
    assert len(EpochSampler(2, 0, 3)) == 0


def test_synthetic_data_goes_through_the_same_door() -> None:
    data = load_dataset("synthetic", "val", scenes=2)
    item = TrainSamples(data, 32, 22)[0]
    assert item["mask"].max() > 0.5
    assert len(EvalSamples(data, 32, 22)) == 2
