"""The model that is asked, and a folder that holds it."""

from __future__ import annotations

import pytest
import torch

import fastris


@pytest.fixture(scope="module")
def model() -> fastris.CRIS:
    torch.manual_seed(0)
    return fastris.CRIS(fastris.CRISConfig.preset("tiny"))


@pytest.fixture(scope="module")
def folder(model: fastris.CRIS, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder)
