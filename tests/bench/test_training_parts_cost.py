"""What Mask Grounding and the alignment loss add to a training step of CRIS-RN50: at most 8 % of its operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastris import CRISConfig, use_impl
from fastris.bench.report import results
from fastris.bench.studies import training_parts as study
from fastris.bench.timing.roofline import counted
from fastris.models.cris.training_parts import Alignment, HiddenWords, SentenceGrounding
from fastris.nn.masked_words import Masking

BATCH = 2


def step_of_cris() -> dict[str, float]:
    """Operations of each stage of a step, for one reference, as bench/results has them."""
    found = results.load(Path(study.__file__).resolve().parents[1] / "results" / "modelled_cards.json")
    return {name: stage["flops"] / found["batch"] for name, stage in found["paths"]["torch"].items()}


def on_shapes(work: Callable[[], Tensor]) -> float:
    """Operations of forward and backward for one reference."""
    with study.without_hidden_words(), use_impl("torch"):
        return counted(lambda: work().backward()) / BATCH


def test_both_add_at_most_eight_percent_and_most_of_it_is_the_predictor():
    switches = {"mask_grounding": 1.0, "whole_words": False, "alignment_loss": 0.5}
    config = dataclasses.replace(CRISConfig.preset("cris_r50"), **switches)
    with FakeTensorMode():
        grounding, alignment = SentenceGrounding(config).train(), Alignment(config)
        tokens, mask = torch.ones(BATCH, 17, dtype=torch.int64), torch.ones(BATCH, 1, 416, 416)
        words = torch.ones(BATCH, 17, 512, requires_grad=True)
        c5, pixels = (torch.ones(BATCH, c, s, s, requires_grad=True) for c, s in ((1024, 13), (512, 26)))
        embedding = torch.ones(49408, 512, requires_grad=True)
        hidden = HiddenWords(Masking(tokens > 0, tokens > 0), words)
        predictor = on_shapes(lambda: grounding.loss(hidden, tokens, c5, mask, embedding, None))
        aligned = on_shapes(lambda: alignment(pixels, words, tokens, mask))
    stages = step_of_cris()
    assert 300e9 < sum(stages.values()) < 310e9 and 3e9 < stages["text encoder"] < 5e9
    added = predictor + aligned + stages["text encoder"]
    assert 0.04 < added / sum(stages.values()) < study.GOAL
    assert 15e9 < predictor < 18e9 and aligned < 1e9


def test_study_prints_what_each_adds_and_off_is_nothing(monkeypatch, capsys):
    counts = {"off": 400, "mask_grounding=1.0": 420, "alignment_loss=0.5": 402, "both": 422}
    monkeypatch.setattr(study, "count_step", lambda model, batch, switches: counts[_name(switches)] * 10**9)
    assert study.run(study.TrainingPartsConfig(batch=2)) == 0
    printed = capsys.readouterr().out
    assert "| off | 200.0 |" in printed and "| both | 211.0 | 5.50% |" in printed
    assert printed.endswith("both add 5.5% of the step's operations; the goal is at most 8%\n")
    counts["both"] = 440
    assert study.run(study.TrainingPartsConfig(batch=2)) == 1


def _name(switches: dict[str, float]) -> str:
    return next(name for name, each in study.SWITCHES.items() if each == switches)


def test_preset_of_another_system_and_one_reference_are_refused():
    with pytest.raises(ValueError, match="model must be a preset of CRIS, got alignformer_tiny"):
        study.count_step("alignformer_tiny", 2, {})
    with pytest.raises(ValueError, match="batch must be at least 2, got 1"):
        study.run(study.TrainingPartsConfig(batch=1))


@pytest.mark.slow
def test_whole_step_of_a_tiny_cris_is_counted_with_and_without():
    off, both = (study.count_step("tiny", 2, study.SWITCHES[name]) for name in ("off", "both"))
    assert off < both
