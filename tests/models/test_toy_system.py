"""A system of thirty lines, registered by name: trained, scored, saved, loaded and asked like those that are built in.

Twice: once with an image encoding that serves every phrase, and once with one that needs the phrase.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_helpers import rows, train_set, val_set

from fastris import CRIS, Segmenter
from fastris.commands.convert import ConvertConfig, run_convert
from fastris.commands.train import TrainConfig, train
from fastris.data.letterbox import letterbox
from fastris.data.tokens import TOKENIZERS, TokenBatch
from fastris.evaluation.evaluate import evaluate
from fastris.models import registry
from fastris.models.base import Pixels, ReferringModel
from fastris.models.config import ModelConfig
from fastris.models.inputs import Inputs
from fastris.models.registry import System
from fastris.runtime.storage import load_torch
from fastris.weights.load import load_clip, load_model, load_weights

PHRASES = ["the red circle", "a small blue square on the left", "green"]


# The system: from here on, thirty lines.
@dataclass
class ToyConfig(ModelConfig):
    system: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toy"
    presets: ClassVar[dict[str, Any]] = {"toy_small": {}, "toy_large": {"width": 12}}
    parts: ClassVar[tuple[str, ...]] = ("pixels", "letters")
    inputs: ClassVar[Inputs] = Inputs((0.5, 0.4, 0.3), (0.2, 0.2, 0.25), tokenizer="letters")
    published_besides: ClassVar[frozenset[str]] = frozenset({"learning_rate"})
    limits: ClassVar[dict[str, int]] = {"width": 10**8}
    width: int = 6
    input_size: int = 32
    word_len: int = 12

    def parameter_counts(self) -> dict[str, int]:
        return {"width": self.width * (3 * 4 * 4 + 64)}


class Maps(NamedTuple):
    maps: Tensor

    def select(self, index: Tensor | None) -> Maps:
        return self if index is None else Maps(self.maps[index])


class Toy(ReferringModel, tags=["toy"]):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.pixels = nn.Conv2d(3, self.config.width, 4, stride=4)
        self.letters = nn.Embedding(64, self.config.width)

    def encode_image(self, images: Tensor) -> Maps:
        return Maps(self.pixels(images))

    def segment(self, features: Maps, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        words = self.letters(tokens).mean(1)[:, :, None, None]
        return (features.select(index).maps * words).sum(1, keepdim=True)


# And one that looks at the picture anew for every phrase.
@dataclass
class LookingConfig(ToyConfig):
    system: ClassVar[str] = "looking"
    presets: ClassVar[dict[str, Any]] = {"looking_small": {}}


class Looking(Toy, tags=["looking"]):
    config_class = LookingConfig
    shares_image = False

    def encode_image(self, images: Tensor) -> Pixels:
        return ReferringModel.encode_image(self, images)

    def segment(self, features: Pixels, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        words = self.letters(tokens).mean(1)[:, :, None, None]
        return (self.pixels(features.select(index).images) * words).sum(1, keepdim=True)


def letters(sentences: str | Sequence[str], word_len: int) -> TokenBatch:
    """One token a letter, the toys' own tokenizer."""
    sentences = [sentences] if isinstance(sentences, str) else sentences
    ids = [[1 + ord(letter) % 63 for letter in sentence] for sentence in sentences]
    tokens = torch.tensor([(row + [0] * word_len)[:word_len] for row in ids])
    return TokenBatch(tokens, [len(row) > word_len for row in ids])


@pytest.fixture(autouse=True)
def systems(monkeypatch):
    monkeypatch.setattr(registry, "SYSTEMS", dict(registry.SYSTEMS))
    monkeypatch.setitem(TOKENIZERS, "letters", letters)
    registry.register(System("toy", f"{__name__}:Toy", f"{__name__}:ToyConfig", ("toy_small", "toy_large")))
    registry.register(System("looking", f"{__name__}:Looking", f"{__name__}:LookingConfig", ("looking_small",)))


def run_training(folder: Path, model: str, **changes: Any):
    """`fastris train model=...` on the drawn scenes."""
    settings = {
        "epochs": 2,
        "batch_size": 6,
        "base_lr": 0.02,
        "milestones": (9,),
        "workers": 0,
        "workers_val": 0,
        "pictures": 0,
    }
    config = TrainConfig(model=model, dataset="synthetic", device="cpu", output_folder=folder, **settings | changes)
    return train(config, train_set(), val_set())


@pytest.mark.parametrize(("name", "kind"), [("toy_small", Toy), ("looking_small", Looking)])
def test_toy_system_trains_and_its_best_checkpoint_scores_as_it_did(name, kind, tmp_path):
    result = run_training(tmp_path, name)
    assert type(result.model) is kind and result.step == 4
    losses = [float(row["loss"]) for row in rows(tmp_path / "log.csv")]
    assert losses[-1] < losses[0]
    assert {row["lr"] for row in rows(tmp_path / "log.csv")} == {"0.02"}  # all of it is head

    best = load_model(tmp_path / "best.pth")
    assert type(best) is kind and best.config == kind.config_class() and not best.training
    saved = load_torch(tmp_path / "best.pth")
    assert saved["config"]["system"] == kind.config_class.system
    assert evaluate(best, val_set(), sentences="first").scores.as_dict() == saved["scores"]
    card = (tmp_path / "README.md").read_text()
    assert (
        "# Toy\n" in card and f"- {kind.config_class.system}\n" in card and "CRIS" not in card.split("## Training")[0]
    )


def test_toy_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    whole = run_training(tmp_path / "whole", "toy_small", evaluate=False)
    run_training(tmp_path / "parts", "toy_small", evaluate=False, max_steps=3)
    resumed = run_training(tmp_path / "parts", "toy_small", evaluate=False, resume=True)
    assert resumed.step == whole.step
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_parameters_in_no_group_stay_and_count_neither_for_clipping_nor_in_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "parameter_groups", lambda self: {"head": list(self.pixels.parameters())})
    settings, segment, found = {"evaluate": False, "max_norm": 0.01, "max_steps": 2}, Toy.segment, []

    def watched(self, *arguments):
        found.append(self.letters.weight.grad)
        return segment(self, *arguments)

    monkeypatch.setattr(Toy, "segment", watched)
    left_out = run_training(tmp_path / "left_out", "toy_small", **settings).model
    build = Toy.__init__

    def frozen(self, config):
        build(self, config)
        self.letters.requires_grad_(False)

    monkeypatch.setattr(Toy, "__init__", frozen)
    same = run_training(tmp_path / "frozen", "toy_small", **settings).model
    assert all(torch.equal(a, b) for a, b in zip(left_out.parameters(), same.parameters(), strict=True))
    assert left_out.letters.weight.grad.any() and found == [None] * 4


@pytest.mark.parametrize("name", ["toy_small", "looking_small"])
def test_several_expressions_per_image_train_as_the_images_repeated(name, tmp_path):
    assert run_training(tmp_path, name, expressions_per_image=3, evaluate=False).step == 2 * 4 // 2
    model = registry.create(name).train()
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 64, (2, 3, 12))
    masks = (torch.rand(2, 3, 1, 32, 32) > 0.5).float()
    together = model(images, tokens, masks)
    alone = model(images.repeat_interleave(3, 0), tokens.flatten(0, 1), masks.flatten(0, 1))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("name", "kind"), [("toy_small", Toy), ("looking_small", Looking)])
def test_toy_folder_is_asked_like_any_other_with_its_own_colours_and_tokens(name, kind, tmp_path):
    model = registry.create(name).eval()
    model.save_pretrained(tmp_path)
    photo = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    with pytest.warns(UserWarning, match="too long"):
        found = Segmenter.from_pretrained(tmp_path, device="cpu").predict(photo, PHRASES * 4)
    scaled = letterbox(40, 30, 32).warp_image(photo, ToyConfig.inputs)[None]
    assert not torch.equal(scaled, letterbox(40, 30, 32).warp_image(photo)[None])
    with torch.no_grad():
        expected = [model(scaled, letters(phrase, 12).tokens)[0, 0] for phrase in PHRASES * 4]
    np.testing.assert_allclose(found.logits, torch.stack(expected).numpy(), atol=1e-5)
    assert found.masks.shape == (12, 40, 30)
    assert type(kind.from_pretrained(tmp_path)) is kind


def test_both_kinds_answer_alike_where_their_arithmetic_is_the_same():
    shared, looking = Toy(ToyConfig()).eval(), Looking(LookingConfig()).eval()
    load_weights(looking, shared.state_dict())
    assert shared.shares_image and not looking.shares_image
    first, second = (evaluate(model, val_set(), batch_size=5).samples for model in (shared, looking))
    assert [sample.intersection for sample in first] == [sample.intersection for sample in second]


def test_toy_files_are_converted_and_found_again_as_what_they_are(tmp_path):
    model = registry.create("toy_large").eval()
    model.save_pretrained(tmp_path / "folder")
    chain = ["folder", "published.pth", "single.safetensors", "again"]
    for source, target in pairwise(chain):
        assert run_convert(ConvertConfig(str(tmp_path / source), str(tmp_path / target))) == 0
        loaded = load_model(tmp_path / target)
        assert type(loaded) is Toy and loaded.config == model.config == ToyConfig(width=12)
        assert torch.equal(loaded.letters.weight, model.letters.weight)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == model.config.to_dict()


def test_file_without_a_configuration_takes_one_and_says_so(tmp_path):
    save_file(Toy(ToyConfig()).state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="carry no configuration, and shapes do not tell a Toy's"):
        load_model(tmp_path / "bare.safetensors")
    (tmp_path / "toy.yaml").write_text("width: 6\nword_len: 12\n")
    run_convert(
        ConvertConfig(str(tmp_path / "bare.safetensors"), str(tmp_path / "out"), config=str(tmp_path / "toy.yaml"))
    )
    assert type(load_model(tmp_path / "out")) is Toy


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"width": "6"}, r"width must be of type int, got '6'"),
        ({"width": True}, r"width must be of type int, got True"),
        ({"width": [6]}, r"width must be of type int"),
        ({"input_size": 10**9}, r"input_size must be a whole number from 1 to 16384"),
        ({"word_len": 0}, r"word_len must be a whole number from 1 to 4096"),
        ({"width": 10**9}, r"width must be a whole number from 1 to 100000000, got 1000000000"),
        ({"width": 10**8}, r"these sizes make a model of about 11.2 billion parameters, .*; make width smaller"),
    ],
)
def test_configuration_of_a_stranger_is_checked_before_anything_is_built(field, message, tmp_path):
    Toy(ToyConfig()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(ToyConfig().to_dict() | field))
    with pytest.raises(ValueError, match=rf"the configuration of .* does not describe a Toy model: {message}"):
        load_model(tmp_path)


def test_keys_that_a_published_file_has_besides_are_known_to_its_system_alone(tmp_path, recwarn):
    (tmp_path / "toy.yaml").write_text("width: 6\nlearning_rate: 0.1\n")
    assert ToyConfig.from_yaml(tmp_path / "toy.yaml") == ToyConfig() and not recwarn
    assert {"learning_rate", "train_lmdb"} <= registry.published_besides()
    with pytest.warns(UserWarning, match="keys that mean nothing here: train_lmdb"):
        ToyConfig.from_dict({"train_lmdb": "x"})


def test_wrong_class_system_or_weights_are_one_error_that_says_the_mend(tmp_path, monkeypatch):
    Toy(ToyConfig()).save_pretrained(tmp_path / "toy")
    with pytest.raises(
        ValueError, match=r"toy holds a Toy model, and CRIS loads CRIS; load it with fastris\.Segmenter"
    ):
        CRIS.from_pretrained(tmp_path / "toy")
    with pytest.raises(ValueError, match="clip_pretrain: Toy does not start from CLIP's weights; leave it out"):
        load_clip(Toy(ToyConfig()), "RN50:openai")
    with pytest.raises(ValueError, match=r"missing \(2\): pixels\.weight, pixels\.bias"):
        load_weights(Toy(ToyConfig()), {"letters.weight": torch.zeros(64, 6)})
    with pytest.raises(
        TypeError, match=r'config must be a ToyConfig such as ToyConfig\.preset\("toy_small"\), got int'
    ):
        Toy(3)
    weights = load_file(tmp_path / "toy" / "model.safetensors")
    monkeypatch.delitem(registry.SYSTEMS, "toy")
    known = "known are cris, alignformer, magnet, looking; register it first"
    with pytest.raises(ValueError, match=f"of the system 'toy', and {known}"):
        load_model(tmp_path / "toy")
    assert set(weights) == {"pixels.weight", "pixels.bias", "letters.weight"}
