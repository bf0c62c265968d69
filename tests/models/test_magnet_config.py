"""MagNet's configuration, which needs no optional library, and what is said where one is missing."""

from __future__ import annotations

import sys

import pytest

import fastris
from fastris import MagNetConfig
from fastris.models import registry


def test_mapping_preset_and_defaults_describe_the_released_model():
    config = MagNetConfig.preset("magnet_swin_b")
    assert config == MagNetConfig() == registry.read_config(config.to_dict())
    assert (config.in_words(), config.inputs.fit) == ("MagNet, Swin-B", "squash")
    assert (config.language_mask, config.class_score) == ("masked", "off")
    assert config.inputs.tokenizer == "wordpiece_ended:google-bert/bert-base-uncased"
    assert MagNetConfig(language_mask="released").inputs.tokenizer == "wordpiece:google-bert/bert-base-uncased"
    assert sum(config.parameter_counts().values()) == pytest.approx(296_984_954, rel=0.01)
    assert "bert_pretrain=google-bert/bert-base-uncased" in config.without_weights()
    assert not MagNetConfig.preset("magnet_tiny").without_weights()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": (3, 8, 16, 32)}, r"num_heads\[0\] \(3\) must divide the stage's width \(128\)"),
        ({"embed_dim": 6, "num_heads": (1, 1, 1, 1)}, "embed_dim must be a multiple of 4, got 6"),
        ({"bert": {"num_hidden_layers": 6}}, "bert.num_hidden_layers must be a multiple of 4"),
        ({"decoder_heads": 6}, r"decoder_heads \(6\) must divide conv_dim \(256\)"),
        ({"conv_dim": 40}, "conv_dim must be a multiple of 32, and larger, got 40"),
        ({"language_mask": "compat"}, "language_mask must be one of masked, intended, released, got 'compat'"),
        ({"class_score": True}, "class_score must be one of off, on, got True"),
        ({"embed_dim": 4096, "depths": (128, 128, 128, 128)}, "make embed_dim, depths, window smaller"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        MagNetConfig(**fields)


def test_without_transformers_is_one_line_and_configurations_still_work(monkeypatch):
    config = MagNetConfig.preset("magnet_tiny")
    pytest.importorskip("timm")
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = r"^transformers is needed for .* BERT, and is not installed: pip install 'fastris\[magnet\]'$"
    with pytest.raises(ImportError, match=message):
        fastris.MagNet(config)
