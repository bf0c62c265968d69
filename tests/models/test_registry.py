"""Names to models and back: presets, configurations, and whose a file is."""

from __future__ import annotations

import subprocess
import sys

import pytest
from model_helpers import small_config

from fastris import CRIS, AlignFormerConfig, CRISConfig, MagNetConfig
from fastris.models import registry
from fastris.models.registry import System


def test_every_preset_is_built_by_name_configuration_or_mapping():
    kinds = (CRISConfig, AlignFormerConfig, MagNetConfig)
    named = ["cris_r50", "cris_r101", "tiny", "alignformer_swin_b", "alignformer_tiny", "magnet_swin_b", "magnet_tiny"]
    assert registry.presets() == named == [name for kind in kinds for name in kind.presets]
    for kind in kinds:
        for name in kind.presets:
            assert registry.preset(name) == kind.preset(name)
    tiny = CRISConfig.preset("tiny")
    for what in ("tiny", tiny, tiny.to_dict()):
        model = registry.create(what)
        assert type(model) is CRIS and model.config == tiny


def test_unknown_names_are_told_with_the_known_ones():
    for ask in (registry.preset, CRISConfig.preset, registry.create):
        with pytest.raises(ValueError, match="unknown model 'tine'; choose from cris_r50, cris_r101, tiny"):
            ask("tine")
    known = "and known are cris, alignformer, magnet; register it first"
    with pytest.raises(ValueError, match=f"config: it is of the system 'magnat', {known}"):
        registry.read_config({"system": "magnat", "input_size": 416, "word_len": 17}, "config")


def test_what_names_no_system_is_cris_and_what_others_call_system_means_nothing():
    config = small_config().to_dict()
    assert "system" not in config and registry.read_config(config) == small_config()
    assert registry.system_of(config | {"system": "linux"}) == "cris"
    for foreign in ({"system": "linux"}, {"system": {"name": "slurm"}, "input_size": 3, "word_len": 2}, {}):
        assert registry.system_of(foreign) is None
    assert registry.system_of_names(["stem.weight", "head.weight"]) == "cris"


def test_names_that_are_taken_are_refused(monkeypatch):
    monkeypatch.setattr(registry, "SYSTEMS", dict(registry.SYSTEMS))
    for name, preset in (("cris", "mine"), ("mine", "tiny")):
        with pytest.raises(ValueError, match=r"brings names that are taken: (cris|tiny); rename them"):
            registry.register(System(name, "mine:Model", "mine:Config", (preset,)))
    assert list(registry.SYSTEMS) == ["cris", "alignformer", "magnet"]


def test_names_and_configurations_are_known_without_torch():
    code = (
        "import sys, fastris.models.registry as r; r.preset('tiny'); r.model_keys(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
