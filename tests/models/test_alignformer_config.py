"""AlignFormer's configuration, which needs no optional library, and what is said where one is missing."""

from __future__ import annotations

import sys

import pytest

import fastris
from fastris import AlignFormerConfig
from fastris.models import registry


def test_mapping_preset_and_defaults_describe_the_released_model():
    config = AlignFormerConfig.preset("alignformer_swin_b")
    assert config == AlignFormerConfig() == registry.read_config(config.to_dict())
    assert (config.in_words(), config.inputs.fit) == ("AlignFormer, Swin-B", "squash")
    assert config.inputs.tokenizer == "wordpiece:google-bert/bert-base-uncased"
    assert sum(config.parameter_counts().values()) == pytest.approx(273_239_993, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": (3, 8, 16, 32)}, r"num_heads\[0\] \(3\) must divide the stage's width \(128\)"),
        ({"conv_dim": 40}, "conv_dim must be a multiple of 32, and larger, got 40"),
        ({"behaviour": "strict"}, "behaviour must be one of intended, compat"),
        ({"word_len": 513}, "word_len must be between 3 and bert.max_position_embeddings"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
        ({"depths": (1, 1)}, "depths must hold 4 whole numbers"),
        ({"bert": {"hidden": 3}}, "bert has unknown keys hidden; its keys are vocab_size"),
        ({"embed_dim": 4096, "depths": (128, 128, 128, 128)}, "make embed_dim, depths, window smaller"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        AlignFormerConfig(**fields)


def test_without_transformers_is_one_line_and_configurations_still_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    config = AlignFormerConfig.preset("alignformer_tiny")
    message = r"^transformers is needed for .* BERT, and is not installed: pip install 'fastris\[alignformer\]'$"
    with pytest.raises(ImportError, match=message):
        fastris.AlignFormer(config)
