from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import socket
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_helpers import Boxes, model_config

from fastris import CRIS
from fastris.commands.eval import EvalConfig, run
from fastris.data import Reference
from fastris.data.tokens import tokenize
from fastris.evaluation.evaluate import evaluate
from fastris.evaluation.metrics import read_per_sample, score
from fastris.evaluation.rules import RULES, overlap
from fastris.models.inputs import CLIP_MEAN, CLIP_STD
from fastris.options.declare import load_options
from fastris.weights.load import save_atomic

SIZE, WORDS = 64, 12


@pytest.fixture(scope="module")
def model() -> CRIS:
    """Random weights, with the last layer stretched and shifted so that about half of each image is predicted."""
    torch.manual_seed(3)
    model = CRIS(model_config()).eval()
    images = torch.randn(3, 3, SIZE, SIZE)
    tokens = tokenize(["left one", "right one", "the box"], WORDS).tokens
    with torch.no_grad():
        model.proj.txt.bias[-1] = 0.0
        logits = model(images, tokens)
        stretch = 2.0 / logits.std()
        model.proj.txt.weight *= stretch
        model.proj.txt.bias *= stretch
        model.proj.txt.bias[-1] = np.log(0.35 / 0.65) - stretch * logits.median()
    return model


def one_by_one(model: CRIS, dataset: Boxes, first_only: bool) -> list[tuple[int, int, int, int]]:
    """(reference, sentence number, intersection, union), an image and a sentence at a time, as the published loop."""
    found = []
    for index in range(len(dataset)):
        image, mask = dataset.image(index), dataset.mask(index)
        height, width = mask.shape
        scale = min(SIZE / height, SIZE / width)
        left, top = (SIZE - width * scale) / 2, (SIZE - height * scale) / 2
        source = np.array([[0, 0], [width, 0], [0, height]], np.float32)
        target = np.array([[left, top], [width * scale + left, top], [left, height * scale + top]], np.float32)
        border = [255 * channel for channel in CLIP_MEAN]
        matrix = cv2.getAffineTransform(source, target)
        square = cv2.warpAffine(image, matrix, (SIZE, SIZE), flags=cv2.INTER_CUBIC, borderValue=border)
        pixels = torch.from_numpy(((square / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)).float()[None]
        sentences = dataset.reference(index).sentences
        for number, sentence in enumerate(sentences[:1] if first_only else sentences):
            with torch.no_grad():
                probability = model(pixels, tokenize(sentence, WORDS).tokens).sigmoid()
            probability = F.interpolate(probability, size=(SIZE, SIZE), mode="bicubic", align_corners=True)
            inverse = cv2.getAffineTransform(target, source)
            original = cv2.warpAffine(probability[0, 0].numpy(), inverse, (width, height), flags=cv2.INTER_CUBIC)
            prediction = original > 0.35
            found.append((index, number, int((prediction & mask).sum()), int((prediction | mask).sum())))
    return found


@pytest.mark.parametrize("sentences", ["all", "first"])
@pytest.mark.parametrize(("batch_size", "images_per_batch", "workers"), [(1, 1, 0), (3, 2, 0), (32, 8, 2)])
def test_evaluation_equals_a_loop_over_single_expressions(model, sentences, batch_size, images_per_batch, workers):
    expected = one_by_one(model, Boxes(), sentences == "first")
    result = evaluate(
        model,
        Boxes(),
        sentences=sentences,
        batch_size=batch_size,
        images_per_batch=images_per_batch,
        workers=workers,
    )
    assert [(s.index, s.sentence_number) for s in result.samples] == [row[:2] for row in expected]
    for sample, (*_, intersection, union) in zip(result.samples, expected, strict=True):
        assert abs(sample.intersection - intersection) <= 1  # one pixel may lie within rounding of the threshold
        assert abs(sample.union - union) <= 1
    partial = [s for s in result.samples if 0 < s.intersection < s.union]
    assert len(partial) > len(expected) // 2, "the model predicts all or nothing, so this test sees nothing"
    assert result.scores.conditions == f"rule cris, boxes val, {sentences} sentences"


def test_images_are_encoded_once(model, monkeypatch):
    encoded = []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda images: encoded.append(len(images)) or encode(images))
    result = evaluate(model, Boxes(), images_per_batch=2)
    assert (sum(encoded), result.images, result.references, result.scores.expressions) == (3, 3, 6, 12)


def test_cut_expressions_and_skipped_references_are_reported(model):
    result = evaluate(model, Boxes(), sentences="all")
    assert result.truncated == 3
    assert {s.sentence for s in result.samples if s.truncated} == {Boxes().reference(0).sentences[2]}
    assert "3 expressions are longer than word_len=12 tokens and were cut" in result.summary()
    assert "1 references left out: image is missing" in result.summary()


def test_the_model_keeps_its_mode_and_its_numbers(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.train()
    evaluate(model, Boxes(), workers=2)
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_saved_samples_give_back_the_scores(model, tmp_path):
    result = evaluate(model, Boxes())
    result.save(tmp_path, model="somewhere.pth")
    inter, union = read_per_sample(tmp_path / "per_sample.csv")
    again = score(inter, union, rule="cris", dataset="boxes", split="val", sentences="all")
    assert again == result.scores
    with (tmp_path / "per_sample.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["ref_id"], row["image_id"], row["sentence_number"]) == ("100", "image 0", "0")
    assert row["sentence"] == "the left box of picture 0"
    assert float(row["iou"]) == result.samples[0].iou
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    wanted = {"mIoU", "oIoU", "Pr@50", "rule", "rule_text", "dataset", "split", "sentences", "images", "references",
              "expressions", "truncated", "skipped", "versions", "model", "word_len", "input_size", "amp"}  # fmt: skip
    assert wanted <= metrics.keys()
    assert metrics["skipped"] == {"image is missing": 1}


class SomeMissing(Boxes):
    """Boxes whose second object of each image is not there."""

    def reference(self, index: int) -> Reference:
        reference = super().reference(index)
        return MissingReference(**(vars(reference) | {"no_target": True})) if index % 2 else reference

    def mask(self, index: int) -> np.ndarray:
        return super().mask(index) & (index % 2 == 0)


@dataclasses.dataclass(frozen=True)
class MissingReference(Reference):
    no_target: bool = False


@pytest.mark.parametrize("rule", list(RULES))
def test_each_rule_scores_and_stands_beside_its_numbers(model, rule, tmp_path):
    result = evaluate(model, SomeMissing(), rule=rule, images_per_batch=2)
    assert [s.no_target for s in result.samples] == [s.index % 2 == 1 for s in result.samples]
    assert f"[rule {rule}, boxes val, all sentences]" in result.summary()
    result.save(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["rule"], metrics["split"], metrics["sentences"]) == (rule, "val", "all")
    assert metrics["rule_text"] == RULES[rule].text
    assert {"mIoU", "oIoU", "Pr@50", "Pr@60", "Pr@70", "Pr@80", "Pr@90", "no_target"} <= metrics.keys()
    assert ({"gIoU", "cIoU", "N-acc", "T-acc"} <= metrics.keys()) == (rule == "gres")


def test_rules_differ_in_their_numbers(model):
    found = {rule: evaluate(model, Boxes(), rule=rule).scores.mIoU for rule in RULES}
    assert found.pop("alignformer") == found["gres"]  # which only adds what it makes of targets that are not there
    assert found.pop("magnet") == found["lavt"]  # which lets the image keep its shape until then
    assert found.pop("magnet448") != found["cris"]
    assert len(set(found.values())) == len(found) == 4


def test_masks_asked_for_are_the_scored_ones(model):
    result = evaluate(model, Boxes(), keep=[(2, 1), (5, 0)])
    assert result.masks.keys() == {(2, 1), (5, 0)}
    for sample in result.samples:
        if (sample.index, sample.sentence_number) in result.masks:
            mask, truth = result.masks[sample.index, sample.sentence_number], Boxes().mask(sample.index)
            assert (sample.intersection, sample.union) == overlap(mask, truth)


def in_one_of_two_processes(rank: int, model: CRIS, store: str, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    result = evaluate(model, Boxes(), images_per_batch=1, keep=[(0, 0), (2, 0)])
    result.save(folder / str(rank))
    assert result.masks.keys() == {(0, 0), (2, 0)}, "one of them was predicted by either process"
    with pytest.raises((OSError, RuntimeError), match="the disk of picture 1 is gone"):
        evaluate(model, BrokenImage(), images_per_batch=1)


class BrokenImage(Boxes):
    def image(self, index: int) -> np.ndarray:
        if index // 2 == 1:
            raise OSError("the disk of picture 1 is gone")
        return super().image(index)


def test_two_processes_score_every_sample_once_and_find_what_one_finds(model, tmp_path):
    alone = evaluate(model, Boxes(), images_per_batch=1)  # 3 images: 2 for the first process, 1 for the second
    alone.save(tmp_path / "alone")
    arguments = (model, str(tmp_path / "store"), tmp_path)
    torch.multiprocessing.start_processes(in_one_of_two_processes, arguments, nprocs=2, start_method="fork")
    for rank in ("0", "1"):
        assert (tmp_path / rank / "per_sample.csv").read_bytes() == (tmp_path / "alone/per_sample.csv").read_bytes()
        metrics, expected = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in (rank, "alone"))
        assert metrics.pop("processes") == 2 and expected.pop("processes") == 1
        assert {k: v for k, v in metrics.items() if k != "seconds"} == {
            k: v for k, v in expected.items() if k != "seconds"
        }


def test_bad_arguments_are_refused_by_name(model):
    with pytest.raises(ValueError, match="rule='lavvt' is unknown; choose one of cris"):
        evaluate(model, Boxes(), rule="lavvt")
    with pytest.raises(ValueError, match="sentences='some' is unknown"):
        evaluate(model, Boxes(), sentences="some")
    with pytest.raises(ValueError, match="amp=fp16 needs a CUDA device"):
        evaluate(model, Boxes(), amp="fp16")
    empty = Boxes()
    empty.sizes = ()
    with pytest.raises(ValueError, match="boxes val is empty"):
        evaluate(model, empty)


def test_command_scores_a_checkpoint_and_writes_both_files(model, tmp_path, monkeypatch, capsys):
    save_atomic({"config": model.config.to_dict(), "state_dict": model.state_dict()}, tmp_path / "best.pth")
    monkeypatch.setattr("fastris.commands.eval.load_split", lambda *args, **kwargs: Boxes())
    args = [f"model={tmp_path / 'best.pth'}", f"out={tmp_path / 'eval'}", "workers=0", "device=cpu", "sentences=first"]
    run(load_options(EvalConfig, args))
    printed = capsys.readouterr().out
    assert "[rule cris, boxes val, first sentences]" in printed
    assert str(tmp_path / "eval" / "metrics.json") in printed
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["expressions"] == 6
    assert metrics["model"] == str(tmp_path / "best.pth")


def command_in_one_of_two_processes(rank: int, port: int, args: list[str], folder: Path) -> None:
    started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in started.items()})
    with (folder / f"printed{rank}").open("w") as file, contextlib.redirect_stdout(file):
        run(load_options(EvalConfig, args))


def test_command_started_twice_prints_and_writes_once(model, tmp_path, monkeypatch):
    save_atomic({"config": model.config.to_dict(), "state_dict": model.state_dict()}, tmp_path / "best.pth")
    monkeypatch.setattr("fastris.commands.eval.load_split", lambda *args, **kwargs: Boxes())
    args = [f"model={tmp_path / 'best.pth'}", f"out={tmp_path / 'eval'}", "workers=0", "device=cpu", "progress=false"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, [*args, "images_per_batch=2"], tmp_path)
    torch.multiprocessing.start_processes(command_in_one_of_two_processes, arguments, nprocs=2, start_method="fork")
    assert "12 expressions" in (tmp_path / "printed0").read_text() and not (tmp_path / "printed1").read_text()
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert (metrics["processes"], metrics["expressions"], metrics["images"]) == (2, 12, 3)
