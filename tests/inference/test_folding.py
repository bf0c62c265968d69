"""A model for asking: BatchNorms folded away, the same answers, the original untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from model_helpers import small_config
from torch import nn

from fastris import CRIS, for_inference, use_impl


@pytest.fixture(scope="module")
def model() -> CRIS:
    torch.manual_seed(0)
    model = CRIS(small_config()).double()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return model.train()


@pytest.fixture
def question() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.tensor([[94, 5, 6, 95, 0, 0], [94, 7, 8, 9, 95, 0]])
    return torch.randn(2, 3, 64, 96, generator=generator).double(), tokens


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_folded_model_answers_as_the_model_in_eval_mode(model, question, impl):
    with use_impl(impl), torch.no_grad():
        expected = copy.deepcopy(model).eval()(*question)
        assert (for_inference(model)(*question) - expected).abs().max() <= 1e-11 * expected.abs().max()


def test_only_the_norm_that_follows_no_layer_is_left(model):
    left = [
        name for name, part in for_inference(model).named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)
    ]
    assert left == ["neck.norm_layer.0"]


def test_the_model_itself_stays_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for_inference(model)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_norm_without_running_statistics_keeps_following_the_batch(question):
    torch.manual_seed(0)
    model = CRIS(small_config()).double().eval()
    model.backbone.visual.bn1 = nn.BatchNorm2d(
        model.backbone.visual.bn1.num_features, track_running_stats=False
    ).double()
    with torch.no_grad():
        expected = model(*question)
        assert (for_inference(model)(*question) - expected).abs().max() <= 1e-11 * expected.abs().max()


def test_folded_model_refuses_to_be_trained(model):
    folded = for_inference(model)
    folded.eval()
    with pytest.raises(RuntimeError, match="train the model it came from"):
        folded.train()
