"""Several expressions per image in training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from process_helpers import run_processes
from test_distributed import assert_nearly_same_run, exact_run
from test_resume import assert_same_run
from torch import nn
from torch.utils.data import DataLoader
from training_helpers import Boxes, model_config, parts_of, rows, train_config, train_set, val_set

from fastris import CRIS
from fastris.commands.train import train
from fastris.data.samples import TrainSamples, worker_init
from fastris.data.tokens import tokenize
from fastris.training import loop as training
from fastris.training.expressions import ImageSamples, references_of, training_samples

L = 12


def several(**options) -> ImageSamples:
    return ImageSamples(Boxes(), 64, L, **({"expressions": 3} | options))


def test_an_item_is_an_image_with_the_promised_expressions() -> None:
    samples, single = several(), TrainSamples(Boxes(), 64, L)
    assert len(samples) == 3
    for position in range(3):
        item = samples[position]
        shapes = {name: tuple(value.shape) for name, value in item.items()}
        assert shapes == {"image": (3, 64, 64), "tokens": (3, L), "mask": (3, 1, 64, 64), "index": (3,), "image_id": ()}
        for index, row, mask in zip(item["index"].tolist(), item["tokens"], item["mask"], strict=True):
            assert index // 2 == position
            assert row.tolist() in tokenize(Boxes().reference(index).sentences, L).tokens.tolist()
            assert torch.equal(mask, single[index]["mask"]) and torch.equal(item["image"], single[index]["image"])


def test_expressions_are_of_different_objects_first_and_repeat_only_when_all_were_used() -> None:
    for epoch in range(5):
        samples = several(expressions=2)
        samples.set_epoch(epoch)
        assert {index for index, _ in samples.choose(0)} == {0, 1}
    everything = several(expressions=6).choose(1)  # the image has 3 sentences about one object and 1 about the other
    assert sorted(Counter(everything).values()) == [1, 1, 2, 2]


def test_choice_depends_on_seed_epoch_and_image_alone_and_not_on_workers() -> None:
    def tokens(seed: int, epoch: int, workers: int) -> list:
        samples = several(seed=seed)
        samples.set_epoch(epoch)
        loader = DataLoader(samples, batch_size=2, num_workers=workers, worker_init_fn=worker_init)
        return [batch["tokens"].tolist() for batch in loader]

    assert tokens(0, 1, 0) == tokens(0, 1, 2)
    assert len({str(tokens(seed, epoch, 0)) for seed in range(2) for epoch in range(4)}) > 4


def test_references_of_a_batch_are_those_that_its_items_hold() -> None:
    samples = several(expressions=2)
    samples.set_epoch(3)
    expected = [index for position in (2, 0) for index in samples[position]["index"].tolist()]
    assert references_of(samples, [2, 0]) == expected
    assert references_of(TrainSamples(Boxes(), 64, L), [2, 0]) == [2, 0]


def test_only_the_references_asked_for_are_used() -> None:
    samples = several(references=3)
    assert len(samples) == 2
    assert {index for index, _ in samples.choose(1)} == {2}


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_are_those_of_the_batch_that_repeats_each_image(frozen: bool) -> None:
    model = CRIS(model_config(dropout=0.0)).double().train()
    if frozen:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    images, masks = torch.randn(2, 3, 64, 64).double(), (torch.rand(2, 3, 1, 64, 64) > 0.5).double()
    tokens = tokenize(["left one", "the red box", "right", "a", "b of c", "far left box"], L).tokens.view(2, 3, L)
    encoded = []
    encode, found = model.encode_image, []
    model.encode_image = lambda images: encoded.append(len(images)) or encode(images)
    for batch in (
        (images, tokens, masks),
        (images.repeat_interleave(3, 0), tokens.flatten(0, 1), masks.flatten(0, 1)),
    ):
        model.zero_grad()
        logits, target, loss = model(*batch)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((logits, target, loss.detach(), gradients))
    assert encoded == [2, 6]
    (logits, target, loss, gradients), (*expected, wanted) = found
    for ours, theirs in zip((logits, target, loss), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert gradients.keys() == wanted.keys() and len(gradients) > 50
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name in wanted:
        torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-10, atol=1e-12 * scale, msg=name)


def test_model_names_a_mask_that_does_not_fit_the_expressions() -> None:
    model = CRIS(model_config()).train()
    with pytest.raises(ValueError, match=r"mask must be \(6, 1, H, W\) \(3 expressions per image\)"):
        model(torch.randn(2, 3, 64, 64), torch.ones(2, 3, L, dtype=torch.int64), torch.rand(2, 1, 64, 64))


def test_eval_mode_takes_several_expressions_per_image_too() -> None:
    model = CRIS(model_config()).eval()
    images, tokens = torch.randn(2, 3, 64, 64), tokenize(["a", "b", "c", "d"], L).tokens
    expected = model(images.repeat_interleave(2, 0), tokens)
    torch.testing.assert_close(model(images, tokens.view(2, 2, L)), expected, rtol=1e-4, atol=1e-5)


def run_with(folder, **changes):
    options = {"batch_size": 4, "expressions_per_image": 2} | changes
    return train(train_config(folder, **options), train_set(), val_set())


@pytest.mark.slow
@pytest.mark.long
def test_interrupted_run_with_several_expressions_goes_on_exactly(tmp_path) -> None:
    whole = run_with(tmp_path / "whole")
    assert (whole.step, whole.epoch) == (4, 2)  # 4 images, 2 in a batch
    run_with(tmp_path / "parts", max_steps=1, workers=2, evaluate=False)
    run_with(tmp_path / "parts", resume=True)
    assert rows(tmp_path / "parts/log.csv") == rows(tmp_path / "whole/log.csv")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_number_of_expressions_is_part_of_a_runs_identity(tmp_path) -> None:
    run_with(tmp_path, max_steps=1, evaluate=False)
    with pytest.raises(ValueError, match=r"expressions_per_image=2, now .not set"):
        run_with(tmp_path, expressions_per_image=1, resume=True)


def test_batches_that_do_not_fit_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="equal parts of 2 or more references of 3 references for each image"):
        train_config(tmp_path, batch_size=4, expressions_per_image=3)
    with pytest.raises(ValueError, match="needs 5 images, but the training references are of 4; give at most batch_"):
        training_samples(train_set(), model_config(), 0, several=2, batch_size=10, references=None)


def test_parts_of_a_batch_hold_whole_images(tmp_path) -> None:
    config = train_config(tmp_path, batch_size=8, expressions_per_image=2, accumulate=2)
    parts = parts_of(config)
    run, batches = parts.run, parts.batches
    batch = next(iter(DataLoader(batches.samples, batch_sampler=batches.sampler)))
    seen = []
    run.model.register_forward_pre_hook(lambda module, args: seen.append([tuple(a.shape) for a in args]))
    run.model.train()
    training.train_step(parts.plan, run, batch)
    assert seen == [[(2, 3, 64, 64), (2, 2, 12), (2, 2, 1, 64, 64)]] * 2


def exact_run_with(folder: Path, changes: dict) -> str:
    sample = ImageSamples.__getitem__

    def item(samples: ImageSamples, position: int) -> dict:
        found = sample(samples, position)
        return found | {"image": found["image"].double(), "mask": found["mask"].double()}

    ImageSamples.__getitem__ = item  # type: ignore[method-assign]
    return exact_run(folder, changes)


@pytest.mark.slow
def test_two_processes_train_on_several_expressions_as_one_does(tmp_path: Path) -> None:
    changes = {"batch_size": 8, "expressions_per_image": 2, "epochs": 2}
    for count in (1, 2):
        printed = run_processes(exact_run_with, count, tmp_path / str(count), changes)
        assert not any("Error" in text for text in printed), printed
    assert_nearly_same_run(tmp_path / "2", tmp_path / "1")
