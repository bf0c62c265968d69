"""Each system's own recipe is the default, and what CRIS's has not: AdamW, rates by the step, instance contrast."""

from __future__ import annotations

import pytest
import torch
from training_helpers import MODEL, Boxes, parts_of, rows, train_config, train_set, val_set

from fastris.commands.train import TrainConfig, train
from fastris.data.samples import TrainSamples
from fastris.evaluation.metrics import score
from fastris.evaluation.rules import RULES
from fastris.models import registry
from fastris.models.base import Origin, ReferringModel
from fastris.models.cris.model import CRIS
from fastris.training import loop

POLY = {"optimizer": "adamw", "schedule": "poly", "weight_decay": 0.01}


def test_alignformers_recipe_is_its_default_and_options_win():
    config = TrainConfig(model="alignformer_swin_b", epochs=3, val_rule="lavt")
    assert (config.optimizer, config.schedule, config.base_lr, config.weight_decay) == ("adamw", "poly", 5e-5, 0.01)
    assert (config.batch_size, config.val_sentences, config.lr_multi) == (32, "all", 1.0)
    assert (config.epochs, config.val_rule) == (3, "lavt")
    from_keys = TrainConfig(extra={"system": "alignformer", "window": 6})
    assert (from_keys.epochs, from_keys.val_rule) == (40, "alignformer")


def test_magnets_recipe_is_its_default():
    config = TrainConfig(model="magnet_swin_b")
    assert (config.optimizer, config.schedule, config.base_lr, config.weight_decay) == ("adamw", "poly", 5e-5, 0.01)
    assert (config.epochs, config.batch_size, config.val_rule, config.val_sentences) == (40, 32, "magnet", "all")


def test_a_micro_batch_of_one_is_refused_only_where_batchnorm_needs_two():
    TrainConfig(model="alignformer_swin_b", batch_size=4, accumulate=4)
    with pytest.raises(ValueError, match="parts of 2 or more references, because BatchNorm needs two"):
        TrainConfig(batch_size=4, accumulate=4)


@pytest.mark.parametrize("system", registry.SYSTEMS)
def test_threshold_is_that_of_the_systems_rule(system):
    config = registry.config_class(system)
    assert config.threshold == RULES[config.recipe.val_rule].threshold


def test_the_best_weights_are_those_of_the_rules_own_score():
    counts = {"dataset": "d", "split": "val", "sentences": "all"}
    found = {rule: score([1, 90], [10, 100], rule=rule, **counts) for rule in RULES}
    assert found["alignformer"].best_by == 91 / 110
    assert found["cris"].best_by == pytest.approx(0.5, abs=1e-6)


def test_rates_of_poly_fall_with_every_step_and_a_stopped_run_goes_on_exactly(tmp_path):
    train(train_config(tmp_path / "whole", **POLY), train_set(), val_set())
    rates = [float(row["lr"]) for row in rows(tmp_path / "whole" / "log.csv")]
    assert rates == pytest.approx([1e-3 * (1 - step / 8) ** 0.9 for step in range(8)])
    train(train_config(tmp_path / "two", max_steps=3, **POLY), train_set(), val_set())
    train(train_config(tmp_path / "two", resume=True, **POLY), train_set(), val_set())
    assert rows(tmp_path / "two" / "log.csv") == rows(tmp_path / "whole" / "log.csv")
    with pytest.raises(ValueError, match="epochs=2, now 3"):
        train(train_config(tmp_path / "two", resume=True, epochs=3, **POLY), train_set(), val_set())


def test_adamw_decays_apart_from_the_gradient(tmp_path):
    optimizer = parts_of(train_config(tmp_path, **POLY)).run.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}


def test_the_first_epochs_quirk_is_refused_with_rates_by_the_step():
    with pytest.raises(ValueError, match="needs lr_multi above 0 and schedule=steps"):
        TrainConfig(published_first_epoch_quirk=True, schedule="poly")


@pytest.mark.parametrize("several", [1, 2])
def test_the_loss_is_told_which_expressions_share_an_image_or_reference(tmp_path, monkeypatch, several):
    told: list[Origin] = []

    def loss(self, features, tokens, mask, index=None, origin=None):
        told.append(origin)
        return ReferringModel.loss(self, features, tokens, mask, index)

    monkeypatch.setattr(CRIS, "loss", loss)
    monkeypatch.setattr(CRIS, "contrasts_instances", True)
    config = train_config(
        tmp_path, instance_contrast=0.1, batch_size=4, accumulate=2, expressions_per_image=several, max_steps=1
    )
    parts = parts_of(config, Boxes())
    batch = {
        name: torch.stack([torch.as_tensor(parts.batches.samples[place][name]) for place in range(4 // several)])
        for name in ("image", "tokens", "mask", "index", "image_id")
    }
    parts.run.model.train()
    loop.train_step(parts.plan, parts.run, batch)
    images, references = (torch.cat([getattr(each, name) for each in told]) for name in Origin._fields)
    assert len(told) == 2 and len(images) == 4
    assert references.tolist() == batch["index"].flatten().tolist()
    same = references[:, None] // 2 == references[None] // 2  # two objects an image
    assert torch.equal(images[:, None] == images[None], same)


def test_the_number_of_an_image_is_its_ids_alone():
    samples = TrainSamples(Boxes(), 64, MODEL["word_len"])
    assert samples[0]["image_id"] == samples[1]["image_id"] != samples[2]["image_id"]


def test_an_instance_contrast_that_would_do_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(CRIS, "contrasts_instances", False)
    with pytest.raises(ValueError, match=r"instance_contrast=0.1 would do nothing: CRIS has no loss"):
        parts_of(train_config(tmp_path, instance_contrast=0.1))
